//go:build unix

package outbox

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// heldBack is an outbox of which dead rows cannot be removed, because a session holds a snapshot that may still see them.
func heldBack(t *testing.T, c config) (server *pgtest.Server, db *sql.DB, r *running, s *seen, release func()) {
	t.Helper()
	server = testkit.OwnServer(t, "autovacuum = off", "log_statement = all")
	db = testkit.Open(t, server.DSN())
	makeOutbox(t, db, "outbox")
	testkit.Exec(t, db, `create role worker login; grant select, insert, update, delete on outbox to worker`)
	holder, err := testkit.Open(t, testkit.WithParams(server.DSN(), "application_name", "nightly report")).Begin()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := holder.Exec("set transaction isolation level repeatable read; select 1"); err != nil {
		t.Fatal(err)
	}
	testkit.Exec(t, db, `alter table outbox disable trigger user`)
	testkit.Exec(t, db, `insert into outbox (channel, payload, run_at) select $1, '', now() - interval '1 hour' + n * interval '1 ms' from generate_series(1, 200000) n`, c.channel)
	testkit.Exec(t, db, `delete from outbox`)
	testkit.Exec(t, db, `alter table outbox enable trigger user`)
	testkit.Exec(t, db, `analyze outbox`) // as autovacuum does: the table looks empty to the planner
	c.dsn, s = testkit.WithUser(server.DSN(), "worker", ""), &seen{}
	return server, db, run(t, c, s), s, func() {
		_ = holder.Rollback()
		testkit.Exec(t, db, "vacuum outbox")
	}
}

// claims are how many the server has been asked for.
func claims(server *pgtest.Server) (c struct{ short, whole, steered int }) {
	for line := range strings.Lines(server.Log()) {
		switch {
		case strings.Contains(line, steer):
			c.steered++
		case !strings.Contains(line, "$6 = "): // not of a claim
		case strings.Contains(line, "$5 = '-infinity'"):
			c.whole++
		default:
			c.short++
		}
	}
	return c
}

func (s *seen) wait(t *testing.T, payload string) (took time.Duration) {
	t.Helper()
	began := time.Now()
	testkit.Eventually(t, payload+" is handled", func() bool { return slices.Contains(s.payloads(), payload) })
	return time.Since(began)
}

// TestWhoKeepsDeadRows: a person may end the session that is named, so it must be one that keeps dead rows, and neither the vacuum that
// removes them nor a report in another database.
func TestWhoKeepsDeadRows(t *testing.T) {
	t.Parallel()
	server := testkit.OwnServer(t, "autovacuum = off")
	db := testkit.Open(t, server.DSN())
	testkit.Exec(t, db, "create database other")
	testkit.Exec(t, db, "create table kept (n int)")
	testkit.Exec(t, db, "insert into kept select generate_series(1, 20000)")
	elsewhere, err := url.Parse(server.DSN())
	if err != nil {
		t.Fatal(err)
	}
	elsewhere.Path = "/other"
	testkit.Exec(t, testkit.Open(t, elsewhere.String()), "create table kept (n int)")
	for _, c := range []struct {
		who, dsn, begin, do string
		keeps               bool
	}{
		{"reader", server.DSN(), "begin isolation level repeatable read", "select count(*) from kept", true},
		{"writer", server.DSN(), "begin", "insert into kept values (0)", true},
		{"reader elsewhere", elsewhere.String(), "begin isolation level repeatable read", "select count(*) from kept", false},
		{"writer elsewhere", elsewhere.String(), "begin isolation level repeatable read", "insert into kept values (0)", true},
		{"vacuum", server.DSN(), "set vacuum_cost_delay = 100; set vacuum_cost_limit = 1", "vacuum kept", false}, // it takes ten seconds
	} {
		sessions := testkit.Open(t, testkit.WithParams(c.dsn, "application_name", c.who))
		session, err := sessions.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := session.ExecContext(t.Context(), c.begin); err != nil {
			t.Fatal(err)
		}
		ctx, end := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { _, err := session.ExecContext(ctx, c.do); done <- err }()
		if c.who == "vacuum" {
			testkit.Eventually(t, "no vacuum at work", func() (at bool) {
				err := db.QueryRow("select exists (select from pg_stat_activity a join pg_stat_progress_vacuum using (pid) where backend_xmin is not null)").Scan(&at)
				return err == nil && at
			})
		} else if err := <-done; err != nil {
			t.Fatal(err)
		}
		var who, snapshot string
		if err := db.QueryRow(statement("holder")).Scan(&who, &snapshot); err != nil {
			t.Fatal(err)
		}
		if !c.keeps && who != "" || c.keeps && !strings.HasSuffix(who, ", "+c.who) || (who == "") != (snapshot == "") {
			t.Errorf("%s: %q %q is named", c.who, who, snapshot)
		}
		end()
		_, _ = session.Close(), sessions.Close() // which ends what it has begun
		testkit.Eventually(t, c.who+" is still there", func() (gone bool) {
			err := db.QueryRow("select not exists (select from pg_stat_activity where application_name = $1 and coalesce(backend_xid, backend_xmin) is not null)", c.who).Scan(&gone)
			return err == nil && gone
		})
	}
}

