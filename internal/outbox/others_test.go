//go:build unix

package outbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/retry"
)

// The tests of what other sessions do: they lock rows and tables, and lease rows of the same channel.

// lock locks the rows of a table that a condition is true of, or the whole table if that is "", until unlock is called.
func lock(t *testing.T, tab, where string) (unlock func()) {
	t.Helper()
	tx, err := testkit.DB(t).Begin()
	if err != nil {
		t.Fatal(err)
	}
	statement := `lock table "` + tab + `"`
	if where != "" {
		statement = `select 1 from "` + tab + `" where ` + where + ` for update`
	}
	if _, err := tx.Exec(statement); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback() })
	return func() { _ = tx.Rollback() }
}

// waiting is how many sessions of an application wait for a lock.
func waiting(t *testing.T, application string) (n int) {
	t.Helper()
	err := testkit.DB(t).QueryRow(`select count(*) from pg_stat_activity where application_name = $1 and wait_event_type = 'Lock'`, application).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestLockedRowHoldsUpNoResult: of rows without a key, too, that are all deleted in one statement.
func TestLockedRowHoldsUpNoResult(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	gate := make(chan struct{})
	var calls atomic.Int64
	dsn := testkit.WithParams(testkit.DSN(t), "application_name", tab)
	r := run(t, config{dsn: dsn, table: tab, concurrency: 4}, notify.HandlerFunc(func(context.Context, notify.Notification) error {
		calls.Add(1)
		<-gate
		return nil
	}))
	fill(t, tab, channel, 4)
	testkit.Eventually(t, "not begun", func() bool { return calls.Load() == 4 })
	unlock := lock(t, tab, "payload = '2'")
	close(gate) // so that the results gather
	began := time.Now()
	testkit.Eventually(t, "a locked row holds up the others", func() bool { return rowCount(t, testkit.DB(t), tab) == 1 })
	if took := time.Since(began); took > 4*time.Second { // the statement would be given up after 5 s
		t.Errorf("a locked row holds up the others for %v", took)
	}
	if err := r.Ready(); err != nil {
		t.Errorf("nothing is wrong, and %v", err)
	}
	// The first result of it that comes alone waits for a tenth of a second.
	testkit.Eventually(t, "it is not known to be locked", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.locked) == 1 })
	for until := time.Now().Add(time.Second); time.Now().Before(until); { // it is tried again meanwhile
		if waiting(t, tab) > 0 {
			t.Fatal("a row that is known to be locked is waited for")
		}
	}
	unlock()
	emptied(t, testkit.DB(t), tab)
	if n := calls.Load(); n != 4 {
		t.Errorf("%d calls for 4 rows", n)
	}
	if lost := stat(r, "pglistener_items_total", "lease_lost"); lost != 0 {
		t.Errorf("%v leases are said to be lost", lost)
	}
}

// TestLockedRowHoldsUpNoClaim: what comes after it is handled meanwhile. That it is all that is due is no reason to look without a pause.
func TestLockedRowHoldsUpNoClaim(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	fill(t, tab, channel, 20)
	unlock := lock(t, tab, "payload = '1'")
	r := run(t, config{table: tab}, s)
	began := time.Now()
	testkit.Eventually(t, "a locked row holds up the others", func() bool { return rowCount(t, testkit.DB(t), tab) == 1 })
	if took := time.Since(began); took > 4*time.Second { // the statement would be given up after 4.5 s
		t.Errorf("a locked row holds up the others for %v", took)
	}
	looks := 0
	for until := time.Now().Add(2 * time.Second); time.Now().Before(until); time.Sleep(time.Millisecond) {
		r.mu.Lock()
		if r.counts.changed { // as every look at what is locked says
			looks++
		}
		r.counts.changed = false
		r.mu.Unlock()
	}
	if looks > 10 { // pauses of 0.1 s that double leave room for six
		t.Errorf("it has looked %d times in two seconds", looks)
	}
	unlock()
	_ = r.Handle(t.Context(), notify.Notification{}) // it looks again
	emptied(t, testkit.DB(t), tab)
	if got := s.payloads(); len(got) != 20 || got[19] != "1" {
		t.Errorf("handled %v", got)
	}
}

