// feature: schedule

//go:build unix

package outbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/retry"
	"github.com/pglistener/pglistener/internal/schedule"
)

// The tests of rows with a schedule or a key.

// next is the Next that the program has, in UTC whatever TZ is.
func next(text string, nominal, now time.Time) (time.Time, error) {
	if !strings.HasPrefix(text, "CRON_TZ=") {
		text = "CRON_TZ=UTC " + text
	}
	return schedule.Next(text, nominal, now)
}

// runScheduled is run with schedules.
func runScheduled(t *testing.T, c config, h notify.Handler) *running {
	t.Helper()
	c.next = next
	return run(t, c, h)
}

// row is what stands in the table.
type row struct {
	attempts          int
	runAt             time.Time
	event             string
	payload, lastText string
	failed            bool
}

func theRow(t *testing.T, tab, where string, args ...any) (r row) {
	t.Helper()
	var text sql.NullString
	err := testkit.DB(t).QueryRow(`select attempts, run_at, event_id, payload, last_error, failed_at is not null from "`+tab+`" where `+where, args...).
		Scan(&r.attempts, &r.runAt, &r.event, &r.payload, &text, &r.failed)
	if err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	r.lastText = text.String
	return r
}

func addSchedule(t *testing.T, tab, channel, text string) {
	t.Helper()
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload, schedule) values ($1, 'p', $2)`, channel, text)
}

// planned waits until a row's first time is found.
func planned(t *testing.T, tab string) {
	t.Helper()
	testkit.Eventually(t, "its first time is not found", func() bool {
		var n int
		err := testkit.DB(t).QueryRow(`select count(*) from "` + tab + `" where attempts = 0 and lease is null and run_at > now()`).Scan(&n)
		return err == nil && n == 1
	})
}

func TestScheduledRowRunsAtItsTimes(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	runScheduled(t, config{table: tab}, s)
	inserted := time.Now()
	addSchedule(t, tab, channel, "@every 2s")
	planned(t, tab)
	first := theRow(t, tab, "true")
	if after := first.runAt.Sub(inserted); after < time.Second || after > 3*time.Second {
		t.Errorf("its first time is %v after it was inserted, want 2 s", after)
	}
	if n := len(s.payloads()); n != 0 {
		t.Errorf("it ran at its insertion")
	}
	testkit.Eventually(t, "it does not run again and again", func() bool { return len(s.payloads()) == 3 })
	ids := map[string]bool{}
	for i, n := range s.list {
		ids[n.ID()] = true
		if want := first.runAt.Add(time.Duration(i) * 2 * time.Second); !n.RunAt.Equal(want) || n.Attempt != 1 {
			t.Errorf("run %d: for %v at attempt %d, want %v", i, n.RunAt, n.Attempt, want)
		}
	}
	if len(ids) != 3 {
		t.Errorf("%d ids for three runs", len(ids))
	}
	if n := rowCount(t, testkit.DB(t), tab); n != 1 {
		t.Errorf("%d rows", n)
	}
}

// Times that were missed are made up for once, and the next is in the future.
func TestMissedTimesAreMadeUpForOnce(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	addSchedule(t, tab, channel, "0 * * * *")
	testkit.Exec(t, testkit.DB(t), `update "`+tab+`" set attempts = 0, run_at = date_trunc('hour', now()) - interval '30 hours'`)
	runScheduled(t, config{table: tab}, s)
	testkit.Eventually(t, "what was missed is not made up for", func() bool { return theRow(t, tab, "true").runAt.After(time.Now()) })
	if n := len(s.payloads()); n != 1 {
		t.Errorf("made up for %d times", n)
	}
	if r := theRow(t, tab, "true"); r.runAt.UTC().Minute() != 0 || time.Until(r.runAt) > time.Hour {
		t.Errorf("next at %v", r.runAt)
	}
	if at := s.list[0].RunAt; time.Since(at) < 29*time.Hour {
		t.Errorf("told that it is the run of %v", at)
	}
}

// A run that fails is tried again, at its nominal time; one that is given up leaves a copy, and the schedule goes on.
func TestScheduledRowThatFails(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	var mu sync.Mutex
	var runs []notify.Notification
	runScheduled(t, config{table: tab, attempts: 3}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		mu.Lock()
		defer mu.Unlock()
		runs = append(runs, n)
		return errors.New("no report today")
	}))
	addSchedule(t, tab, channel, "0 3 * * *")
	planned(t, tab)
	testkit.Exec(t, testkit.DB(t), `update "`+tab+`" set run_at = date_trunc('minute', now())`)
	before := theRow(t, tab, "true")
	testkit.Send(t, channel, "")
	testkit.Eventually(t, "no failed copy is left", func() bool { return rowCount(t, testkit.DB(t), tab) == 2 })
	gone, next := theRow(t, tab, "failed_at is not null"), theRow(t, tab, "failed_at is null")
	if gone.event != before.event || gone.lastText != "no report today" || gone.attempts != 3 || gone.payload != "p" {
		t.Errorf("the copy is %+v, the run was %+v", gone, before)
	}
	if next.event == before.event || next.attempts != 0 || next.runAt.UTC().Hour() != 3 || !next.runAt.After(time.Now()) {
		t.Errorf("the schedule goes on with %+v", next)
	}
	mu.Lock()
	defer mu.Unlock()
	for i, n := range runs {
		if n.ID() != before.event || n.Attempt != i+1 || !n.RunAt.Equal(before.runAt) {
			t.Errorf("attempt %d: %+v, want the id %s and the time %v", i+1, n, before.event, before.runAt)
		}
	}
}

func TestScheduleThatCannotBeReadFailsItsRow(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := runScheduled(t, config{table: tab}, &seen{})
	for text, want := range map[string]string{"0 25 * * *": "25", "every day": `schedule "every day"`, "0 0 30 2 *": "never comes"} {
		addSchedule(t, tab, channel, text)
		testkit.Eventually(t, text+" has not failed", func() bool {
			var n int
			err := testkit.DB(t).QueryRow(`select count(*) from "`+tab+`" where schedule = $1 and failed_at is not null and position($2 in last_error) > 0`, text, want).Scan(&n)
			return err == nil && n == 1
		})
	}
	r.Wait(t, "gave up", 3)
	if n := len(r.All("gave up")); n != 3 {
		t.Errorf("%d of three in the log", n)
	}
}

// Three replicas run each time once when nothing fails.
func TestReplicasRunEachTimeOnce(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	times := map[time.Time]int{}
	var mu sync.Mutex
	for range 3 {
		runScheduled(t, config{table: tab}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
			mu.Lock()
			defer mu.Unlock()
			times[n.RunAt]++
			return nil
		}))
	}
	addSchedule(t, tab, channel, "@every 1s")
	testkit.Eventually(t, "it does not run five times", func() bool { mu.Lock(); defer mu.Unlock(); return len(times) >= 5 })
	mu.Lock()
	defer mu.Unlock()
	for at, n := range times {
		if n != 1 {
			t.Errorf("the run of %v was made %d times", at, n)
		}
	}
}

// A replica that falls silent in the middle of a run is replaced when its lease ends.
func TestSilentReplicaIsReplaced(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	gate, began := make(chan struct{}), make(chan struct{}, 1)
	silent := runScheduled(t, config{dsn: dsn, table: tab, tweak: func(o *Outbox) { o.store.lease = 2 * time.Second }},
		notify.HandlerFunc(func(ctx context.Context, _ notify.Notification) error {
			began <- struct{}{}
			select {
			case <-gate:
			case <-ctx.Done():
			}
			return nil
		}))
	defer close(gate)
	addSchedule(t, tab, channel, "@every 1s")
	<-began
	proxy.Silence()
	var others [2]atomic.Int64
	for i := range others {
		runScheduled(t, config{table: tab}, notify.HandlerFunc(func(context.Context, notify.Notification) error { others[i].Add(1); return nil }))
	}
	testkit.Eventually(t, "nobody takes over", func() bool { return others[0].Load()+others[1].Load() >= 2 })
	_ = silent
}

const upsert = `insert into "%s" (channel, key, payload) values ($1, $2, $3)
	on conflict (channel, key) where failed_at is null do update set payload = excluded.payload, run_at = excluded.run_at`

// However often a key is upserted while its row is handled, it is handled once more, with the last payload.
func TestUpsertsDuringARunLeaveOneMore(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	gate, began := make(chan struct{}), make(chan struct{}, 10)
	runScheduled(t, config{table: tab, concurrency: 4}, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		began <- struct{}{}
		if n.Payload == "0" {
			<-gate
		}
		return s.Handle(ctx, n)
	}))
	put := func(payload int) {
		testkit.Exec(t, testkit.DB(t), fmt.Sprintf(upsert, tab), channel, "customer 7", fmt.Sprint(payload))
	}
	put(0)
	<-began
	for i := range 1000 {
		put(i + 1)
	}
	if n := len(began); n > 0 {
		t.Errorf("%d more runs began while the first one ran", n)
	}
	close(gate)
	emptied(t, testkit.DB(t), tab)
	got := s.payloads()
	if strings.Join(got, " ") != "0 1000" {
		t.Errorf("handled %v, want 0 and 1000", got)
	}
	if s.list[0].ID() == s.list[1].ID() || s.list[1].Attempt != 1 {
		t.Errorf("the changed payload is no new event: %+v", s.list)
	}
}

// Upserts that wait are one, and another key or channel is another row.
func TestUpsertsDebounce(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	for i := range 100 {
		testkit.Exec(t, testkit.DB(t), fmt.Sprintf(upsert, tab), channel, fmt.Sprint(i%2), fmt.Sprint(i))
	}
	runScheduled(t, config{table: tab}, s)
	emptied(t, testkit.DB(t), tab)
	if n := len(s.payloads()); n != 2 {
		t.Errorf("handled %d, want 2", n)
	}
	// And by notification, for an upsert that updates has no inserted rows to ring for.
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, key, payload, run_at) values ($1, 'k', 'later', now() + interval '1 hour')`, channel)
	testkit.Exec(t, testkit.DB(t), fmt.Sprintf(upsert, tab), channel, "k", "now")
	emptied(t, testkit.DB(t), tab)
}

