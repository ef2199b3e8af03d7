//go:build unix

package outbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/retry"
)

// The tests of truth: Ready and the metrics say what becomes of the rows.

// stat is a figure, with a label's value if that is not "".
func stat(r *running, name, label string) (value float64) {
	for _, s := range r.Stats() {
		if s.Name == name && (label == "" || slices.Contains(s.Labels, label)) {
			value += s.Value + float64(s.Histogram.Count)
		}
	}
	return value
}

// refuseDeletes has a table refuse that rows are deleted, until mend is called.
func refuseDeletes(t *testing.T, tab string) (mend func()) {
	t.Helper()
	db := testkit.DB(t)
	testkit.Exec(t, db, `create or replace function "`+tab+`_no"() returns trigger language plpgsql
		as 'begin raise exception ''no deletes today''; end'`)
	testkit.Exec(t, db, `create trigger no before delete on "`+tab+`" for each row execute function "`+tab+`_no"()`)
	return func() { testkit.Exec(t, db, `drop trigger no on "`+tab+`"`) }
}

func TestNotReadyWhileTheTableCannotBeUsed(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	gate := make(chan struct{})
	r := run(t, config{table: tab}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		if n.Payload == "held" {
			<-gate
		}
		return nil
	}))
	db := testkit.DB(t)
	gone := func(away bool) {
		t.Helper()
		from, to := tab, tab+"_gone"
		if !away {
			from, to = to, from
		}
		testkit.Exec(t, db, `alter table "`+from+`" rename to "`+to+`"`)
	}
	if err := r.Ready(); err != nil {
		t.Fatalf("at the start: %v", err)
	}
	gone(true)
	_ = r.Handle(t.Context(), notify.Notification{}) // it is woken, and looks
	testkit.Eventually(t, "ready although the table cannot be read, or without a hint", func() bool {
		err := r.Ready()
		return err != nil && strings.Contains(err.Error(), tab) && strings.Contains(err.Error(), "-outbox-schema")
	})
	gone(false)
	testkit.Eventually(t, "not ready although it is mended", func() bool { return r.Ready() == nil })

	// While it is idle, the probe's connection finds out.
	gone(true)
	_, err := db.Exec(r.Verify())
	if err == nil {
		t.Fatal("the statement of the probe does not need the table")
	}
	r.Verified(err)
	if r.Ready() == nil {
		t.Error("ready although the probe has found the table gone")
	}
	gone(false)
	testkit.Eventually(t, "not ready although it is mended", func() bool { return r.Ready() == nil })

	// A result that cannot be written.
	insert(t, db, tab, channel, "held")
	testkit.Eventually(t, "not begun", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.running == 1 })
	mend := refuseDeletes(t, tab)
	close(gate)
	testkit.Eventually(t, "ready although results cannot be written", func() bool { return r.Ready() != nil })
	if err := r.Ready(); !strings.Contains(err.Error(), "cannot be written") || !strings.Contains(err.Error(), "no deletes today") {
		t.Errorf("%v", err)
	}
	paced(t, r, "results of the outbox cannot be written")
	mend()
	testkit.Eventually(t, "not ready although it is mended", func() bool { return r.Ready() == nil })
	emptied(t, db, tab)
}