// TestLockedRowAtTheStop: what could not be written is told.
func TestLockedRowAtTheStop(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	gate := make(chan struct{})
	r := run(t, config{table: tab}, notify.HandlerFunc(func(context.Context, notify.Notification) error { <-gate; return nil }))
	insert(t, testkit.DB(t), tab, channel, "x")
	testkit.Eventually(t, "not begun", func() bool { return r.runs() == 1 })
	lock(t, tab, "true")
	r.begin()
	close(gate)
	r.stop()
	if lines := r.All("results of the outbox were not written"); len(lines) != 1 || lines[0]["level"] != "ERROR" {
		t.Errorf("%v", lines)
	}
}

// TestLockedTableCollectsNoSessions: a server does not notice that a connection has ended while its statement waits for a lock. And
// when the table is free again, no statement that was given up claims a row for nobody.
func TestLockedTableCollectsNoSessions(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	// A server so busy that it has not begun a statement by then would ignore its cancelling.
	r := run(t, config{dsn: testkit.WithParams(testkit.DSN(t), "application_name", tab), table: tab, timeout: 200 * time.Millisecond,
		tweak: func(o *Outbox) { o.store.timeout = time.Second }}, &seen{})
	testkit.Eventually(t, "never counted", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return !r.counts.counted.IsZero() })
	unlock := lock(t, tab, "")
	for range 3 {
		_ = r.CatchUp(t.Context())
		testkit.Eventually(t, "it does not try", func() bool { return waiting(t, tab) > 0 })
		testkit.Eventually(t, "a session waits on that has been given up", func() bool { return waiting(t, tab) == 0 })
	}
	if err := r.Ready(); err == nil || !strings.Contains(err.Error(), "locked the table") {
		t.Errorf("%v", err)
	}
	// What the probe's connection finds is told in words, too.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := testkit.DB(t).ExecContext(ctx, r.Verify())
	r.Verified(err)
	if err := r.Ready(); err == nil || !strings.Contains(err.Error(), "PING_TIMEOUT had passed, as when somebody has locked the table") {
		t.Errorf("%v", err)
	}
	// A claim that begins where the last one ended does not wait for long either.
	if _, _, err := r.store.claim(1, place{runAt: time.Now()}, 0); pq.As(err, pqerror.LockNotAvailable) == nil {
		t.Errorf("%v", err)
	}
	unlock()
	fill(t, tab, channel, 10)
	emptied(t, testkit.DB(t), tab)
	testkit.Eventually(t, "not ready although the table is free", func() bool { return r.Ready() == nil })
}