// An open transaction that has upserted a row does not hold up the results of the others.
func TestOpenUpsertHoldsUpNobody(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	gate := make(chan struct{})
	runScheduled(t, config{table: tab, concurrency: 4}, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		if n.Payload == "held" {
			<-gate
		}
		return s.Handle(ctx, n)
	}))
	testkit.Exec(t, testkit.DB(t), fmt.Sprintf(upsert, tab), channel, "k", "held")
	testkit.Eventually(t, "not begun", func() bool { return theRow(t, tab, "true").attempts == 1 })
	tx, err := testkit.DB(t).Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	if _, err := tx.Exec(fmt.Sprintf(upsert, tab), channel, "k", "changed"); err != nil {
		t.Fatal(err)
	}
	close(gate)
	for i := range 100 {
		insert(t, testkit.DB(t), tab, channel, fmt.Sprint(i))
		testkit.Exec(t, testkit.DB(t), fmt.Sprintf(upsert, tab), channel, fmt.Sprint("other", i), "x")
	}
	testkit.Eventually(t, "results wait for an open transaction", func() bool { return rowCount(t, testkit.DB(t), tab) == 1 })
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	emptied(t, testkit.DB(t), tab)
	if got := s.payloads(); got[len(got)-1] != "changed" {
		t.Errorf("the change was not handled: last %s", got[len(got)-1])
	}
}