// TestNothingIsClaimedThatCannotBeEnded: a claim needs no right to delete. Rows that are claimed without it would be handled again at the end
// of each lease.
func TestNothingIsClaimedThatCannotBeEnded(t *testing.T) {
	t.Parallel()
	db, channel := testkit.DB(t), testkit.ChannelName(t)
	tab := outboxTable(t, db)
	dsn := userWith(t, tab, "select, insert, update, delete")
	role := regexp.MustCompile(`//(\w+):`).FindStringSubmatch(dsn)[1]
	seen, gate := &seen{}, make(chan struct{})
	r := run(t, config{dsn: dsn, table: tab}, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		if n.Payload == "held" {
			<-gate
		}
		return seen.Handle(ctx, n)
	}))
	testkit.Eventually(t, "never counted", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return !r.counts.counted.IsZero() })
	claimed := func() (n int) {
		if err := db.QueryRow(`select count(*) from "` + tab + `" where attempts > 0`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}

	// The probe finds out while it is idle.
	testkit.Exec(t, db, `revoke delete on "`+tab+`" from `+role)
	_, err := testkit.Open(t, dsn).Exec(r.Verify())
	if err == nil {
		t.Fatal("the statement of the probe does not need the right to delete")
	}
	r.Verified(err)
	fill(t, tab, channel, 3)
	line := r.Wait(t, "outbox cannot be read", 2) // it has tried twice
	if hint := fmt.Sprint(line["hint"]); !strings.Contains(hint, "grant") || r.Ready() == nil || claimed() > 0 || len(seen.payloads()) > 0 {
		t.Errorf("hint %q, ready: %v; %d are claimed and %d handled", hint, r.Ready(), claimed(), len(seen.payloads()))
	}
	testkit.Exec(t, db, `grant delete on "`+tab+`" to `+role)
	emptied(t, db, tab)
	testkit.Eventually(t, "not ready although it is mended", func() bool { return r.Ready() == nil })

	// The first result finds out.
	insert(t, db, tab, channel, "held")
	testkit.Eventually(t, "not begun", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.running == 1 })
	testkit.Exec(t, db, `revoke delete on "`+tab+`" from `+role)
	before := len(r.All("outbox cannot be read"))
	close(gate)
	r.Wait(t, "results of the outbox cannot be written", 1)
	insert(t, db, tab, channel, "next")
	r.Wait(t, "outbox cannot be read", before+1)
	if n := claimed(); n != 1 || r.Ready() == nil {
		t.Errorf("%d are claimed; ready: %v", n, r.Ready())
	}
	testkit.Exec(t, db, `grant delete on "`+tab+`" to `+role)
	emptied(t, db, tab)
	if got := strings.Join(seen.payloads(), " "); got != "1 2 3 held next" {
		t.Errorf("handled %s", got)
	}
}

// TestFiguresOfRowsAreRecent: what this replica has done to rows is seen after 5 s, though they were counted just before.
func TestFiguresOfRowsAreRecent(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := run(t, config{table: tab, attempts: 10, tweak: func(o *Outbox) { o.retry = retry.Backoff{Min: time.Hour, Max: time.Hour} }},
		notify.HandlerFunc(func(context.Context, notify.Notification) error { return errors.New("no") }))
	testkit.Eventually(t, "never counted", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return !r.counts.counted.IsZero() })
	began := time.Now()
	insert(t, testkit.DB(t), tab, channel, "x")
	testkit.Eventually(t, "the row that waits for its next attempt is not counted", func() bool { return stat(r, "pglistener_outbox_rows", "delayed") == 1 })
	if took := time.Since(began); took > 10*time.Second { // 5 s, on a busy machine
		t.Errorf("it was counted after %v; the documentation says 5 s", took)
	}
}

// TestFiguresOfRowsAreRecentWhileAllSlotsAreBusy: rows that come while a handler hangs are seen, and so is the one that it has.
func TestFiguresOfRowsAreRecentWhileAllSlotsAreBusy(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	gate := make(chan struct{})
	defer close(gate)
	r := run(t, config{table: tab}, notify.HandlerFunc(func(context.Context, notify.Notification) error { <-gate; return nil }))
	insert(t, testkit.DB(t), tab, channel, "held")
	testkit.Eventually(t, "not begun", func() bool { return r.runs() == 1 })
	fill(t, tab, channel, 2)
	testkit.Eventually(t, "rows that wait for a slot are not counted", func() bool { return stat(r, "pglistener_outbox_rows", "due") == 3 })
	fill(t, tab, channel, 2)
	testkit.Eventually(t, "nor those that come later", func() bool { return stat(r, "pglistener_outbox_rows", "due") == 5 })
}