// TestDeadRowsAreReadOnce: while a snapshot keeps dead rows from being removed, a claim reads none of those that were read before,
// and what is committed late, given back, or left by a replica that died is found all the same. Who holds the snapshot is named.
func TestDeadRowsAreReadOnce(t *testing.T) {
	server, db, r, s, release := heldBack(t, config{channel: "flat", table: "outbox"})
	late := func() *sql.Tx { // a row of a transaction that begins now
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(`insert into outbox (channel, payload) values ('flat', 'late')`); err != nil {
			t.Fatal(err)
		}
		return tx
	}
	tx := late()
	testkit.Eventually(t, "somebody is named who holds a snapshot", func() bool {
		insert(t, db, "outbox", "flat", "row")
		return len(r.All("claims are slow because dead rows cannot be removed: somebody holds a snapshot that might still see them")) == 1
	})
	if text := r.String(); !strings.Contains(text, "nightly report") {
		t.Errorf("the holder is not named: %s", text)
	}
	testkit.Eventually(t, "the metric does not say so", func() bool { return stat(r, "pglistener_outbox_vacuum_held_back", "") == 1 })

	// Of the claims of twenty rows, all but one in two seconds begin where the last one ended.
	began := time.Now()
	before := claims(server)
	for i := range 20 {
		payload := "row " + strconv.Itoa(i)
		insert(t, db, "outbox", "flat", payload)
		s.wait(t, payload)
	}
	if after, looks := claims(server), int(time.Since(began)/scanPause)+1; after.short-before.short < 20 || after.whole-before.whole > looks || after.steered-before.steered < after.short-before.short {
		t.Errorf("of the claims of twenty rows %d began where the last one ended, and %d read everything; %d statements were steered",
			after.short-before.short, after.whole-before.whole, after.steered-before.steered)
	}

	// A claim where the last one ended.
	at := func() (from place) {
		testkit.Exec(t, db, `insert into outbox (channel, payload) values ('flat', 'at')`)
		s.wait(t, "at")
		err := db.QueryRow(`select now() - interval '1 second'`).Scan(&from.runAt)
		if err != nil {
			t.Fatal(err)
		}
		return from
	}()
	reads := func(from place) (claim, next int) {
		runAt, id := from.args()
		return buffers(t, r.store, statement("claim"), r.channel, 1, 60, r.store.owner, runAt, id, 1_000_000), buffers(t, r.store, statement("next"), r.channel, runAt, id)
	}
	all, allNext := reads(place{})
	if few, fewNext := reads(at); few > 200 || fewNext > 200 || all < 10*few || allNext < 10*fewNext {
		t.Errorf("a claim reads %d buffers and the look after it %d; when they begin where the last ones ended, %d and %d", all, allNext, few, fewNext)
	}

	// What is not where the last claim ended is found by the next look at everything: a claim and the look after it, whose cost now
	// is the measure, for other tests run on these processors.
	found := func(payload, how string, due time.Duration) {
		took := s.wait(t, payload)
		began := time.Now()
		reads(place{})
		if bound := due + max(scanPause, 2*scanBalance*time.Since(began)) + 5*time.Second; took > bound {
			t.Errorf("%s was found after %v, more than %v", how, took, bound)
		}
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	found("late", "a row that was committed late", 0)
	testkit.Exec(t, db, `insert into outbox (channel, payload, run_at, attempts, lease, leased_until)
		values ('flat', 'lease', now() - interval '1 minute', 1, gen_random_uuid(), now() + interval '1 second')`)
	found("lease", "a row whose lease had ended", time.Second)

	// Transactions commit out of order: what has become due just now is read wherever the last claim ended.
	testkit.Eventually(t, "a claim of what has just become due", func() bool {
		insert(t, db, "outbox", "other", "row")
		other := r.store
		other.channel = "other"
		jobs, _, err := other.claim(1, place{runAt: time.Now().Add(time.Hour)}, 0)
		return err == nil && len(jobs) == 1
	})

	// A holder is believed when it has been seen twice, and named once.
	var p Pool
	for i, want := range []bool{false, false, true, true, false} {
		held, err := p.findHolder(r.store, r.log)
		if held != want || err != nil {
			t.Errorf("asked %d times: held %v, error %v", i+1, held, err)
		}
		if i > 0 {
			p.asked = time.Time{}
		}
		if i == 3 {
			p.snapshot = "another"
		}
	}
	if n := len(r.All("claims are slow")); n != 2 {
		t.Errorf("two pools have named the holder %d times", n)
	}

	release()
	for deadline := time.Now().Add(time.Minute); stat(r, "pglistener_outbox_vacuum_held_back", "") != 0; s.wait(t, "again") {
		if time.Now().After(deadline) {
			t.Fatal("nobody holds a snapshot, and a minute later that is not known")
		}
		insert(t, db, "outbox", "flat", "again")
	}
}

// TestLooksAtEverythingAgain: when claims are dear, an idle outbox looks at everything once more, and then every half a minute.
func TestLooksAtEverythingAgain(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		scan scan
		want time.Duration
	}{
		{scan{looked: now}, time.Hour},
		{scan{looked: now, dear: true}, 30 * time.Second},
		{scan{looked: now, dear: true, cost: 5 * time.Second}, 50 * time.Second},
		{scan{looked: now, dear: true, owing: true}, 2 * time.Second},
		{scan{looked: now, dear: true, owing: true, cost: time.Second}, 10 * time.Second},
		{scan{looked: now.Add(-time.Minute), dear: true, owing: true}, 0},
	} {
		if got := c.scan.again(); got > c.want || got < c.want-time.Second {
			t.Errorf("%+v: again in %v, want %v", c.scan, got, c.want)
		}
	}
}