// The row of NAME_SCHEDULE is there once whatever the number of replicas, follows the variable, and goes with it.
func TestConfiguredScheduleIsKept(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	a := runScheduled(t, config{table: tab, schedule: "0 3 * * *"}, &seen{})
	runScheduled(t, config{table: tab, schedule: "0 3 * * *"}, &seen{})
	kept := func(text string) {
		t.Helper()
		testkit.Eventually(t, "no row with "+text, func() bool {
			var n int
			err := testkit.DB(t).QueryRow(`select count(*) from "`+tab+`" where channel = $1 and schedule = $2 and attempts = 0 and run_at > now()`, channel, text).Scan(&n)
			return err == nil && n == 1
		})
		if n := rowCount(t, testkit.DB(t), tab); n != 1 {
			t.Errorf("%d rows", n)
		}
	}
	kept("0 3 * * *")
	a.stop()
	testkit.Exec(t, testkit.DB(t), `delete from "`+tab+`"`)
	a = runScheduled(t, config{table: tab, schedule: "0 3 * * *"}, &seen{})
	kept("0 3 * * *")
	a.stop()
	a = runScheduled(t, config{table: tab, schedule: "30 4 * * *"}, &seen{})
	kept("30 4 * * *")
	a.stop()
	runScheduled(t, config{table: tab}, &seen{})
	emptied(t, testkit.DB(t), tab)
}