// TestLockedRowsAreSeen: that nothing can be claimed is not that nothing is due.
func TestLockedRowsAreSeen(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := run(t, config{table: tab, tweak: func(o *Outbox) {
		o.options.LateAfter, o.options.Limits.Timeout = 2*time.Second, time.Second
		o.health.progress = time.Now().Add(-time.Hour) // it has had nothing to do for long
	}}, &seen{})
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, run_at) values ($1, now() + interval '1 second')`, channel)
	unlock := lock(t, tab, "true")
	testkit.Eventually(t, "what is due is not counted", func() bool { return stat(r, "pglistener_outbox_rows", "due") == 1 })
	if err := r.Ready(); err != nil {
		t.Errorf("sooner than LATE_AFTER: %v", err)
	}
	testkit.Eventually(t, "ready although what is due cannot be claimed", func() bool { return r.Ready() != nil })
	if age := stat(r, "pglistener_outbox_oldest_seconds", ""); age < 1.5 {
		t.Errorf("the oldest is due since %v s", age)
	}
	unlock()
	emptied(t, testkit.DB(t), tab)
	testkit.Eventually(t, "not ready although it is done", func() bool { return r.Ready() == nil })
}

// TestRowsOfOthersAreNotDue: what another replica works at does not make this one late.
func TestRowsOfOthersAreNotDue(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := run(t, config{table: tab}, &seen{})
	const lease = `insert into "%s" (channel, attempts, lease, run_at, leased_until) values ($1, 1, $2, now() - interval '%s', now() + interval '%s')`
	const other = "22222222-2222-2222-2222-222222222222"
	for _, row := range [][3]any{{other, "3 hours", "1 hour"}, {r.store.owner, "2 hours", "1 hour"}} {
		testkit.Exec(t, testkit.DB(t), fmt.Sprintf(lease, tab, row[1], row[2]), channel, row[0])
	}
	c, _, err := r.store.count(nil)
	if age := time.Since(c.oldest); err != nil || c.due != 1 || age < 119*time.Minute || age > 121*time.Minute {
		t.Errorf("%d are due, the oldest since %v, want what is leased to this replica: %v", c.due, age, err)
	}
	testkit.Exec(t, testkit.DB(t), `update "`+tab+`" set leased_until = now() - interval '1 second'`)
	_ = r.Handle(t.Context(), notify.Notification{}) // it looks again
	emptied(t, testkit.DB(t), tab)
}

// TestRowInBackoffIsNotLateness: one row that waits for its next attempt, while the others succeed.
func TestRowInBackoffIsNotLateness(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := run(t, config{table: tab, attempts: 1000, tweak: func(o *Outbox) {
		o.options.LateAfter, o.options.Limits.Timeout = time.Second, 500*time.Millisecond
		o.retry = retry.Backoff{Min: time.Hour, Max: time.Hour}
	}}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		if n.Payload == "bad" {
			return errors.New("no")
		}
		return nil
	}))
	insert(t, testkit.DB(t), tab, channel, "bad")
	testkit.Eventually(t, "it does not fail", func() bool { return stat(r, "pglistener_handler_failures_total", "") == 1 })
	insert(t, testkit.DB(t), tab, channel, "good")
	testkit.Eventually(t, "the good row is not done", func() bool { return rowCount(t, testkit.DB(t), tab) == 1 })
	for until := time.Now().Add(2 * time.Second); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		if err := r.Ready(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFiguresHoldUpNobody: neither the figures nor Ready, which the select loop calls, wait for the server.
func TestFiguresHoldUpNobody(t *testing.T) {
	t.Parallel()
	r := run(t, config{table: outboxTable(t, testkit.DB(t))}, &seen{})
	var conns []*sql.Conn
	for range 2 { // all that there are, so that whoever asks the server waits for one
		c, err := r.store.db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	asked := make(chan error)
	go func() { _, err := r.pool.findHolder(r.store, r.log); asked <- err }()
	testkit.Eventually(t, "the server is not asked", func() bool { return r.store.db.Stats().WaitCount > 0 })
	told := make(chan struct{})
	go func() { r.Stats(); _ = r.Ready(); close(told) }()
	select {
	case <-told:
	case <-time.After(testkit.Patience):
		t.Error("the figures wait for the server")
	}
	for _, c := range conns {
		c.Close()
	}
	if err := <-asked; err != nil {
		t.Error(err)
	}
}

// encoded makes a database of an encoding, with an outbox in it.
func encoded(t *testing.T, encoding string) (dsn string, db *sql.DB) {
	t.Helper()
	server, name := testkit.DB(t), testkit.ChannelName(t)
	testkit.Exec(t, server, `create database "`+name+`" encoding '`+encoding+`' lc_collate 'C' lc_ctype 'C' template template0`)
	t.Cleanup(func() { _, _ = server.Exec(`drop database "` + name + `" with (force)`) })
	dsn = testkit.WithParams(testkit.DSN(t), "dbname", name)
	db = testkit.Open(t, dsn)
	makeOutbox(t, db, "outbox")
	return dsn, db
}

// TestErrorThatTheDatabaseCannotHold: it is written all the same, in other characters.
func TestErrorThatTheDatabaseCannotHold(t *testing.T) {
	t.Parallel()
	dsn, latin := encoded(t, "LATIN1")
	r := run(t, config{dsn: dsn, table: "outbox", channel: "orders", attempts: 1}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		if n.Payload == "bad" {
			return errors.New("ошибка \"7\" café")
		}
		return nil
	}))
	insert(t, latin, "outbox", "orders", "bad")
	testkit.Eventually(t, "its result is not written", func() bool { return stat(r, "pglistener_items_total", "failed") == 1 })
	var text string
	if err := latin.QueryRow("select last_error from outbox").Scan(&text); err != nil || !strings.Contains(text, `\u043e\u0448`) || !strings.Contains(text, "7") {
		t.Errorf("it says %q: %v", text, err)
	}
	insert(t, latin, "outbox", "orders", "good")
	testkit.Eventually(t, "the next one is not done", func() bool { return rowCount(t, latin, "outbox") == 1 })
}

// TestRowThatIsNoText: what the server cannot hand out stops its channel, which is not ready and says why; and the SQL in docs/outbox.md
// gives it up. A database of no encoding takes any bytes.
func TestRowThatIsNoText(t *testing.T) {
	t.Parallel()
	dsn, ascii := encoded(t, "SQL_ASCII")
	testkit.Exec(t, ascii, `insert into outbox (channel, payload) values ('orders', 'good 1'), ('orders', E'caf\xe9'), ('orders', 'good 2')`)
	s := &seen{}
	r := run(t, config{dsn: dsn, table: "outbox", channel: "orders", concurrency: 3}, s)
	r.Wait(t, "outbox cannot be read", 1)
	testkit.Eventually(t, "it is ready", func() bool { err := r.Ready(); return err != nil && strings.Contains(err.Error(), "UTF8") })
	_, text, _ := strings.Cut(testkit.ReadFile(t, "../../docs/outbox.md"), "```sql\ndo ")
	text, _, _ = strings.Cut(text, "```")
	testkit.Exec(t, ascii, "do "+text)
	testkit.Eventually(t, "it does not go on", func() bool { return len(s.payloads()) == 2 && r.Ready() == nil })
	var id int
	if err := ascii.QueryRow("select id from outbox where failed_at is not null and last_error like '%UTF8%'").Scan(&id); err != nil || id != 2 {
		t.Errorf("%d is given up: %v", id, err)
	}
}

