package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// outboxTable makes a table of this test's own and returns its name.
func outboxTable(t *testing.T, db *sql.DB) string {
	t.Helper()
	name := channelName(t)
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
	tab, err := parseTable(name)
	if err != nil {
		t.Fatal(err)
	}
	execSQL(t, db, tab.schema())
}

func sending(table string, more ...vars) vars {
	v := vars{"OUTBOX_TABLE": table, "CATCH_UP_INTERVAL": "0"}
	for _, m := range more {
		for name, value := range m {
			v[name] = value
		}
	}
	return v
}

// withOutbox is a handler table in which "outbox:NAME" leads to a handler.
func withOutbox(name string, h Handler) map[string]newHandler {
	return map[string]newHandler{
		"outbox": outboxes(),
		name:     func(string, env) (Handler, error) { return h, nil },
	}
}

func rowCount(t *testing.T, db *sql.DB, table string) int {
	t.Helper()
	var n int
	if err := db.QueryRowContext(t.Context(), `select count(*) from "`+table+`"`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// emptied waits until the outbox is.
func emptied(t *testing.T, db *sql.DB, table string) {
	t.Helper()
	eventually(t, "the outbox is not emptied", func() bool { return rowCount(t, db, table) == 0 })
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
	list []Notification
}

func (s *seen) Handle(_ context.Context, n Notification) error {
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

func TestOutboxHandlesRowsInOrder(t *testing.T) {
	t.Parallel()
	channel, tab, s := channelName(t), outboxTable(t, sharedDB), &seen{}
	var want []string
	for i := range 300 {
		insert(t, sharedDB, tab, channel, strconv.Itoa(i)) // before anybody listens
		want = append(want, strconv.Itoa(i))
	}
	insert(t, sharedDB, tab, "another channel", "not ours")
	start(t, fast(sharedDSN, channel+"=outbox:seen", sending(tab)), withOutbox("seen", s)).listening(t)
	eventually(t, "what was there at the start is not handled", func() bool { return len(s.payloads()) == 300 })
	for i := range 300 {
		insert(t, sharedDB, tab, channel, strconv.Itoa(i)) // now by notification
		want = append(want, strconv.Itoa(i))
	}
	eventually(t, "not all were handled", func() bool { return len(s.payloads()) == 600 })
	if !slices.Equal(s.payloads(), want) {
		t.Error("not in order")
	}
	eventually(t, "rows are left", func() bool { return rowCount(t, sharedDB, tab) == 1 })
}

func TestOutboxIDAndAttempt(t *testing.T) {
	t.Parallel()
	channel, tab := channelName(t), outboxTable(t, sharedDB)
	h, lg := script(t, `echo "$PGLISTENER_ID $PGLISTENER_ATTEMPT $(wc -c)"; test "$PGLISTENER_ATTEMPT" = 2`)
	r := start(t, fast(sharedDSN, channel+"=outbox:script", sending(tab)), withOutbox("script", h), quickRetry).listening(t)
	id := insert(t, sharedDB, tab, channel, strings.Repeat("x", 5<<20)) // no notification could hold it
	emptied(t, sharedDB, tab)
	r.wait(t, "handler failed; the row will be tried again", 1)
	for attempt := 1; attempt <= 2; attempt++ {
		if got, want := lg.wait(t, "output", attempt)["line"], fmt.Sprintf("%d %d %d", id, attempt, 5<<20); got != want {
			t.Errorf("the program saw %q, want %q", got, want)
		}
	}
}

// quickRetry makes the outbox of a Listener try again soon.
func quickRetry(l *Listener) {
	for _, h := range l.handlers {
		if o, ok := h.(*outbox); ok {
			o.retry = backoff{min: 20 * time.Millisecond, max: 50 * time.Millisecond}
		}
	}
}

func TestOutboxReplicasShareRows(t *testing.T) {
	t.Parallel()
	channel, tab, s := channelName(t), outboxTable(t, sharedDB), &seen{}
	byWhom := [2]atomic.Int64{}
	for i := range 2 {
		h := HandlerFunc(func(ctx context.Context, n Notification) error {
			byWhom[i].Add(1)
			time.Sleep(100 * time.Microsecond) // work
			return s.Handle(ctx, n)
		})
		start(t, fast(sharedDSN, channel+"=outbox:seen", sending(tab, vars{"CONCURRENCY": "4"})), withOutbox("seen", h)).listening(t)
	}
	const total = 2000
	for i := range 20 {
		execSQL(t, sharedDB, `insert into "`+tab+`" (channel, payload) select $1, ($2 + i)::text from generate_series(1, 100) i`, channel, i*100)
	}
	emptied(t, sharedDB, tab)
	got := s.payloads()
	slices.Sort(got)
	if n := len(slices.Compact(slices.Clone(got))); n != total || len(got) != total {
		t.Errorf("%d handled, %d different, of %d", len(got), n, total)
	}
	if byWhom[0].Load() == 0 || byWhom[1].Load() == 0 {
		t.Errorf("one did it all: %d, %d", byWhom[0].Load(), byWhom[1].Load())
	}
}

func TestOutboxFencesLostLease(t *testing.T) {
	t.Parallel()
	channel, tab := channelName(t), outboxTable(t, sharedDB)
	gate, began := make(chan struct{}), make(chan struct{}, 10)
	r := start(t, fast(sharedDSN, channel+"=outbox:slow", sending(tab)), withOutbox("slow", HandlerFunc(func(context.Context, Notification) error {
		began <- struct{}{}
		<-gate
		return nil
	}))).listening(t)
	id := insert(t, sharedDB, tab, channel, "x")
	<-began
	// The lease ends and another replica takes the row.
	execSQL(t, sharedDB, `update "`+tab+`" set attempts = attempts + 1, run_at = now() + interval '1 hour', last_error = 'mine now' where id = $1`, id)
	close(gate)
	r.wait(t, "lease lost", 1)
	var attempts int
	var text string
	if err := sharedDB.QueryRow(`select attempts, last_error from "`+tab+`" where id = $1`, id).Scan(&attempts, &text); err != nil {
		t.Fatalf("the row was taken from its new owner: %v", err)
	}
	if attempts != 2 || text != "mine now" {
		t.Errorf("the row was changed: %d attempts, %q", attempts, text)
	}
}

func TestOutboxScheduledRows(t *testing.T) {
	t.Parallel()
	channel, tab := channelName(t), outboxTable(t, sharedDB)
	type run struct {
		payload string
		at      time.Time
	}
	runs := make(chan run, 10)
	start(t, fast(sharedDSN, channel+"=outbox:timed", sending(tab)), withOutbox("timed", HandlerFunc(func(_ context.Context, n Notification) error {
		runs <- run{n.Payload, time.Now()}
		return nil
	}))).listening(t)
	due := func(payload string, after time.Duration) time.Time {
		t.Helper()
		var at time.Time
		err := sharedDB.QueryRow(`insert into "`+tab+`" (channel, payload, run_at) values ($1, $2, clock_timestamp() + $3 * interval '1 second') returning run_at`,
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
		case <-time.After(patience):
			t.Fatalf("%s never ran", want.payload)
		}
	}
}

func TestOutboxPoisonRowHoldsUpNobody(t *testing.T) {
	t.Parallel()
	channel, tab, s := channelName(t), outboxTable(t, sharedDB), &seen{}
	r := start(t, fast(sharedDSN, channel+"=outbox:picky", sending(tab, vars{"OUTBOX_ATTEMPTS": "3"})),
		withOutbox("picky", HandlerFunc(func(ctx context.Context, n Notification) error {
			switch n.Payload {
			case "poison":
				return errors.New("cannot digest")
			case "hopeless":
				return Permanent(errors.New("never"))
			}
			return s.Handle(ctx, n)
		})), quickRetry).listening(t)
	insert(t, sharedDB, tab, channel, "poison")
	insert(t, sharedDB, tab, channel, "hopeless")
	for i := range 50 {
		insert(t, sharedDB, tab, channel, strconv.Itoa(i))
	}
	eventually(t, "the others were held up", func() bool { return len(s.payloads()) == 50 })
	r.wait(t, "gave up; the row stays", 2)
	for payload, want := range map[string]string{"poison": "3 cannot digest", "hopeless": "1 never"} {
		var got string
		err := sharedDB.QueryRow(`select attempts || ' ' || last_error from "`+tab+`" where payload = $1 and failed_at is not null`, payload).Scan(&got)
		if err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", payload, got, err, want)
		}
	}
	// As README tells a team to put it back.
	execSQL(t, sharedDB, `update "`+tab+`" set failed_at = null, attempts = 0, run_at = now(), payload = 'cured' where failed_at is not null and payload = 'poison'`)
	notify(t, channel, "")
	eventually(t, "what was put back is not handled", func() bool { return slices.Contains(s.payloads(), "cured") })
}

func TestOutboxSlowJobHoldsOnlyItsSlot(t *testing.T) {
	t.Parallel()
	channel, tab, s := channelName(t), outboxTable(t, sharedDB), &seen{}
	gate := make(chan struct{})
	defer close(gate)
	start(t, fast(sharedDSN, channel+"=outbox:mixed", sending(tab, vars{"CONCURRENCY": "3"})),
		withOutbox("mixed", HandlerFunc(func(ctx context.Context, n Notification) error {
			if n.Payload == "slow" {
				select {
				case <-gate:
				case <-ctx.Done():
				}
			}
			return s.Handle(ctx, n)
		}))).listening(t)
	insert(t, sharedDB, tab, channel, "slow")
	insert(t, sharedDB, tab, channel, "slow")
	for i := range 500 {
		insert(t, sharedDB, tab, channel, strconv.Itoa(i))
	}
	eventually(t, "the quick jobs wait for the slow ones", func() bool { return len(s.payloads()) == 500 })
}

func TestOutboxGivesBackAtShutdown(t *testing.T) {
	t.Parallel()
	channel, tab, s := channelName(t), outboxTable(t, sharedDB), &seen{}
	gate := make(chan struct{})
	var handled atomic.Int64
	h := HandlerFunc(func(ctx context.Context, n Notification) error {
		if handled.Add(1) > 20 { // the first are quick, so that many more are claimed ahead
			select {
			case <-gate:
			case <-ctx.Done():
			}
		}
		return s.Handle(ctx, n)
	})
	const total = 2000
	execSQL(t, sharedDB, `insert into "`+tab+`" (channel, payload) select $1, i::text from generate_series(1, $2) i`, channel, total)
	r := start(t, fast(sharedDSN, channel+"=outbox:h", sending(tab)), withOutbox("h", h)).listening(t)
	eventually(t, "nothing is claimed ahead", func() bool {
		o := r.listener.handlers[channel].(*outbox)
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.running == 1 && len(o.buffer) > 10
	})
	other := &seen{}
	start(t, fast(sharedDSN, channel+"=outbox:other", sending(tab)), withOutbox("other", other)).listening(t)
	stopped := make(chan int, 1)
	go func() { stopped <- r.stop() }()
	r.wait(t, "shutting down", 1)
	close(gate)
	if n := <-stopped; n != 0 {
		t.Errorf("%d abandoned", n)
	}
	emptied(t, sharedDB, tab) // well within the lease of 40 s
	all := append(s.payloads(), other.payloads()...)
	slices.Sort(all)
	if len(all) != total || len(slices.Compact(all)) != total {
		t.Errorf("%d handled of %d", len(all), total)
	}
	if n := other.list[0].Attempt; n != 1 {
		t.Errorf("what was given back is at attempt %d, want 1", n)
	}
}

// A job that turns slow must not keep from other replicas what was claimed ahead of it.
func TestOutboxGivesBackWhatWaitsTooLong(t *testing.T) {
	t.Parallel()
	channel, tab, s := channelName(t), outboxTable(t, sharedDB), &seen{}
	gate := make(chan struct{})
	defer close(gate)
	var handled atomic.Int64
	const total = 500
	execSQL(t, sharedDB, `insert into "`+tab+`" (channel, payload) select $1, i::text from generate_series(1, $2) i`, channel, total)
	execSQL(t, sharedDB, `update "`+tab+`" set run_at = '-infinity' where payload = '1'`) // the first of all
	stuck := start(t, fast(sharedDSN, channel+"=outbox:h", sending(tab)), withOutbox("h", HandlerFunc(func(ctx context.Context, n Notification) error {
		if handled.Add(1) > 20 {
			select {
			case <-gate:
			case <-ctx.Done():
			}
		}
		return s.Handle(ctx, n)
	})), func(l *Listener) { l.handlers[channel].(*outbox).margin = time.Second }).listening(t)
	eventually(t, "nothing is claimed ahead", func() bool {
		o := stuck.listener.handlers[channel].(*outbox)
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.running == 1 && len(o.buffer) > 10
	})
	start(t, fast(sharedDSN, channel+"=outbox:s", sending(tab)), withOutbox("s", s)).listening(t)
	eventually(t, "the other replica does not get it", func() bool { return len(s.payloads()) == total-1 })
	if got := s.payloads()[0]; got != "1" {
		t.Errorf("the row that was due since ever came after %s", got)
	}
}

func TestOutboxSurvivesLossOfItsTable(t *testing.T) {
	t.Parallel()
	channel, s := channelName(t), &seen{}
	tab := channelName(t)
	dropLater(t, sharedDB, tab)
	r := start(t, fast(sharedDSN, channel+"=outbox:seen", sending(tab)), withOutbox("seen", s)).listening(t)
	line := r.wait(t, "outbox cannot be read", 1) // not made yet
	if want := "OUTBOX_TABLE=" + tab + " pglistener -outbox-schema | psql"; !strings.Contains(line["hint"].(string), want) {
		t.Errorf("no %q in %v", want, line)
	}
	makeOutbox(t, sharedDB, tab)
	insert(t, sharedDB, tab, channel, "one")
	emptied(t, sharedDB, tab)
	execSQL(t, sharedDB, `drop table "`+tab+`"`)
	notify(t, channel, "")
	r.wait(t, "outbox cannot be read", 2)
	makeOutbox(t, sharedDB, tab)
	insert(t, sharedDB, tab, channel, "two")
	emptied(t, sharedDB, tab)
	if got := s.payloads(); !slices.Equal(got, []string{"one", "two"}) {
		t.Errorf("handled %v", got)
	}
}

func TestIdleOutboxCostsNoQueries(t *testing.T) {
	t.Parallel()
	s := ownServer(t)
	db := testDB(t, s.DSN())
	makeOutbox(t, db, "outbox")
	channel := channelName(t)
	start(t, fast(s.DSN(), channel+"=outbox:seen", vars{"PROBE_INTERVAL": "0"}), withOutbox("seen", &seen{})).listening(t)
	insert(t, db, "outbox", channel, "x")
	emptied(t, db, "outbox")
	statements := func() (n int) {
		t.Helper()
		execSQL(t, db, "select pg_stat_clear_snapshot()")
		// Each statement is a transaction; this one, and autovacuum's in other databases, aside.
		if err := db.QueryRow("select xact_commit from pg_stat_database where datname = 'postgres'").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	time.Sleep(1500 * time.Millisecond) // what was done before is counted by then
	before := statements()
	time.Sleep(3 * time.Second) // that nothing happens is the point
	// Ours: two and two; pings every second count too.
	if n := statements() - before; n > 10 {
		t.Errorf("%d transactions in 3 s of idleness", n)
	}
}

func TestOutboxSchemaWithOddNames(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("ä", 31) // 62 bytes
	for i, name := range []string{`odd "x`, `"Odd Schema"."tab.le"`, `"Odd Schema".` + long, "a.b.c", ".", `a."`, strings.Repeat("x", 64)} {
		tab, err := parseTable(name)
		if valid := i == 1 || i == 2; (err == nil) != valid {
			t.Errorf("%s: %v", name, err)
		} else if !valid {
			continue
		}
		execSQL(t, sharedDB, `create schema if not exists "Odd Schema"`)
		cmd := exec.Command(program, "-outbox-schema")
		cmd.Env = []string{"OUTBOX_TABLE=" + name}
		out, err := cmd.Output()
		if err != nil || string(out) != tab.schema() {
			t.Fatalf("%s: %v", name, err)
		}
		execSQL(t, sharedDB, string(out))
		execSQL(t, sharedDB, string(out)) // again
		channel, s := channelName(t)+strconv.Itoa(i), &seen{}
		start(t, fast(sharedDSN, channel+"=outbox:seen", sending(name)), withOutbox("seen", s)).listening(t)
		execSQL(t, sharedDB, tab.sql("insert into {table} (channel, payload) values ($1, 'x')"), channel)
		eventually(t, "not handled", func() bool { return len(s.payloads()) == 1 })
	}
}

func TestOutboxLeastPrivileges(t *testing.T) {
	t.Parallel()
	tab := outboxTable(t, sharedDB)
	channel, s := channelName(t), &seen{}
	role := "r" + strconv.FormatInt(time.Now().UnixNano(), 36)
	execSQL(t, sharedDB, "create role "+role+" login password 'x'")
	t.Cleanup(func() { _, _ = sharedDB.Exec("drop owned by " + role + "; drop role " + role) })
	dsn := withUser(sharedDSN, role, "x")
	out := check(t, fast(dsn, channel+"=outbox:log", sending(tab)), exitFailed)
	if !strings.Contains(out, "grant select, update, delete on") {
		t.Errorf("no help: %s", out)
	}
	execSQL(t, sharedDB, `grant select, update, delete on "`+tab+`" to `+role)
	out = check(t, fast(dsn, channel+"=outbox:log", sending(tab)), exitOK)
	if !strings.Contains(out, "table "+tab+" fits") {
		t.Errorf("%s", out)
	}
	start(t, fast(dsn, channel+"=outbox:seen", sending(tab)), withOutbox("seen", s)).listening(t)
	insert(t, sharedDB, tab, channel, "x")
	emptied(t, sharedDB, tab)
}

func TestOutboxUsesTwoConnections(t *testing.T) {
	t.Parallel()
	tab, channel := outboxTable(t, sharedDB), channelName(t)
	var most atomic.Int64
	r := start(t, fast(withParams(sharedDSN, "application_name", channel), channel+"=outbox:h", sending(tab, vars{"CONCURRENCY": "50", "PROBE_INTERVAL": "0"})),
		withOutbox("h", HandlerFunc(func(context.Context, Notification) error { return nil }))).listening(t)
	_ = r
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 10 {
			_, _ = sharedDB.Exec(`insert into "`+tab+`" (channel) select $1 from generate_series(1, 2000)`, channel)
		}
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
			most.Store(max(most.Load(), int64(len(backends(t, sharedDB, channel)))))
		}
	}
	emptied(t, sharedDB, tab)
	if n := most.Load(); n > 3 { // one of them listens
		t.Errorf("%d connections", n)
	}
}

func TestOutboxBehindTransactionPooler(t *testing.T) {
	t.Parallel()
	if sharedServer == nil {
		skip(t, "needs a local server; TEST_DATABASE_URL is set")
	}
	tab, channel, s := outboxTable(t, sharedDB), channelName(t), &seen{}
	r := start(t, probing(bouncer(t, sharedServer, "transaction"), channel+"=outbox:seen", sending(tab, vars{"CONCURRENCY": "4"})), withOutbox("seen", s))
	r.wait(t, "notifications do not arrive", 2)
	for i := range 500 {
		insert(t, sharedDB, tab, channel, strconv.Itoa(i))
	}
	emptied(t, sharedDB, tab) // at the pace of the probes
	if n := len(s.payloads()); n != 500 {
		t.Errorf("%d handled", n)
	}
}

// TestOutboxChaos kills everything at any time: every committed row is handled at least
// once, no row that was rolled back ever is, and the table ends empty.
func TestOutboxChaos(t *testing.T) {
	t.Parallel()
	s := ownServer(t)
	db := testDB(t, s.DSN())
	makeOutbox(t, db, "outbox")
	channel := channelName(t)
	dir := t.TempDir()
	out := filepath.Join(dir, "handled")
	worker := filepath.Join(dir, "worker")
	// Fails at random; what it has handled is a line, appended at once.
	if err := os.WriteFile(worker, []byte("#!/bin/sh\nread -r payload\n[ $(($(od -An -N1 -tu1 /dev/urandom) % 20)) = 0 ] && exit 1\necho \"$payload\" >> "+out+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	v := fast(s.DSN(), channel+"=outbox:exec:"+worker, vars{
		"CONCURRENCY": "4", "HANDLER_TIMEOUT": "1s", "PROBE_INTERVAL": "1s", "CATCH_UP_INTERVAL": "1s", "SHUTDOWN_TIMEOUT": "1s",
	})

	const total, writers = 5000, 5
	committed := make(chan string, total)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := 0; i < total/writers; {
				payload := fmt.Sprintf("w%d-%d", w, i)
				rollback := rand.N(5) == 0
				if rollback {
					payload = "rolled back " + payload
				}
				tx, err := db.Begin()
				if err != nil {
					time.Sleep(10 * time.Millisecond) // the server is away
					continue
				}
				_, err = tx.Exec("insert into outbox (channel, payload) values ($1, $2 || E'\\n')", channel, payload)
				if err != nil || rollback {
					_ = tx.Rollback()
					continue
				}
				if tx.Commit() == nil {
					committed <- payload
					i++
				} // else nobody knows; the row may be there, under the same name as its successor
			}
		})
	}
	replicas := make([]*process, 2)
	for i := range replicas {
		replicas[i] = runProgram(t, v)
	}
	writing := make(chan struct{})
	go func() {
		wg.Wait()
		close(writing)
	}()
	faults := 0
	for done := false; !done || faults < 6; faults++ {
		select {
		case <-writing:
			done = true
		default:
		}
		time.Sleep(300 * time.Millisecond) // between two faults
		switch faults % 3 {
		case 0:
			i := rand.N(len(replicas))
			_ = replicas[i].cmd.Process.Signal(syscall.SIGKILL)
			replicas[i] = runProgram(t, v)
		case 1:
			_, _ = db.Exec("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pglistener'")
		case 2:
			if err := s.Stop(); err != nil {
				t.Fatal(err)
			}
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
		}
	}
	<-writing
	close(committed)
	// The leases of the killed end after margin + timeout + margin, 22 s; retries take a while.
	deadline := time.Now().Add(90 * time.Second)
	for {
		var n int
		if err := db.QueryRow("select count(*) from outbox").Scan(&n); err == nil && n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d rows are left", n)
		}
		time.Sleep(50 * time.Millisecond)
	}
	for _, p := range replicas {
		p.signal(t, syscall.SIGTERM)
		p.exit(t, exitOK, stopBound)
	}
	handled := map[string]int{}
	for line := range strings.Lines(readFile(t, out)) {
		handled[strings.TrimSpace(line)]++
	}
	repeats := 0
	for payload, n := range handled {
		if strings.HasPrefix(payload, "rolled back") {
			t.Errorf("%q was handled", payload)
		}
		repeats += n - 1
	}
	missing := 0
	for payload := range committed {
		if handled[payload] == 0 {
			missing++
		}
	}
	t.Logf("%d committed rows, %d repeats, %d missing, after %d faults", total, repeats, missing, faults)
	if missing > 0 {
		t.Errorf("%d committed rows were never handled", missing)
	}
}