// The row of NAME_SCHEDULE that somebody has deleted is there again within a minute.
func TestDeletedScheduleComesBack(t *testing.T) {
	t.Parallel()
	tab := outboxTable(t, testkit.DB(t))
	r := runScheduled(t, config{table: tab, schedule: "0 3 * * *", tweak: func(o *Outbox) {
		o.kept = time.Now().Add(-59 * time.Second) // it was there, and is gone
	}}, &seen{})
	testkit.Eventually(t, "it does not come back", func() bool {
		_ = r.CatchUp(t.Context()) // the sweep
		return rowCount(t, testkit.DB(t), tab) == 1
	})
}

// TestUpgradeInPlace starts from the table as it was, with rows in it, while the program as it was goes on.
func TestOldClaimsAndNewOnesLoseNothing(t *testing.T) {
	t.Parallel()
	db, tab, channel, s := testkit.DB(t), testkit.ChannelName(t), testkit.ChannelName(t), &seen{}
	dropLater(t, db, tab)
	old, err := os.ReadFile("testdata/schema-1.0.sql")
	if err != nil {
		t.Fatal(err)
	}
	names, err := parseTable(tab)
	if err != nil {
		t.Fatal(err)
	}
	testkit.Exec(t, db, names.sql(string(old)))
	const total = 400
	fill(t, tab, channel, total)
	makeOutbox(t, db, tab)
	stop := make(chan struct{})
	var oldOnes sync.WaitGroup
	oldOnes.Go(func() { // claims and completes as the program before did
		for {
			select {
			case <-stop:
				return
			default:
			}
			rows, err := db.Query(names.sql(`with due as materialized (
				select ctid as place from {table} where channel = $1 and failed_at is null and run_at <= now()
				order by run_at, id limit 5 for update skip locked)
				update {table} o set attempts = attempts + 1, run_at = now() + interval '2 seconds' from due where o.ctid = due.place
				returning o.id, o.payload, o.attempts`), channel)
			if err != nil {
				t.Errorf("the old claim: %v", err)
				return
			}
			type claimed struct {
				id       int64
				payload  string
				attempts int
			}
			var all []claimed
			for rows.Next() {
				var c claimed
				if err := rows.Scan(&c.id, &c.payload, &c.attempts); err != nil {
					t.Error(err)
				}
				all = append(all, c)
			}
			rows.Close()
			for _, c := range all {
				_ = s.Handle(context.Background(), notify.Notification{Payload: c.payload})
				if _, err := db.Exec(names.sql("delete from {table} where id = $1 and attempts = $2"), c.id, c.attempts); err != nil {
					t.Error(err)
				}
			}
		}
	})
	r := runScheduled(t, config{table: tab, concurrency: 4, attempts: 20, tweak: func(o *Outbox) {
		o.store.lease, o.retry = 2*time.Second, retry.Backoff{Min: time.Millisecond, Max: time.Millisecond}
	}}, s)
	emptied(t, db, tab)
	close(stop)
	oldOnes.Wait()
	handled := map[string]bool{}
	for _, p := range s.payloads() {
		handled[p] = true
	}
	if len(handled) != total {
		t.Errorf("%d of %d were handled", len(handled), total)
	}
	_ = r
}