func TestHintsForWhatIsNotATable(t *testing.T) {
	t.Parallel()
	db, tab := testkit.DB(t), outboxTable(t, testkit.DB(t))
	testkit.Exec(t, db, `create view "`+tab+`_view" as select * from "`+tab+`"`)
	testkit.Exec(t, db, `create table "`+tab+`_other" (id int)`)
	dropLater(t, db, tab+"_other")
	t.Cleanup(func() { _, _ = db.Exec(`drop view "` + tab + `_view"`) })
	for name, want := range map[string]string{
		tab + "_view": "is a view; name the table itself", tab + "_other": "bring it up to date",
		tab + "_none": "make it: OUTBOX_TABLE=" + tab + "_none pglistener -outbox-schema",
	} {
		r := run(t, config{table: name, channel: name}, &seen{})
		if line := r.Wait(t, "outbox cannot be read", 1); !strings.Contains(line["hint"].(string), want) {
			t.Errorf("%s: %v, want %q", name, line["hint"], want)
		}
		if _, err := r.Check(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("-check of %s: %v", name, err)
		}
	}
}

func TestNotReadyWhileNothingSucceeds(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	var fails atomic.Bool
	fails.Store(true)
	r := run(t, config{table: tab, attempts: 1000, tweak: func(o *Outbox) { o.options.LateAfter, o.options.Limits.Timeout = 2*time.Second, time.Second }},
		notify.HandlerFunc(func(context.Context, notify.Notification) error {
			if fails.Load() {
				return errors.New("not today")
			}
			return nil
		}))
	time.Sleep(2500 * time.Millisecond) // that an idle channel is never late is a point too
	if err := r.Ready(); err != nil {
		t.Fatalf("idle, and late: %v", err)
	}
	inserted := time.Now()
	insert(t, testkit.DB(t), tab, channel, "x")
	testkit.Eventually(t, "ready although nothing succeeds", func() bool { return r.Ready() != nil })
	if took := time.Since(inserted); took < 1900*time.Millisecond {
		t.Errorf("late after %v, sooner than LATE_AFTER", took)
	}
	if err := r.Ready(); err == nil || !strings.Contains(err.Error(), "no row has succeeded for") {
		t.Errorf("%v", err)
	}
	if age := stat(r, "pglistener_outbox_oldest_seconds", ""); age < 1.5 {
		t.Errorf("everything is in backoff, and the oldest is said to be %v s old", age)
	}
	fails.Store(false)
	testkit.Eventually(t, "not ready although it succeeds again", func() bool { return r.Ready() == nil })
	emptied(t, testkit.DB(t), tab)
	testkit.Eventually(t, "nothing is left, and the oldest is said to be some seconds old", func() bool {
		return stat(r, "pglistener_outbox_oldest_seconds", "") == 0
	})
}

// unready is a handler that says that it cannot work.
type unready struct{ notify.Handler }

func (unready) Ready() error { return errors.New("the program does not stay") }

func TestNotReadyWhileItsHandlerIsNot(t *testing.T) {
	t.Parallel()
	r := run(t, config{table: outboxTable(t, testkit.DB(t))}, unready{notify.HandlerFunc(func(context.Context, notify.Notification) error { return nil })})
	if err := r.Ready(); err == nil || err.Error() != "the program does not stay" {
		t.Errorf("%v", err)
	}
}

// What one replica has seen fail, another or a person may end.
func TestLatenessEndsWithTheRow(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := run(t, config{table: tab, attempts: 1000, tweak: func(o *Outbox) { o.options.LateAfter, o.options.Limits.Timeout = time.Second, 500*time.Millisecond }},
		notify.HandlerFunc(func(context.Context, notify.Notification) error { return errors.New("never") }))
	insert(t, testkit.DB(t), tab, channel, "x")
	testkit.Eventually(t, "ready although nothing succeeds", func() bool { return r.Ready() != nil })
	testkit.Exec(t, testkit.DB(t), `delete from "`+tab+`"`)
	r.mu.Lock()
	r.counts.counted = time.Now().Add(-time.Minute) // the rows are counted every 5 s
	r.mu.Unlock()
	_ = r.Handle(t.Context(), notify.Notification{})
	testkit.Eventually(t, "not ready although nothing is left to do", func() bool { return r.Ready() == nil })
}

