//go:build unix

package outbox

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/retry"
)

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

// running is an Outbox that runs, woken by NOTIFY as the listener wakes it.
type running struct {
	*Outbox
	*testkit.Logs
	begin func() // begins to stop
	quit  func() // ends the contexts of handlers
	stop  func() // stops, and waits for the end
}

// config is what a test may want to set.
type config struct {
	dsn, table, channel   string
	concurrency, attempts int
	timeout               time.Duration
	schedule              string
	next                  func(string, time.Time, time.Time) (time.Time, error)
	tweak                 func(*Outbox)
	pool                  *Pool // nil: one of its own
}

// run runs an Outbox until the test ends.
func run(t *testing.T, c config, h notify.Handler) *running {
	t.Helper()
	if c.dsn == "" {
		c.dsn = testkit.DSN(t)
	}
	if c.channel == "" {
		c.channel = testkit.ChannelName(t)
	}
	if c.timeout == 0 {
		c.timeout = 30 * time.Second
	}
	r := &running{Logs: testkit.NewLogs(t)}
	var err error
	r.Outbox, err = New(h, cmp.Or(c.pool, new(Pool)), Options{
		Settings: Settings{Table: c.table, Attempts: max(c.attempts, 1)},
		Limits:   call.Limits{Concurrency: max(c.concurrency, 1), Timeout: c.timeout, LateAfter: time.Minute},
		DSN:      c.dsn, Timeout: 5 * time.Second, Next: c.next, Schedule: c.schedule,
	}, notify.Setup{Channel: c.channel, Log: r.Logger(), Grace: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	r.retry = retry.Backoff{Min: 20 * time.Millisecond, Max: 50 * time.Millisecond}
	if c.tweak != nil {
		c.tweak(r.Outbox)
	}
	l := pq.NewListener(c.dsn, 10*time.Millisecond, time.Second, nil)
	if err := l.Listen(c.channel); err != nil {
		t.Fatal(err)
	}
	stop, begin := context.WithCancel(context.Background())
	quit, cut := context.WithCancel(context.Background())
	var woken, ended sync.WaitGroup
	woken.Go(func() {
		for range l.Notify {
			_ = r.Handle(quit, notify.Notification{})
		}
	})
	ended.Go(func() { r.Run(stop, quit) })
	r.begin, r.quit = begin, cut
	r.stop = func() {
		begin()
		ended.Wait()
		cut()
		l.Close()
		woken.Wait()
	}
	t.Cleanup(func() {
		time.AfterFunc(testkit.Patience, cut)
		r.stop()
	})
	return r
}

// outboxTable makes a table of this test's own and returns its name.
func outboxTable(t *testing.T, db *sql.DB) string {
	t.Helper()
	name := testkit.ChannelName(t)
	if len(name) > 50 {
		name = name[:50]
	}
	makeOutbox(t, db, name)
	dropLater(t, db, name)
	return name
}

// dropLater drops a table when the test ends, for a test may run several times.
func dropLater(t *testing.T, db *sql.DB, name string) {
	t.Cleanup(func() { _, _ = db.Exec(`drop table if exists "` + name + `"`) })
}

func makeOutbox(t *testing.T, db *sql.DB, name string) {
	t.Helper()
	sql, err := Schema(name)
	if err != nil {
		t.Fatal(err)
	}
	testkit.Exec(t, db, sql)
}

// userWith makes a user that has rights on a table and no other, and returns its connection string.
func userWith(t *testing.T, tab, rights string) string {
	t.Helper()
	role := "r" + strconv.FormatInt(time.Now().UnixNano(), 36)
	testkit.Exec(t, testkit.DB(t), `create role `+role+` login password 'x'; grant `+rights+` on "`+tab+`" to `+role)
	t.Cleanup(func() { _, _ = testkit.DB(t).Exec(`revoke all on "` + tab + `" from ` + role + `; drop role ` + role) })
	return testkit.WithUser(testkit.DSN(t), role, "x")
}

// emptied waits until the outbox is.
func emptied(t *testing.T, db *sql.DB, table string) {
	t.Helper()
	testkit.Eventually(t, "the outbox is not emptied", func() bool { return rowCount(t, db, table) == 0 })
}

func rowCount(t *testing.T, db *sql.DB, table string) int {
	t.Helper()
	var n int
	if err := db.QueryRowContext(t.Context(), `select count(*) from "`+table+`"`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func insert(t *testing.T, db *sql.DB, table, channel, payload string) (id int64) {
	t.Helper()
	err := db.QueryRowContext(t.Context(), `insert into "`+table+`" (channel, payload) values ($1, $2) returning id`, channel, payload).Scan(&id)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// seen is a handler that records what it is given.
type seen struct {
	mu   sync.Mutex
	list []notify.Notification
}

func (s *seen) Handle(_ context.Context, n notify.Notification) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, n)
	return nil
}

func (s *seen) payloads() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for _, n := range s.list {
		out = append(out, n.Payload)
	}
	return out
}

func TestHandlesRowsInOrder(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	var want []string
	for i := range 300 {
		insert(t, testkit.DB(t), tab, channel, strconv.Itoa(i)) // before anybody listens
		want = append(want, strconv.Itoa(i))
	}
	insert(t, testkit.DB(t), tab, "another channel", "not ours")
	run(t, config{table: tab}, s)
	testkit.Eventually(t, "what was there at the start is not handled", func() bool { return len(s.payloads()) == 300 })
	for i := range 300 {
		insert(t, testkit.DB(t), tab, channel, strconv.Itoa(i)) // now by notification
		want = append(want, strconv.Itoa(i))
	}
	testkit.Eventually(t, "not all were handled", func() bool { return len(s.payloads()) == 600 })
	if !slices.Equal(s.payloads(), want) {
		t.Error("not in order")
	}
	testkit.Eventually(t, "rows are left", func() bool { return rowCount(t, testkit.DB(t), tab) == 1 })
}

func TestReplicasShareRows(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	byWhom := [2]atomic.Int64{}
	for i := range 2 {
		run(t, config{table: tab, concurrency: 4}, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
			byWhom[i].Add(1)
			time.Sleep(100 * time.Microsecond) // work
			return s.Handle(ctx, n)
		}))
	}
	const total = 2000
	for i := range 20 {
		testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload) select $1, ($2 + i)::text from generate_series(1, 100) i`, channel, i*100)
	}
	emptied(t, testkit.DB(t), tab)
	got := s.payloads()
	slices.Sort(got)
	if n := len(slices.Compact(slices.Clone(got))); n != total || len(got) != total {
		t.Errorf("%d handled, %d different, of %d", len(got), n, total)
	}
	if byWhom[0].Load() == 0 || byWhom[1].Load() == 0 {
		t.Errorf("one did it all: %d, %d", byWhom[0].Load(), byWhom[1].Load())
	}
}

func TestFencesLostLease(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	gate, began := make(chan struct{}), make(chan struct{}, 10)
	r := run(t, config{table: tab}, notify.HandlerFunc(func(context.Context, notify.Notification) error {
		began <- struct{}{}
		<-gate
		return nil
	}))
	id := insert(t, testkit.DB(t), tab, channel, "x")
	<-began
	// The lease ends and another replica takes the row.
	testkit.Exec(t, testkit.DB(t), `update "`+tab+`" set attempts = attempts + 1, run_at = now() + interval '1 hour', last_error = 'mine now' where id = $1`, id)
	close(gate)
	r.Wait(t, "lease lost", 1)
	var attempts int
	var text string
	if err := testkit.DB(t).QueryRow(`select attempts, last_error from "`+tab+`" where id = $1`, id).Scan(&attempts, &text); err != nil {
		t.Fatalf("the row was taken from its new owner: %v", err)
	}
	if attempts != 2 || text != "mine now" {
		t.Errorf("the row was changed: %d attempts, %q", attempts, text)
	}
}

func TestScheduledRows(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	type ran struct {
		payload string
		at      time.Time
	}
	runs := make(chan ran, 10)
	run(t, config{table: tab}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		runs <- ran{n.Payload, time.Now()}
		return nil
	}))
	due := func(payload string, after time.Duration) time.Time {
		t.Helper()
		var at time.Time
		err := testkit.DB(t).QueryRow(`insert into "`+tab+`" (channel, payload, run_at) values ($1, $2, clock_timestamp() + $3 * interval '1 second') returning run_at`,
			channel, payload, after.Seconds()).Scan(&at)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	// The second is due before the one that is slept for.
	late, soon := due("late", 2*time.Second), due("soon", time.Second)
	for _, want := range []struct {
		payload string
		at      time.Time
	}{{"soon", soon}, {"late", late}} {
		select {
		case r := <-runs:
			if r.payload != want.payload || r.at.Before(want.at) || r.at.After(want.at.Add(time.Second)) {
				t.Errorf("%s ran %v after it was due, want %s", r.payload, r.at.Sub(want.at), want.payload)
			}
		case <-time.After(testkit.Patience):
			t.Fatalf("%s never ran", want.payload)
		}
	}
}

func TestPoisonRowHoldsUpNobody(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	r := run(t, config{table: tab, attempts: 3}, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		switch n.Payload {
		case "poison":
			return errors.New("cannot digest")
		case "hopeless":
			return notify.Permanent(errors.New("never"))
		case "garbled": // no text of the database has such bytes
			return notify.Permanent(errors.New("a\x00b\xff"))
		}
		return s.Handle(ctx, n)
	}))
	insert(t, testkit.DB(t), tab, channel, "poison")
	insert(t, testkit.DB(t), tab, channel, "hopeless")
	insert(t, testkit.DB(t), tab, channel, "garbled")
	for i := range 50 {
		insert(t, testkit.DB(t), tab, channel, strconv.Itoa(i))
	}
	testkit.Eventually(t, "the others were held up", func() bool { return len(s.payloads()) == 50 })
	if line := r.Wait(t, "gave up; the row stays", 3); line["retry"] != fmt.Sprintf("pglistener -outbox-retry %.0f", line["id"]) {
		t.Errorf("%v does not say how to retry it", line)
	}
	for payload, want := range map[string]string{"poison": "3 cannot digest", "hopeless": "1 never", "garbled": "1 ab?"} {
		var got string
		err := testkit.DB(t).QueryRow(`select attempts || ' ' || last_error from "`+tab+`" where payload = $1 and failed_at is not null`, payload).Scan(&got)
		if err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", payload, got, err, want)
		}
	}
	// As README tells a team to put it back.
	testkit.Exec(t, testkit.DB(t), `update "`+tab+`" set failed_at = null, attempts = 0, run_at = now(), payload = 'cured' where failed_at is not null and payload = 'poison'`)
	testkit.Send(t, channel, "")
	testkit.Eventually(t, "what was put back is not handled", func() bool { return slices.Contains(s.payloads(), "cured") })
}

func TestSlowJobHoldsOnlyItsSlot(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	gate := make(chan struct{})
	defer close(gate)
	run(t, config{table: tab, concurrency: 3}, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		if n.Payload == "slow" {
			select {
			case <-gate:
			case <-ctx.Done():
			}
		}
		return s.Handle(ctx, n)
	}))
	insert(t, testkit.DB(t), tab, channel, "slow")
	insert(t, testkit.DB(t), tab, channel, "slow")
	for i := range 500 {
		insert(t, testkit.DB(t), tab, channel, strconv.Itoa(i))
	}
	testkit.Eventually(t, "the quick jobs wait for the slow ones", func() bool { return len(s.payloads()) == 500 })
}

// stuckAfter is a handler of which the calls after the first n wait for a gate.
func stuckAfter(n int64, gate <-chan struct{}, h notify.Handler) notify.Handler {
	var handled atomic.Int64
	return notify.HandlerFunc(func(ctx context.Context, n2 notify.Notification) error {
		if handled.Add(1) > n { // the first are quick, so that many more are claimed ahead
			select {
			case <-gate:
			case <-ctx.Done():
			}
		}
		return h.Handle(ctx, n2)
	})
}

// paced finds out that what fails is not repeated without a pause: pauses of 0.1 s that double leave room for five attempts in a second.
func paced(t *testing.T, r *running, msg string) {
	t.Helper()
	r.Wait(t, msg, 1)
	for until := time.Now().Add(time.Second); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		lines := r.All(msg)
		if last := lines[len(lines)-1]; last["attempt"].(float64) > 8 {
			t.Fatalf("within a second: %v", last)
		}
	}
}

// claimedAhead waits until a job is stuck in front of rows that were claimed ahead.
func (r *running) claimedAhead(t *testing.T) (ahead int) {
	t.Helper()
	testkit.Eventually(t, "nothing is claimed ahead of a stuck job", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		ahead = len(r.buffer)
		return r.running == 1 && r.counts.done == 20 && ahead > 10
	})
	return ahead
}

// What was claimed and not begun at the stop is another replica's at once, and has not spent an attempt.
func TestGivesBackAtShutdown(t *testing.T) {
	t.Parallel()
	channel, tab, s, other := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}, &seen{}
	gate := make(chan struct{})
	const total = 2000
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload) select $1, i::text from generate_series(1, $2) i`, channel, total)
	r := run(t, config{table: tab}, stuckAfter(20, gate, s))
	r.claimedAhead(t)
	r.begin()
	testkit.Eventually(t, "it does not stop", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.stopping
	})
	run(t, config{table: tab}, other) // while the stuck job still runs
	testkit.Eventually(t, "what was claimed ahead was not given back", func() bool { return len(other.payloads()) == total-21 })
	close(gate)
	r.stop()
	emptied(t, testkit.DB(t), tab)
	all := append(s.payloads(), other.payloads()...)
	slices.Sort(all)
	if len(all) != total || len(slices.Compact(all)) != total {
		t.Errorf("%d handled of %d", len(all), total)
	}
	for _, n := range other.list {
		if n.Attempt != 1 {
			t.Fatalf("what was given back is at attempt %d, want 1", n.Attempt)
		}
	}
}