// buffers is how many a statement reads of which the parameters are these. They go in as literals: EXPLAIN takes none in the binary
// protocol.
func buffers(t *testing.T, s store, query string, params ...any) (n int) {
	t.Helper()
	tx, err := s.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	if _, err := tx.Exec(steer); err != nil {
		t.Fatal(err)
	}
	query = s.table.sql(query)
	for i, v := range slices.Backward(params) {
		if at, ok := v.(time.Time); ok {
			v = at.Format(time.RFC3339Nano)
		}
		query = strings.ReplaceAll(query, "$"+strconv.Itoa(i+1), pq.QuoteLiteral(fmt.Sprint(v)))
	}
	var plan []byte
	if err := tx.QueryRow("explain (analyze, buffers, format json) " + query).Scan(&plan); err != nil {
		t.Fatal(err)
	}
	var plans []struct {
		Plan struct {
			Hit  int `json:"Shared Hit Blocks"`
			Read int `json:"Shared Read Blocks"`
		}
	}
	if err := json.Unmarshal(plan, &plans); err != nil {
		t.Fatal(err)
	}
	return plans[0].Plan.Hit + plans[0].Plan.Read
}

// TestStatementsUnderLoad: results are gathered, and not every claim is followed by the question when the next row is due.
func TestStatementsUnderLoad(t *testing.T) {
	t.Parallel()
	server := testkit.OwnServer(t, "log_statement = all")
	db := testkit.Open(t, server.DSN())
	makeOutbox(t, db, "outbox")
	r := run(t, config{dsn: server.DSN(), table: "outbox"}, notify.HandlerFunc(func(context.Context, notify.Notification) error { return nil }))
	insert(t, db, "outbox", r.channel, "first")
	emptied(t, db, "outbox")
	statements := func() (writes, questions int) {
		log := server.Log()
		return strings.Count(log, "-- Deletes the rows"), strings.Count(log, "-- When the next row")
	}
	writes, questions := statements()
	began := time.Now()
	for range 500 {
		insert(t, db, "outbox", r.channel, "x")
	}
	emptied(t, db, "outbox")
	took := time.Since(began)
	afterWrites, afterQuestions := statements()
	if n, most := afterWrites-writes, int(took/gather)+2; n > most || n < 1 {
		t.Errorf("500 results were written by %d statements in %v, want %d at most", n, took, most)
	}
	// A row that comes between a claim of nothing and the question has it asked once more.
	if n, most := afterQuestions-questions, 2*int(took/askPause)+2; n > most {
		t.Errorf("it was asked %d times in %v when the next row is due, want %d at most", n, took, most)
	}
	// What somebody has locked is asked for less and less often.
	r.stop()
	insert(t, db, "outbox", r.channel, "locked")
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	if _, err := tx.Exec("select from outbox for update"); err != nil {
		t.Fatal(err)
	}
	_, afterQuestions = statements()
	began = time.Now()
	run(t, config{dsn: server.DSN(), table: "outbox"}, &seen{})
	testkit.Eventually(t, "it does not ask", func() bool { _, questions = statements(); return questions-afterQuestions >= 6 })
	if took := time.Since(began); took < time.Second {
		t.Errorf("it asked 6 times in %v for a row that is locked", took)
	}
}