func TestFiguresAreRightWhenTheyAreRead(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	gate := make(chan struct{})
	r := run(t, config{table: tab, attempts: 2, concurrency: 4}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		switch n.Payload {
		case "1", "2":
			return errors.New("no")
		case "held":
			<-gate
		}
		return nil
	}))
	fill(t, tab, channel, 50)
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, run_at) select $1, now() + interval '1 day' from generate_series(1, 7)`, channel)
	figure := func(want float64, name, label string) {
		t.Helper()
		testkit.Eventually(t, fmt.Sprintf("%s %s is not %v", name, label, want), func() bool { return stat(r, name, label) == want })
	}
	figure(48, "pglistener_items_total", "done")
	figure(2, "pglistener_items_total", "failed")
	figure(4, "pglistener_handler_failures_total", "")
	figure(2, "pglistener_handler_retries_total", "")
	figure(52, "pglistener_handler_duration_seconds", "")
	// Without a count since: what this replica has done itself is known at once.
	figure(2, "pglistener_outbox_rows", "failed")
	figure(0, "pglistener_outbox_rows", "due")
	insert(t, testkit.DB(t), tab, channel, "held")
	testkit.Eventually(t, "the oldest has no age", func() bool { return stat(r, "pglistener_items_total", "done") == 48 && r.runs() == 1 })
	// With one, what others did is known too.
	r.mu.Lock()
	r.counts.counted, r.counts.changed = time.Now().Add(-time.Minute), true
	r.mu.Unlock()
	_ = r.Handle(t.Context(), notify.Notification{})
	figure(7, "pglistener_outbox_rows", "delayed")
	figure(1, "pglistener_outbox_rows", "due") // the one that is held
	close(gate)
	figure(49, "pglistener_items_total", "done")
	figure(0, "pglistener_outbox_rows", "due")
}

// An alert may hang on rows that a person, or another replica, has ended: a replica that does nothing finds out too.
func TestFiguresOfAnIdleReplicaFollow(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := run(t, config{table: tab, attempts: 1}, notify.HandlerFunc(func(context.Context, notify.Notification) error { return errors.New("no") }))
	failed := func(want float64) {
		t.Helper()
		testkit.Eventually(t, fmt.Sprintf("the figure of failed rows is not %v", want), func() bool { return stat(r, "pglistener_outbox_rows", "failed") == want })
	}
	settled := func() { // counted, long ago, and nothing has been done here since
		t.Helper()
		testkit.Eventually(t, "never counted", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return !r.counts.counted.IsZero() })
		r.mu.Lock()
		defer r.mu.Unlock()
		r.counts.counted, r.counts.changed = time.Now().Add(-time.Minute), false
	}
	insert(t, testkit.DB(t), tab, channel, "x")
	failed(1)
	testkit.Exec(t, testkit.DB(t), `delete from "`+tab+`"`)
	settled()
	began := time.Now()
	r.Verified(nil) // the probe's second connection
	failed(0)
	if took := time.Since(began); took > 4*time.Second { // by itself it looks after 5 s at the soonest, and later after an hour
		t.Errorf("it took %v: nobody has woken it", took)
	}

	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, failed_at) values ($1, now())`, channel)
	settled()
	_ = r.CatchUp(t.Context()) // the sweep
	failed(1)
	testkit.Exec(t, testkit.DB(t), `delete from "`+tab+`"`)
	settled()
	_ = r.CatchUp(t.Context())
	failed(0)

	// With no rows, the probe's connection is enough.
	settled()
	r.Verified(nil)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.wake) > 0 || r.counts.changed {
		t.Error("a probe has an idle outbox counted")
	}
}

func (r *running) runs() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running
}

// Ids are the event's: no table, database or time repeats one.
func TestIDsAreUnique(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	failed := map[string]bool{}
	run(t, config{table: tab, attempts: 5}, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		_ = s.Handle(ctx, n)
		if !failed[n.Payload] {
			failed[n.Payload] = true
			return errors.New("once more")
		}
		return nil
	}))
	for round := range 2 {
		for i := range 3 {
			insert(t, testkit.DB(t), tab, channel, fmt.Sprintf("%d-%d", round, i))
		}
		emptied(t, testkit.DB(t), tab)
		testkit.Exec(t, testkit.DB(t), `truncate "`+tab+`" restart identity`)
	}
	ids := map[string]string{}
	for _, n := range s.list {
		if before, known := ids[n.ID()]; known && before != n.Payload {
			t.Errorf("%s and %s have the id %s", before, n.Payload, n.ID())
		}
		ids[n.ID()] = n.Payload
	}
	if len(s.list) != 12 || len(ids) != 6 {
		t.Errorf("%d ids in %d calls, want 6 in 12: each the same at both attempts", len(ids), len(s.list))
	}
}