// TestRowThatIsNeverFinished: a row that was begun too often, and whose last outcome was never written, is given up and not begun again,
// for it may kill the listener. It is begun several times first, whatever OUTBOX_ATTEMPTS says.
func TestRowThatIsNeverFinished(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		attempts, begun int
		lease           string
		change          string // of the row, meanwhile
		begin           bool
	}{
		"once more":              {1, leastLost - 1, "gen_random_uuid()", "", true},
		"too often":              {1, leastLost, "gen_random_uuid()", "", false},
		"once more of 20":        {20, 19, "gen_random_uuid()", "", true},
		"too often of 20":        {20, 20, "gen_random_uuid()", "", false},
		"failed, of more before": {20, 50, "null", "", true},
		"with another payload":   {20, 50, "gen_random_uuid()", "payload = 'y'", true},
		"with another key":       {20, 20, "gen_random_uuid()", "key = 'y'", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
			testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload, attempts, lease, leased_until)
				values ($1, 'x', $2, `+c.lease+`, now())`, channel, c.begun)
			if c.change != "" {
				testkit.Exec(t, testkit.DB(t), `update "`+tab+`" set `+c.change)
			}
			r := run(t, config{table: tab, channel: channel, attempts: c.attempts}, s)
			testkit.Eventually(t, "nothing becomes of it", func() bool {
				return stat(r, "pglistener_items_total", "failed")+stat(r, "pglistener_items_total", "done") == 1
			})
			if got := len(s.payloads()) == 1; got != c.begin {
				t.Errorf("begun once more: %v", got)
			}
			if !c.begin {
				rowsAre(t, tab, fmt.Sprintf("failed_at is not null and last_error like 'begun %d times, %%'", c.begun), 1)
			}
		})
	}
}

// TestOnlyATryIsATry: calls that began before the channel was paused say no more of the receiver.
func TestOnlyATryIsATry(t *testing.T) {
	t.Parallel()
	const total = 20
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	gate := make(chan struct{})
	var calls atomic.Int64
	r := run(t, config{table: tab, concurrency: total, attempts: 100}, notify.HandlerFunc(func(context.Context, notify.Notification) error {
		calls.Add(1)
		<-gate
		return notify.Unavailable(errors.New("refused"))
	}))
	fill(t, tab, channel, total)
	testkit.Eventually(t, "not begun", func() bool { return calls.Load() == total })
	close(gate)
	testkit.Eventually(t, "not given back", func() bool { return r.runs() == 0 && stat(r, "pglistener_items_total", "given_back") >= total-3 })
	r.mu.Lock()
	tries, wait := r.breaker.Tries(), r.breaker.Try(time.Now(), 0)
	r.mu.Unlock()
	if tries > 2 || wait > 4*time.Second { // the next try may have been made by now
		t.Errorf("after %d calls that were under way %d count as tries, and the next one is in %v", total, tries, wait)
	}
}

// TestRowsClaimedBeforeAPauseAreGivenBack without a call.
func TestRowsClaimedBeforeAPauseAreGivenBack(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	r := run(t, config{table: outboxTable(t, testkit.DB(t))}, notify.HandlerFunc(func(context.Context, notify.Notification) error { calls.Add(1); return nil }))
	testkit.Eventually(t, "never counted", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return !r.counts.counted.IsZero() })
	r.mu.Lock()
	for i := range 6 {
		r.breaker.Fail(fmt.Sprint(i), errors.New("refused"), 0, time.Now())
	}
	if !r.breaker.Open() {
		t.Error("not paused")
	}
	r.mu.Unlock()
	r.push([]job{{id: -1, until: "now", claimed: time.Now()}, {id: -2, until: "now", claimed: time.Now()}})
	testkit.Eventually(t, "they are not given back", func() bool { return stat(r, "pglistener_items_total", "given_back") == 2 })
	if n := calls.Load(); n != 0 {
		t.Errorf("%d calls although the channel is paused and they are no tries", n)
	}
}

// TestSlowLinkEndsNoStatement: the time limit is for locks; rows that take long on their way may.
func TestSlowLinkEndsNoStatement(t *testing.T) {
	t.Parallel()
	names, err := parseTable("outbox")
	if err != nil {
		t.Fatal(err)
	}
	n, s := 0, store{db: testkit.DB(t), table: names, timeout: 300 * time.Millisecond}
	err = s.query("select repeat('x', 1000000) from generate_series(1, 20)", func(rows *sql.Rows) error {
		if n++; n == 1 {
			time.Sleep(2 * s.timeout) // as a slow link does
		}
		return nil
	})
	if err != nil || n != 20 {
		t.Errorf("%d rows, %v", n, err)
	}
}

// TestServerEndsAnAbandonedClaim: of a claim in a transaction whose listener has fallen silent nothing stays locked.
func TestServerEndsAnAbandonedClaim(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	insert(t, testkit.DB(t), tab, channel, "x")
	names, err := parseTable(tab)
	if err != nil {
		t.Fatal(err)
	}
	s := store{db: testkit.Open(t, testkit.DSN(t)), table: names, timeout: 500 * time.Millisecond}
	err = s.transact(false, steer, `select id from {table} for update`, nil, func(*sql.Rows) error {
		if _, err := testkit.DB(t).Exec(`select from "` + tab + `" for update nowait`); pq.As(err, pqerror.LockNotAvailable) == nil {
			t.Errorf("it is not locked: %v", err)
		}
		testkit.Eventually(t, "the row stays locked", func() bool {
			_, err := testkit.DB(t).Exec(`select from "` + tab + `" for update nowait`)
			return err == nil
		})
		return nil
	})
	if err == nil {
		t.Error("committed")
	}
}

// TestFailureWithoutAText is one all the same.
func TestFailureWithoutAText(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	texts := map[string]string{"a": "", "b": "\x00"}
	r := run(t, config{table: tab, channel: channel}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error { return errors.New(texts[n.Payload]) }))
	for payload := range texts {
		insert(t, testkit.DB(t), tab, channel, payload)
	}
	testkit.Eventually(t, "not given up", func() bool { return stat(r, "pglistener_items_total", "failed") == 2 })
	var told int
	if err := testkit.DB(t).QueryRow(`select count(*) from "` + tab + `" where failed_at is not null and last_error <> ''`).Scan(&told); err != nil || told != 2 {
		t.Errorf("%d rows say that they have failed: %v", told, err)
	}
}

// TestSlowCountLetsClaimsHaveATurn: what it takes is known also when it was given up.
func TestSlowCountLetsClaimsHaveATurn(t *testing.T) {
	t.Parallel()
	r := &Outbox{store: store{db: testkit.DB(t), timeout: time.Second}}
	var err error
	if r.store.table, err = parseTable(outboxTable(t, testkit.DB(t))); err != nil {
		t.Fatal(err)
	}
	unlock := lock(t, r.store.table.name, "")
	if _, err := r.count(true); err == nil {
		t.Fatal("counted although the table is locked")
	}
	if next, err := r.count(true); err != nil || next < 9*r.store.timeout || next > 20*r.store.timeout {
		t.Errorf("the next one is in %v: %v", next, err)
	}
	unlock()
}

// TestClaimsThatTakeLong: rows that come later than they may be begun are given back once, and not for ever.
func TestClaimsThatTakeLong(t *testing.T) {
	t.Parallel()
	db, channel, tab := testkit.DB(t), testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	testkit.Exec(t, db, `create or replace function "`+tab+`_slow"() returns trigger language plpgsql
		as 'begin perform pg_sleep(1); return new; end'`)
	t.Cleanup(func() { _, _ = db.Exec(`drop function "` + tab + `_slow" cascade`) })
	testkit.Exec(t, db, `create trigger slow before update on "`+tab+`" for each row when (old.lease is null and new.lease is not null) execute function "`+tab+`_slow"()`)
	insert(t, db, tab, channel, "x")
	var left atomic.Int64 // of the lease, when the handler begins
	var lease time.Duration
	r := run(t, config{table: tab, tweak: func(o *Outbox) { o.margin, lease = 200*time.Millisecond, o.store.lease }},
		notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
			var seconds float64
			err := db.QueryRowContext(ctx, `select extract(epoch from leased_until - clock_timestamp())::float8 from "`+tab+`"`).Scan(&seconds)
			left.Store(int64(seconds * float64(time.Second)))
			return err
		}))
	emptied(t, db, tab)
	if got := time.Duration(left.Load()); got < lease {
		t.Errorf("%v of the lease are left, want %v at least, although the claim took longer than it may", got, lease)
	}
	r.stop()
	if back := stat(r, "pglistener_items_total", "given_back"); back < 1 || back > 3 { // 1, on a machine that is not busy
		t.Errorf("%v rows were given back, want 1", back)
	}
}

// TestClaimerGoesOnAfterRowsHaveExpired: rows that were given back before a worker took them leave no claimer that waits for a slot.
func TestClaimerGoesOnAfterRowsHaveExpired(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	r := run(t, config{table: tab, tweak: func(o *Outbox) { o.margin = 400 * time.Millisecond }}, s)
	testkit.Eventually(t, "never counted", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return !r.counts.counted.IsZero() })
	r.mu.Lock()
	r.buffer = []job{{id: -1, until: "now", claimed: time.Now().Add(-time.Hour)}} // and no worker has been told
	r.mu.Unlock()
	r.poke() // the claimer sees no room
	testkit.Eventually(t, "the row is not given back", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.buffer) == 0 })
	insert(t, testkit.DB(t), tab, channel, "x")
	emptied(t, testkit.DB(t), tab)
	if got := s.payloads(); len(got) != 1 || got[0] != "x" {
		t.Errorf("handled %v", got)
	}
}