// TestQuestionIsLeftOut only where it can be: not while somebody holds a snapshot, and not when large rows have cut a claim short, after
// which there are more.
func TestQuestionIsLeftOut(t *testing.T) {
	t.Parallel()
	tab, channel := outboxTable(t, testkit.DB(t)), testkit.ChannelName(t)
	o, err := New(&seen{}, new(Pool), Options{
		Settings: Settings{Table: tab, Attempts: 1}, Limits: call.Limits{Concurrency: 1, Timeout: time.Second}, DSN: testkit.DSN(t), Timeout: 5 * time.Second, Memory: 1 << 20,
	}, notify.Setup{Channel: channel, Log: testkit.NewLogs(t).Logger()})
	if err != nil {
		t.Fatal(err)
	}
	defer o.pool.release(channel)
	o.hire = func() {}
	soon := time.Now().Add(time.Hour) // as if it had been asked just now
	look := func(held bool) (claimed int, next time.Duration, asked bool) {
		t.Helper()
		o.scan.asked, o.scan.held, o.scan.dear = soon, held, true
		claimed, next, err := o.look(10, false)
		if err != nil {
			t.Fatal(err)
		}
		return claimed, next, !o.scan.asked.Equal(soon)
	}
	if claimed, next, asked := look(false); claimed != 0 || next < 50*time.Minute || asked || !o.scan.dear {
		t.Errorf("an idle channel: %d claimed, next in %v, asked: %v; claims are dear, as before: %v", claimed, next, asked, o.scan.dear)
	}
	if _, next, asked := look(true); next < 50*time.Minute || !asked {
		t.Errorf("while a snapshot is held: next in %v, asked: %v", next, asked)
	}
	testkit.Eventually(t, "the server says that claims are not dear, and it is not believed", func() bool {
		look(true)
		return !o.scan.dear
	})
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload) select $1, repeat('x', 300000) from generate_series(1, 8)`, channel)
	for range 2 {
		if claimed, next, asked := look(false); claimed != 4 || next > 0 || o.scan.drained {
			t.Errorf("large rows: %d claimed, next in %v, asked: %v, drained: %v", claimed, next, asked, o.scan.drained)
		}
	}
	// Of a claim that is full the server is not asked: it was dear if it took long.
	fill(t, tab, channel, 20)
	for _, slow := range []bool{false, true} {
		if slow {
			time.AfterFunc(200*time.Millisecond, lock(t, tab, ""))
		}
		o.scan.dear = !slow
		if claimed, _, err := o.look(10, false); err != nil || claimed != 10 || slow && !o.scan.dear {
			t.Errorf("%d claimed, %v; dear: %v", claimed, err, o.scan.dear)
		}
	}
}

// TestRowThatIsDueSoonUnderLoad: that the server was asked just now what is due next makes nothing late for long.
func TestRowThatIsDueSoonUnderLoad(t *testing.T) {
	t.Parallel()
	tab, s := outboxTable(t, testkit.DB(t)), &seen{}
	r := run(t, config{table: tab}, s)
	for i := range 20 {
		name := strconv.Itoa(i)
		insert(t, testkit.DB(t), tab, r.channel, "now "+name)
		s.wait(t, "now "+name)
		testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload, run_at) values ($1, $2, now() + interval '30 ms')`, r.channel, "soon "+name)
		if took := s.wait(t, "soon "+name); took > 2*time.Second {
			t.Errorf("a row that was due in 30 ms was begun after %v", took)
		}
	}
}