// Rows for a channel that nobody handles are not forgotten.
func TestRowsOfAStrangeChannelAreNamed(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, run_at) select 'oders', now() - interval '5 minutes' from generate_series(1, 3)`)
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel) values ('just now')`)
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, run_at) values ($1, now() - interval '5 minutes')`, channel)
	r := run(t, config{table: tab}, &seen{})
	line := r.Wait(t, "rows have been due for minutes on a channel", 1)
	if line["unhandled"] != "oders" || line["rows"] != 3.0 || line["level"] != "WARN" {
		t.Errorf("%v", line)
	}
	testkit.Eventually(t, "the metric does not count them", func() bool { return stat(r, "pglistener_outbox_unhandled_rows", "") == 3 })
	if n := len(r.All("rows have been due")); n != 1 {
		t.Errorf("told %d times", n)
	}
	testkit.Exec(t, testkit.DB(t), `delete from "`+tab+`"`)
	r.pool.mu.Lock()
	r.pool.looked = time.Time{} // it looks once a minute
	r.pool.mu.Unlock()
	_ = r.Handle(t.Context(), notify.Notification{})
	testkit.Eventually(t, "they are gone, and the metric still counts them", func() bool {
		return stat(r, "pglistener_outbox_unhandled_rows", "") == 0
	})
}

// TestUpgradeKeepsTheNumbers starts from the table as it was before event_id.
func TestUpgradeKeepsTheNumbers(t *testing.T) {
	t.Parallel()
	db, tab, channel, s := testkit.DB(t), testkit.ChannelName(t), testkit.ChannelName(t), &seen{}
	dropLater(t, db, tab)
	before, err := os.ReadFile("testdata/schema-1.0.sql")
	if err != nil {
		t.Fatal(err)
	}
	names, err := parseTable(tab)
	if err != nil {
		t.Fatal(err)
	}
	testkit.Exec(t, db, names.sql(string(before)))
	old := insert(t, db, tab, channel, "old")
	makeOutbox(t, db, tab)
	insert(t, db, tab, channel, "new")
	run(t, config{table: tab}, s)
	emptied(t, db, tab)
	if len(s.list) != 2 || s.list[0].ID() != fmt.Sprint(old) || len(s.list[1].ID()) != 36 {
		t.Errorf("%+v", s.list)
	}
}

// TestSchemaSaysWhatItCouldNotMake: an index whose name is another's is not left out in silence.
func TestSchemaSaysWhatItCouldNotMake(t *testing.T) {
	t.Parallel()
	db := testkit.DB(t)
	for _, name := range []string{testkit.ChannelName(t) + "_1", "odd '$$' \"name\" " + testkit.ChannelName(t)[:20]} {
		if name = strings.ReplaceAll(name, `"`, ""); len(name) > 50 {
			name = name[len(name)-50:]
		}
		dropLater(t, db, name)
		for _, suffix := range []string{"_due", "_failed", "_key"} {
			testkit.Exec(t, db, `create table "`+name+suffix+`" (a int)`)
			sql, err := Schema(name)
			if err != nil {
				t.Fatal(err)
			}
			_, err = db.Exec(sql)
			if e := pq.As(err); e == nil || e.Message != `the index "`+name+suffix+`" was not made, for something else has its name` || !strings.Contains(e.Hint, "run this again") {
				t.Errorf("%s: %v", suffix, err)
			}
			testkit.Exec(t, db, `drop table "`+name+suffix+`"`)
		}
		// The name of an index of another table.
		testkit.Exec(t, db, `create table "`+name+`" (id bigint); create index "`+name+`_due" on "`+name+`" (id); alter table "`+name+`" rename to "`+name+`_2"`)
		dropLater(t, db, name+"_2")
		sql, err := Schema(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = db.Exec(sql); err == nil || !strings.Contains(err.Error(), `the index "`+name+`_due" was not made`) {
			t.Errorf("the name of another table's index: %v", err)
		}
		testkit.Exec(t, db, `drop table "`+name+`_2"`)
		makeOutbox(t, db, name) // again, with the error mended
		makeOutbox(t, db, name)
	}
}