// TestLockedScheduleHoldsUpNoClaim: that the row of NAME_SCHEDULE is there can be seen without its lock.
func TestLockedScheduleHoldsUpNoClaim(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	next := func(string, time.Time, time.Time) (time.Time, error) { return time.Now().Add(time.Hour), nil }
	r := run(t, config{table: tab, channel: channel, schedule: "@hourly", next: next}, s)
	testkit.Eventually(t, "its first time is not found", func() bool {
		var n int
		return testkit.DB(t).QueryRow(`select count(*) from "`+tab+`" where run_at > now()`).Scan(&n) == nil && n == 1
	})
	r.stop()
	lock(t, tab, "key is not null")
	insert(t, testkit.DB(t), tab, channel, "x")
	again := run(t, config{table: tab, channel: channel, schedule: "@hourly", next: next}, s)
	testkit.Eventually(t, "the locked row holds up the other", func() bool { return len(s.payloads()) == 1 })
	if err := again.Ready(); err != nil {
		t.Error(err)
	}
}

// TestOneResultHoldsUpNoOther: what the server refuses of one row, for want of a right, is tried again beside the others.
func TestOneResultHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	db, channel, tab := testkit.DB(t), testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	dsn := userWith(t, tab, "select, update, delete")
	for payload, attempts := range map[string]int{"refused": 1, "fails once": 0} {
		testkit.Exec(t, db, `insert into "`+tab+`" (channel, payload, schedule) values ($1, $2, '@every 1h')`, channel, payload)
		testkit.Exec(t, db, `update "`+tab+`" set attempts = $2, run_at = now() - interval '1 minute' where payload = $1`, payload, attempts)
	}
	r := runScheduled(t, config{dsn: dsn, table: tab, attempts: 2}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		if n.Payload == "refused" || n.Payload == "fails once" && n.Attempt == 1 {
			return errors.New("no")
		}
		return nil
	}))
	line := r.Wait(t, "results of the outbox cannot be written", 1)
	if !strings.Contains(fmt.Sprint(line["hint"]), "insert") {
		t.Errorf("%v", line)
	}
	insert(t, db, tab, channel, "a")
	testkit.Exec(t, db, `insert into "`+tab+`" (channel, payload, key) values ($1, 'b', 'b')`, channel)
	rowsAre(t, tab, "schedule is null", 0)
	rowsAre(t, tab, "payload = 'fails once' and run_at > now() + interval '1 minute'", 1)
	if err := r.Ready(); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("a result cannot be written, and Ready says %v", err)
	}
	testkit.Exec(t, db, `grant insert on "`+tab+`" to public`)
	testkit.Eventually(t, "it is not written although the right is there", func() bool { return r.Ready() == nil && rowCount(t, db, tab) == 3 })
}

// TestOnlyTheNewestResultOfARowCounts: a row is claimed again when its lease has ended, while its result waits to be written.
func TestOnlyTheNewestResultOfARowCounts(t *testing.T) {
	t.Parallel()
	db, channel, tab := testkit.DB(t), testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	dsn := userWith(t, tab, "select, update, delete")
	testkit.Exec(t, db, `insert into "`+tab+`" (channel, payload, schedule) values ($1, 'p', '@every 1h')`, channel)
	testkit.Exec(t, db, `update "`+tab+`" set attempts = 0, run_at = now() - interval '1 minute'`)
	var runs atomic.Int64
	r := runScheduled(t, config{dsn: dsn, table: tab, attempts: 1, tweak: func(o *Outbox) { o.store.lease = 500 * time.Millisecond }},
		notify.HandlerFunc(func(context.Context, notify.Notification) error { runs.Add(1); return errors.New("no") }))
	testkit.Eventually(t, "it is not claimed again when its lease has ended", func() bool { return runs.Load() >= 4 })
	testkit.Exec(t, db, `grant insert on "`+tab+`" to public`)
	testkit.Eventually(t, "its result is not written", func() bool { return r.Ready() == nil && rowCount(t, db, tab) > 1 })
	r.stop()
	if n := rowCount(t, db, tab); n != 2 {
		t.Errorf("%d rows, want that of the schedule and one that has failed", n)
	}
	lost, failed := stat(r, "pglistener_items_total", "lease_lost"), stat(r, "pglistener_items_total", "failed")
	if failed != 1 || lost != float64(runs.Load())-1 {
		t.Errorf("of %d runs %v have failed and %v have lost their lease", runs.Load(), failed, lost)
	}
}