// A replica that sleeps is woken for what another one gives back: by itself it would look again when the lease ends.
func TestGivesBackToASleepingReplica(t *testing.T) {
	t.Parallel()
	channel, tab, other := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	gate := make(chan struct{})
	defer close(gate)
	fill(t, tab, channel, 10)
	busy := run(t, config{table: tab, tweak: func(o *Outbox) { o.calls.OK = 1 }}, // it has handled one, and so claims ahead
		notify.HandlerFunc(func(context.Context, notify.Notification) error { <-gate; return nil }))
	testkit.Eventually(t, "not all are claimed", func() bool { return leased(t, tab) == 10 })
	asleep := run(t, config{table: tab, tweak: func(o *Outbox) { o.counts.counted = time.Now() }}, other) // or it would look after 5 s
	testkit.Eventually(t, "it does not look", func() bool {
		asleep.pool.mu.Lock()
		defer asleep.pool.mu.Unlock()
		return !asleep.pool.looked.IsZero()
	})
	busy.begin()
	testkit.Eventually(t, "what was given back is left", func() bool { return len(other.payloads()) == 9 })
}

// leased is how many rows are claimed.
func leased(t *testing.T, tab string) (n int) {
	t.Helper()
	if err := testkit.DB(t).QueryRow(`select count(*) from "` + tab + `" where lease is not null`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// A handler that obeys its context when the time to stop is over has failed, and its row need not wait for the end of its lease.
func TestHandlerCutAtTheStopHasFailed(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := run(t, config{table: tab, attempts: 10}, notify.HandlerFunc(func(ctx context.Context, _ notify.Notification) error {
		<-ctx.Done()
		time.Sleep(200 * time.Millisecond) // it cleans up
		return ctx.Err()
	}))
	insert(t, testkit.DB(t), tab, channel, "x")
	testkit.Eventually(t, "not begun", func() bool { return r.runs() == 1 })
	r.begin()
	r.quit()
	r.stop()
	var text sql.NullString
	err := testkit.DB(t).QueryRow(`select last_error from "` + tab + `" where attempts = 1 and lease is null`).Scan(&text)
	if err != nil || text.String != "context canceled" {
		t.Errorf("its row says %q: %v", text.String, err)
	}
}

// While nothing is known of how long jobs take, no more are claimed than can begin: others may have free slots.
func TestFirstClaimLeavesRowsToOthers(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	gate := make(chan struct{})
	defer close(gate)
	fill(t, tab, channel, 100)
	for n := 1; n <= 2; n++ {
		r := run(t, config{table: tab, concurrency: 4}, notify.HandlerFunc(func(context.Context, notify.Notification) error {
			<-gate
			return nil
		}))
		testkit.Eventually(t, "not begun", func() bool { return r.runs() == 4 })
		if got := leased(t, tab); got != 4*n {
			t.Errorf("%d replicas that run 4 jobs each hold %d rows", n, got)
		}
	}
}

// While results cannot be written, handlers go on for a while only: each row that they have done may be handled once more.
func TestClaimsNoMoreThanItCanWrite(t *testing.T) {
	t.Parallel()
	const total = 10_000
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	mend := refuseDeletes(t, tab)
	fill(t, tab, channel, total)
	var calls atomic.Int64
	run(t, config{table: tab}, notify.HandlerFunc(func(context.Context, notify.Notification) error { calls.Add(1); return nil }))
	var n int64
	since := time.Now()
	testkit.Eventually(t, "it does not come to rest", func() bool {
		if now := calls.Load(); now != n {
			n, since = now, time.Now()
		}
		return n > prefetchRows && time.Since(since) > 500*time.Millisecond
	})
	if n == total {
		t.Errorf("all rows were handled although no result is written")
	}
	mend()
	emptied(t, testkit.DB(t), tab)
	if n = calls.Load(); n != total {
		t.Errorf("%d calls for %d rows", n, total)
	}
}

// What has waited for too long is not begun, for its lease would end while its handler runs.
func TestBeginsNothingLate(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	var calls atomic.Int64
	r := run(t, config{table: tab}, notify.HandlerFunc(func(context.Context, notify.Notification) error { calls.Add(1); return nil }))
	insert(t, testkit.DB(t), tab, channel, "x")
	emptied(t, testkit.DB(t), tab)
	r.push([]job{{id: -1, until: "now", claimed: time.Now().Add(-r.margin - time.Millisecond)}})
	testkit.Eventually(t, "it is not given back", func() bool { return stat(r, "pglistener_items_total", "given_back") == 1 })
	if n := calls.Load(); n != 1 {
		t.Errorf("%d calls", n)
	}
}

// The lease lasts while a row waits for its slot, its handler runs to its time limit and ends a little later, and the result is written,
// for which the server may be asked twice.
func TestLeaseOutlivesTheHandler(t *testing.T) {
	t.Parallel()
	const limit, grace = 30 * time.Second, time.Second
	r := run(t, config{table: outboxTable(t, testkit.DB(t)), timeout: limit}, &seen{})
	if left := r.store.lease - r.margin - call.Longest(limit) - grace; left < 2*r.options.Timeout {
		t.Errorf("of a lease of %v there are %v left to write the result", r.store.lease, left)
	}
}

// A receiver may ask for any pause, and is asked again after an hour.
func TestWaitsForAnHourAtMost(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := run(t, config{table: tab, attempts: 10}, notify.HandlerFunc(func(context.Context, notify.Notification) error {
		return notify.RetryAfter(errors.New("closed"), 24*time.Hour)
	}))
	insert(t, testkit.DB(t), tab, channel, "x")
	r.Wait(t, "handler failed; the row will be tried again", 1)
	var wait float64
	err := testkit.DB(t).QueryRow(`select extract(epoch from run_at - now()) from "` + tab + `"`).Scan(&wait)
	if err != nil || wait > 3600 || wait < 3500 {
		t.Errorf("it waits for %v s: %v", wait, err)
	}
}

// A job that turns slow must not keep from other replicas what was claimed ahead of it.
func TestGivesBackWhatWaitsTooLong(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	gate := make(chan struct{})
	const total = 500
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload) select $1, i::text from generate_series(1, $2) i`, channel, total)
	testkit.Exec(t, testkit.DB(t), `update "`+tab+`" set run_at = '-infinity' where payload = '1'`) // the first of all
	r := run(t, config{table: tab, tweak: func(o *Outbox) { o.margin = time.Second }}, stuckAfter(20, gate, s))
	defer close(gate)
	r.claimedAhead(t)
	run(t, config{table: tab}, s)
	testkit.Eventually(t, "the other replica does not get it", func() bool { return len(s.payloads()) == total-1 })
	if got := s.payloads()[0]; got != "1" {
		t.Errorf("the row that was due since ever came after %s", got)
	}
}

func TestSurvivesLossOfItsTable(t *testing.T) {
	t.Parallel()
	channel, s := testkit.ChannelName(t), &seen{}
	tab := testkit.ChannelName(t)
	dropLater(t, testkit.DB(t), tab)
	r := run(t, config{table: tab}, s)
	line := r.Wait(t, "outbox cannot be read", 1) // not made yet
	if want := "OUTBOX_TABLE=" + tab + " pglistener -outbox-schema | psql"; !strings.Contains(line["hint"].(string), want) {
		t.Errorf("no %q in %v", want, line)
	}
	paced(t, r, "outbox cannot be read")
	makeOutbox(t, testkit.DB(t), tab)
	insert(t, testkit.DB(t), tab, channel, "one")
	emptied(t, testkit.DB(t), tab)
	before := len(r.All("outbox cannot be read"))
	testkit.Exec(t, testkit.DB(t), `drop table "`+tab+`"`)
	testkit.Send(t, channel, "")
	r.Wait(t, "outbox cannot be read", before+1)
	makeOutbox(t, testkit.DB(t), tab)
	insert(t, testkit.DB(t), tab, channel, "two")
	emptied(t, testkit.DB(t), tab)
	if got := s.payloads(); !slices.Equal(got, []string{"one", "two"}) {
		t.Errorf("handled %v", got)
	}
}

func TestSchemaWithOddNames(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("ä", 31) // 62 bytes
	for i, name := range []string{`odd "x`, `"Odd Schema"."tab.le"`, `"Odd Schema".` + long, "a.b.c", ".", `a."`, strings.Repeat("x", 64)} {
		sql, err := Schema(name)
		if valid := i == 1 || i == 2; (err == nil) != valid {
			t.Errorf("%s: %v", name, err)
		} else if !valid {
			continue
		}
		testkit.Exec(t, testkit.DB(t), `create schema if not exists "Odd Schema"`)
		testkit.Exec(t, testkit.DB(t), sql)
		testkit.Exec(t, testkit.DB(t), sql) // again
		channel, s := testkit.ChannelName(t)+strconv.Itoa(i), &seen{}
		r := run(t, config{table: name, channel: channel}, s)
		testkit.Exec(t, testkit.DB(t), r.store.table.sql("insert into {table} (channel, payload) values ($1, 'x')"), channel)
		testkit.Eventually(t, "not handled", func() bool { return len(s.payloads()) == 1 })
	}
}

// The free half of each page lets a claim touch no index, and vacuum comes often enough for a table of which every row is deleted.
func TestTableIsSetForClaims(t *testing.T) {
	t.Parallel()
	tab := outboxTable(t, testkit.DB(t))
	var set pq.StringArray
	err := testkit.DB(t).QueryRow(`select reloptions from pg_class where oid = to_regclass($1)`, `"`+tab+`"`).Scan(&set)
	want := []string{"fillfactor=50", "autovacuum_vacuum_scale_factor=0.02", "autovacuum_analyze_scale_factor=0.02"}
	if err != nil || !slices.Equal(set, want) {
		t.Errorf("%v, want %v: %v", set, want, err)
	}
}

// TestUsesTwoConnections: all channels together, while all are busy.
func TestUsesTwoConnections(t *testing.T) {
	t.Parallel()
	const channels = 3
	tab, name, pool := outboxTable(t, testkit.DB(t)), testkit.ChannelName(t), new(Pool)
	for i := range channels {
		run(t, config{dsn: testkit.WithParams(testkit.DSN(t), "application_name", name), table: tab, channel: fmt.Sprint(name, i), concurrency: 50, pool: pool},
			notify.HandlerFunc(func(context.Context, notify.Notification) error { return nil }))
	}
	ctx, stop := context.WithCancel(t.Context())
	var writer sync.WaitGroup
	writer.Go(func() {
		for ctx.Err() == nil {
			_, _ = testkit.DB(t).Exec(`insert into "`+tab+`" (channel) select $1 || i % $2 from generate_series(1, 2000) i`, name, channels)
		}
	})
	// As often as shows what is too much, and then until both are seen at once. Each channel also has one that listens.
	most, deadline := 0, time.Now().Add(testkit.Patience)
	for n := 0; n < 300 || most < channels+2 && time.Now().Before(deadline); n++ {
		most = max(most, len(testkit.Backends(t, testkit.DB(t), name)))
	}
	stop()
	writer.Wait()
	emptied(t, testkit.DB(t), tab)
	if most != channels+2 {
		t.Errorf("%d connections, want %d", most, channels+2)
	}
}

// TestClaimIsBoundedInBytes: a claim takes what has room in memory, and the rest follows at once.
func TestClaimIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	db := testkit.DB(t)
	table := outboxTable(t, db)
	channel := testkit.ChannelName(t)
	for i := range 10 {
		insert(t, db, table, channel, strings.Repeat(strconv.Itoa(i), 300_000))
	}
	seen := &seen{}
	r := run(t, config{table: table, channel: channel, tweak: func(o *Outbox) { o.store.bytes = 1_000_000 }},
		notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
			return seen.Handle(ctx, notify.Notification{Payload: n.Payload[:1]})
		}))
	testkit.Eventually(t, "all are handled", func() bool {
		return len(seen.payloads()) == 10
	})
	if got := strings.Join(seen.payloads(), ""); got != "0123456789" {
		t.Errorf("handled %s", got)
	}
	jobs := func() int {
		for i := range 10 {
			insert(t, db, table, "other", strings.Repeat(strconv.Itoa(i), 300_000))
		}
		s := r.store
		s.channel = "other"
		claimed, _, err := s.claim(100, place{}, 0)
		if err != nil {
			t.Fatal(err)
		}
		return len(claimed)
	}()
	if jobs != 4 { // the fourth begins before 1,000,000
		t.Errorf("a claim of a million bytes took %d rows of 300,000", jobs)
	}
}

// TestLargeRowsAreNotClaimedAheadLikeSmallOnes: how much is claimed ahead is known by the rows that came before.
func TestLargeRowsAreNotClaimedAheadLikeSmallOnes(t *testing.T) {
	t.Parallel()
	db, channel := testkit.DB(t), testkit.ChannelName(t)
	tab := outboxTable(t, db)
	gate := make(chan struct{})
	r := run(t, config{table: tab, concurrency: 2, tweak: func(o *Outbox) { o.store.bytes = 1_000_000 }}, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		if len(n.Payload) > 1000 {
			<-gate
		}
		return nil
	}))
	fill(t, tab, channel, 500)
	emptied(t, db, tab)
	testkit.Exec(t, db, `insert into "`+tab+`" (channel, payload) select $1, repeat('x', 300000) from generate_series(1, 200)`, channel)
	held := func() (rows int) { r.mu.Lock(); defer r.mu.Unlock(); return r.running + len(r.buffer) }
	testkit.Eventually(t, "nothing is claimed ahead", func() bool { return held() > 2 })
	time.Sleep(500 * time.Millisecond) // that no more is claimed is the point
	if n := held(); n > 10 {           // two run, and the four of a claim twice
		t.Errorf("%d rows of 300 kB are held, where a megabyte was allowed", n)
	}
	close(gate)
	emptied(t, db, tab)
}

// TestConcurrencyCostsNothing: goroutines are started for work that is there, and not for CONCURRENCY.
func TestConcurrencyCostsNothing(t *testing.T) {
	t.Parallel()
	db := testkit.DB(t)
	table := outboxTable(t, db)
	channel := testkit.ChannelName(t)
	gate := make(chan struct{})
	seen := &seen{}
	r := run(t, config{table: table, channel: channel, concurrency: 10_000}, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		_ = seen.Handle(ctx, n)
		<-gate
		return nil
	}))
	workers := func() int {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.workers
	}
	for n := 1; n <= 3; n++ { // all at once
		insert(t, db, table, channel, strconv.Itoa(n))
		testkit.Eventually(t, "another one runs", func() bool { return len(seen.payloads()) == n })
		if workers() != n {
			t.Errorf("%d goroutines for %d rows", workers(), n)
		}
	}
	close(gate)
	emptied(t, db, table)
	insert(t, db, table, channel, "4")
	emptied(t, db, table)
	if workers() != 3 {
		t.Errorf("there are %d goroutines now, 3 of which were idle", workers())
	}
}
