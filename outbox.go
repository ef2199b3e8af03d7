package main

import (
	"context"
	"database/sql"
	_ "embed"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// outboxes returns what makes the handler "outbox:HANDLER". A notification on
// its channel is only a hint: the work is the rows of a table, and every row is
// handled by HANDLER at least once, whatever is killed (DESIGN section 6). All
// channels share one table and two connections.
func outboxes() newHandler {
	var db *sql.DB // opened for the first channel; database/sql connects when it is used
	users := new(atomic.Int32)
	return func(arg string, e env) (Handler, error) {
		name, rest, _ := strings.Cut(arg, ":")
		inner, ok := e.table[name]
		if !ok || name == "outbox" {
			return nil, fmt.Errorf("outbox needs a handler: outbox:log, outbox:exec:PROGRAM, outbox:https://...; %q is none", name)
		}
		h, err := inner(rest, e)
		if err != nil {
			return nil, err
		}
		t, err := parseTable(e.cfg.OutboxTable)
		if err != nil {
			return nil, fmt.Errorf("OUTBOX_TABLE: %w", err)
		}
		if db == nil {
			if db, err = openDB(e.cfg.dsn(), e.cfg.PingTimeout); err != nil {
				return nil, err
			}
			db.SetMaxOpenConns(2) // one to claim, one to complete
			db.SetMaxIdleConns(2)
			db.SetConnMaxIdleTime(time.Minute)
		}
		users.Add(1)
		o := newOutbox(db, t, h, e)
		o.release = func() {
			if users.Add(-1) == 0 {
				db.Close()
			}
		}
		return o, nil
	}
}

// outbox drains the rows of one channel. Handle and CatchUp only wake it; Run does the work.
type outbox struct {
	channel  string
	handler  Handler
	log      *slog.Logger
	store    store
	release  func()        // closes the connections after the last channel
	workers  int           // CONCURRENCY
	timeout  time.Duration // HANDLER_TIMEOUT
	margin   time.Duration // how long a claimed row may wait before it is begun
	attempts int           // OUTBOX_ATTEMPTS
	retry    backoff

	wake chan struct{} // capacity 1: there may be something due

	mu       sync.Mutex
	buffer   []job         // claimed, not begun; in order
	ready    *sync.Cond    // of mu: the buffer has grown, or the end has come
	stopping bool          // begin nothing more
	running  int           // handlers
	low      int           // when the buffer is down to this, more is claimed
	results  []result      // not yet written
	written  chan struct{} // capacity 1: there are results
	taken    chan struct{} // capacity 1: the buffer has shrunk
	handling time.Duration // how long a handler takes, as a moving average
	size     int           // of a payload, likewise
	counts   outboxCounts
}

// job is a claimed row.
type job struct {
	id       int64
	payload  string
	attempts int
	runAt    string    // before it was claimed, as the server writes it: its place in the order
	claimed  time.Time // by our own clock, which never runs further than the lease
}

// result is what became of a job.
type result struct {
	job
	err error // nil: done
}

// outboxCounts are for the metrics.
type outboxCounts struct {
	done, retried, failed, leaseLost, givenBack int

	waiting, delayed, dead int // rows, when they were counted last
	oldest                 time.Duration
	counted                time.Time
}

// prefetch bounds what is claimed ahead.
const (
	prefetchTime  = 50 * time.Millisecond // of work, so that a row hardly waits where another replica could take it
	prefetchRows  = 2000
	prefetchBytes = 16 << 20
	countInterval = 15 * time.Second
)

func newOutbox(db *sql.DB, t table, h Handler, e env) *outbox {
	o := &outbox{
		channel:  e.channel,
		handler:  h,
		log:      e.log,
		workers:  e.cfg.Concurrency,
		timeout:  e.cfg.HandlerTimeout,
		margin:   10 * time.Second,
		attempts: e.cfg.OutboxAttempts,
		retry:    backoff{min: 2 * time.Second, max: time.Hour},
		wake:     make(chan struct{}, 1),
		written:  make(chan struct{}, 1),
		taken:    make(chan struct{}, 1),
	}
	o.ready = sync.NewCond(&o.mu)
	// The lease outlives the wait for a slot, the handler, its end after the time
	// limit, and the writing of the result.
	lease := o.margin + e.cfg.HandlerTimeout + e.cfg.HandlerTimeout/64 + e.cfg.killGrace() + o.margin
	o.store = store{db: db, table: t, channel: e.channel, lease: lease}
	return o
}

// Handle wakes the drain: rows were inserted.
func (o *outbox) Handle(context.Context, Notification) error {
	o.poke()
	return nil
}

// CatchUp wakes the drain: rows may have been inserted.
func (o *outbox) CatchUp(context.Context) error {
	o.poke()
	return nil
}

func (o *outbox) poke() { nudge(o.wake) }

// nudge leaves a token in a channel of capacity 1.
func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run implements Runner.
func (o *outbox) Run(stop, quit context.Context) {
	defer o.release()
	var workers, writer sync.WaitGroup
	for range o.workers {
		workers.Go(func() { o.work(quit) })
	}
	written := make(chan struct{})
	writer.Go(func() { o.write(quit, written) })

	o.claim(stop)

	o.mu.Lock()
	o.stopping = true
	unbegun := o.buffer
	o.buffer = nil
	o.ready.Broadcast()
	o.mu.Unlock()
	// What was not begun goes back at once, for another replica to take.
	if err := o.store.giveBack(unbegun); err != nil {
		o.log.Warn("claimed rows could not be given back; they are due again when their lease ends", "rows", len(unbegun), "error", err)
	} else {
		o.mu.Lock()
		o.counts.givenBack += len(unbegun)
		o.mu.Unlock()
	}
	finished := make(chan struct{})
	go func() {
		workers.Wait()
		close(finished)
	}()
	select {
	case <-finished:
	case <-quit.Done():
		// Handlers that obey their context are done in a moment, and their rows can still be
		// written as failed; the others' rows are due again when their lease ends.
		select {
		case <-finished:
		case <-time.After(2 * time.Second):
		}
	}
	close(written)
	writer.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.running > 0 {
		o.log.Error("handler still runs at the end; it does not obey its context. Its row comes due again", "running", o.running)
	}
}

// claim fetches due rows until stop ends.
func (o *outbox) claim(stop context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var failures repeated
	pause := backoff{min: 100 * time.Millisecond, max: 5 * time.Second}
	stalled := 0 // times in a row that rows were due and could not be had
	for stop.Err() == nil {
		room := o.room()
		if room == 0 {
			select {
			case <-o.taken:
			case <-stop.Done():
			}
			continue
		}
		jobs, err := o.store.claim(room)
		o.push(jobs)
		drained := len(jobs) < room
		if err == nil {
			err = o.count(drained)
		}
		if err == nil && !drained {
			failures.reset()
			continue
		}
		// Nothing more is due now. When is it?
		var next time.Duration
		if err == nil {
			next, err = o.store.nextDue()
		}
		if err != nil {
			attempt, worth := failures.count(err)
			if worth {
				o.log.Error("outbox cannot be read; trying again", "attempt", attempt, "error", err, "hint", o.store.table.hint(err))
			}
			sleep(stop, pause.after(attempt))
			continue
		}
		failures.reset()
		if stalled++; next > 0 || len(jobs) > 0 {
			stalled = 0
		}
		// Somebody else has locked what is due, and may hold it for long.
		timer.Reset(max(next, pause.after(stalled), time.Millisecond))
		select {
		case <-timer.C:
		case <-o.wake:
		case <-stop.Done():
		}
		timer.Stop()
	}
}

// room is how many rows to claim now; 0 means that there are enough.
func (o *outbox) room() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	// Slow jobs are claimed as slots come free, quick ones ahead, so that a
	// round trip to the server is not what they wait for.
	ahead := prefetchRows
	if o.handling > 0 {
		ahead = min(ahead, int(time.Duration(o.workers)*prefetchTime/o.handling))
	}
	if o.size > 0 {
		ahead = min(ahead, prefetchBytes/o.size)
	}
	if o.counts.done+o.counts.retried+o.counts.failed == 0 {
		ahead = 0 // nothing is known yet
	}
	o.low = ahead / 2
	free := o.workers - o.running - len(o.buffer)
	if len(o.buffer) > o.low {
		return max(free, 0)
	}
	return max(free, ahead-len(o.buffer))
}

func (o *outbox) push(jobs []job) {
	if len(jobs) == 0 {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.buffer = append(o.buffer, jobs...)
	if len(jobs) == 1 {
		o.ready.Signal()
	} else {
		o.ready.Broadcast()
	}
}

// work is one of CONCURRENCY goroutines: it handles one job after the other.
func (o *outbox) work(quit context.Context) {
	var d deadline
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for len(o.buffer) == 0 && !o.stopping {
			o.ready.Wait()
		}
		if o.stopping {
			return
		}
		j := o.buffer[0]
		o.buffer = o.buffer[1:]
		if len(o.buffer) <= o.low {
			nudge(o.taken)
		}
		began := time.Now()
		if began.Sub(j.claimed) > o.margin {
			continue // its lease might not outlive the handler; it comes due again by itself
		}
		o.running++
		o.mu.Unlock()
		n := Notification{id: strconv.FormatInt(j.id, 10), Channel: o.channel, Payload: j.payload, Attempt: j.attempts}
		err := callHandler(d.context(quit, began, o.timeout, o.log), o.handler.Handle, n, o.log)
		took := time.Since(began)
		d.end()
		o.mu.Lock()
		o.running--
		o.handling += (took - o.handling) / 8
		o.size += (len(j.payload) - o.size) / 8
		j.payload = ""
		o.results = append(o.results, result{j, err})
		nudge(o.written)
		if len(o.buffer) <= o.low {
			nudge(o.taken) // a slot is free
		}
	}
}

// write writes results, as many at once as have gathered while the last ones were written.
func (o *outbox) write(quit context.Context, last <-chan struct{}) {
	var failures repeated
	pause := backoff{min: 100 * time.Millisecond, max: 5 * time.Second}
	for ended := false; !ended; {
		select {
		case <-o.written:
		case <-last:
			ended = true
		}
		o.mu.Lock()
		results := o.results
		o.results = nil
		o.mu.Unlock()
		for len(results) > 0 {
			lost, err := o.finish(results)
			if err == nil {
				failures.reset()
				if o.tally(results, lost) {
					o.poke() // the claimer may sleep until later
				}
				break
			}
			attempt, worth := failures.count(err)
			if worth {
				o.log.Error("results of the outbox cannot be written; trying again", "attempt", attempt, "results", len(results), "error", err, "hint", o.store.table.hint(err))
			}
			if !sleep(quit, pause.after(attempt)) {
				o.log.Error("results of the outbox were not written: their rows come due again and are handled once more", "results", len(results), "error", err)
				break
			}
		}
	}
}

// finish deletes the rows that are done, and sets when the others are tried again
// or that they have failed. Rows whose lease was lost stay as they are; lost counts them.
func (o *outbox) finish(results []result) (lost int, err error) {
	done := map[int][]int64{} // by attempts, which is nearly always 1
	var again []retry
	for _, r := range results {
		if r.err == nil {
			done[r.attempts] = append(done[r.attempts], r.id)
			continue
		}
		again = append(again, o.retryOf(r))
	}
	for attempts, ids := range done {
		n, err := o.store.complete(ids, attempts)
		if err != nil {
			return lost, err
		}
		lost += len(ids) - n
	}
	if len(again) > 0 {
		n, err := o.store.reschedule(again)
		if err != nil {
			return lost, err
		}
		lost += len(again) - n
	}
	return lost, nil
}

// retry says when a row is tried again; not at all when it has failed.
type retry struct {
	id       int64
	attempts int
	wait     time.Duration
	failed   bool
	text     string
}

func (o *outbox) retryOf(r result) retry {
	wait := max(o.retry.after(r.attempts), retryAfter(r.err))
	return retry{
		id:       r.id,
		attempts: r.attempts,
		wait:     min(wait, time.Hour),
		failed:   isPermanent(r.err) || r.attempts >= o.attempts,
		text:     cutText(r.err.Error(), 2000),
	}
}

// tally counts and logs results that are written, and says whether some rows are to be tried again.
func (o *outbox) tally(results []result, lost int) (again bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.counts.leaseLost += lost
	if lost > 0 {
		o.log.Warn("lease lost: a handler took longer than its lease, and its row is another's now", "rows", lost)
	}
	for _, r := range results {
		switch {
		case r.err == nil:
			o.counts.done++
		case isPermanent(r.err) || r.attempts >= o.attempts:
			o.counts.failed++
			o.log.Error("gave up; the row stays in the outbox as failed", "id", r.id, "attempts", r.attempts, "error", r.err)
		default:
			o.counts.retried++
			again = true
			o.log.Warn("handler failed; the row will be tried again", "id", r.id, "attempt", r.attempts, "error", r.err)
		}
	}
	return again
}

// count counts the rows for the metrics, now and then: an idle outbox costs nothing.
// The first time waits until nothing is due: with a great backlog it takes long.
func (o *outbox) count(drained bool) error {
	o.mu.Lock()
	recent := time.Since(o.counts.counted) < countInterval
	if o.counts.counted.IsZero() && !drained {
		o.counts.counted, recent = time.Now(), true
	}
	o.mu.Unlock()
	if recent {
		return nil
	}
	waiting, delayed, dead, oldest, err := o.store.count()
	if err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.counts.waiting, o.counts.delayed, o.counts.dead, o.counts.oldest = waiting, delayed, dead, oldest
	o.counts.counted = time.Now()
	return nil
}

// Stats implements Meter.
func (o *outbox) Stats() []Stat {
	o.mu.Lock()
	c := o.counts
	o.mu.Unlock()
	return []Stat{
		{"pglistener_outbox_rows_waiting", "gauge", "Rows of the outbox that are due, when they were counted last.", float64(c.waiting)},
		{"pglistener_outbox_rows_delayed", "gauge", "Rows that are scheduled, to be tried again or being handled, likewise.", float64(c.delayed)},
		{"pglistener_outbox_rows_failed", "gauge", "Rows that were given up and wait for a person, likewise.", float64(c.dead)},
		{"pglistener_outbox_oldest_waiting_seconds", "gauge", "For how long the oldest due row has been due, likewise.", c.oldest.Seconds()},
		{"pglistener_outbox_jobs_done_total", "counter", "Rows whose handler succeeded.", float64(c.done)},
		{"pglistener_outbox_jobs_retried_total", "counter", "Rows whose handler failed and which are tried again.", float64(c.retried)},
		{"pglistener_outbox_jobs_failed_total", "counter", "Rows that were given up.", float64(c.failed)},
		{"pglistener_outbox_jobs_given_back_total", "counter", "Rows claimed and not begun when the listener stopped.", float64(c.givenBack)},
		{"pglistener_outbox_leases_lost_total", "counter", "Rows whose handler outlived its lease, so that its result was not written.", float64(c.leaseLost)},
	}
}

// Check implements Checker: it says whether the table fits.
func (o *outbox) Check(context.Context) (string, error) {
	if err := o.store.fit(); err != nil {
		hint := o.store.table.hint(err)
		if hint != "" {
			return "", fmt.Errorf("%w: %s", err, hint)
		}
		return "", err
	}
	return "table " + o.store.table.name + " fits", nil
}

// store is the SQL of the outbox. All times are the server's. There is no
// context: each statement is short, and the connection bounds it by PING_TIMEOUT; one that were
// cancelled while the server commits it would leave rows claimed by nobody.
type store struct {
	db      *sql.DB
	table   table
	channel string
	lease   time.Duration
}

// claim takes up to n due rows: one statement, which adds one to attempts and
// sets run_at to the end of the lease. No transaction stays open.
func (s store) claim(n int) ([]job, error) {
	began := time.Now()
	rows, err := s.db.Query(s.table.sql(`
		with due as materialized (
			select ctid as place, run_at as was from {table}
			where channel = $1 and failed_at is null and run_at <= now()
			order by run_at, id limit $2
			for update skip locked)
		update {table} o set attempts = attempts + 1, run_at = now() + $3 * interval '1 second'
		from due where o.ctid = due.place
		returning o.id, o.payload, o.attempts, due.was::text`), s.channel, n, s.lease.Seconds())
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	jobs := make([]job, 0, min(n, 100))
	for rows.Next() {
		j := job{claimed: began}
		if err := rows.Scan(&j.id, &j.payload, &j.attempts, &j.runAt); err != nil {
			return nil, err
		}
		jobs = append(jobs, j)
	}
	return jobs, rows.Err()
}

// nextDue is how long it is until the next row is due, which may be past; an hour if there is none.
func (s store) nextDue() (time.Duration, error) {
	var seconds sql.NullFloat64
	err := s.db.QueryRow(s.table.sql(`
		select extract(epoch from min(run_at) - clock_timestamp()) from {table}
		where channel = $1 and failed_at is null`), s.channel).Scan(&seconds)
	if err != nil || !seconds.Valid {
		return time.Hour, err
	}
	return min(time.Duration(seconds.Float64*float64(time.Second)), time.Hour), nil
}

// complete deletes rows that are still ours, and returns how many were.
func (s store) complete(ids []int64, attempts int) (int, error) {
	return s.exec(`delete from {table} where id = any($1) and attempts = $2`, pq.Int64Array(ids), attempts)
}

// reschedule writes failures to rows that are still ours, and returns how many were.
func (s store) reschedule(again []retry) (int, error) {
	var ids, attempts pq.Int64Array
	var waits pq.Float64Array
	var failed pq.BoolArray
	var texts pq.StringArray
	for _, r := range again {
		ids, attempts = append(ids, r.id), append(attempts, int64(r.attempts))
		waits, failed, texts = append(waits, r.wait.Seconds()), append(failed, r.failed), append(texts, r.text)
	}
	return s.exec(`
		update {table} o set
			run_at = now() + r.wait * interval '1 second',
			last_error = r.text,
			failed_at = case when r.failed then now() end
		from unnest($1::bigint[], $2::int[], $3::float8[], $4::bool[], $5::text[]) as r (id, attempts, wait, failed, text)
		where o.id = r.id and o.attempts = r.attempts`, ids, attempts, waits, failed, texts)
}

// giveBack undoes the claim of rows, and rings for whoever else listens.
func (s store) giveBack(jobs []job) error {
	if len(jobs) == 0 {
		return nil
	}
	var ids, attempts pq.Int64Array
	var was pq.StringArray
	for _, j := range jobs {
		ids, attempts, was = append(ids, j.id), append(attempts, int64(j.attempts)), append(was, j.runAt)
	}
	_, err := s.exec(`
		with back as (
			update {table} o set attempts = o.attempts - 1, run_at = r.was
			from unnest($1::bigint[], $2::int[], $3::timestamptz[]) as r (id, attempts, was)
			where o.id = r.id and o.attempts = r.attempts
			returning 1)
		select pg_notify($4, '') from (select 1 from back limit 1) one`, ids, attempts, was, s.channel)
	return err
}

// count counts this channel's rows. delayed are those that are scheduled, to be tried again or being handled.
func (s store) count() (waiting, delayed, dead int, oldest time.Duration, err error) {
	var seconds float64
	err = s.db.QueryRow(s.table.sql(`
		select count(*) filter (where run_at <= now()), count(*) filter (where run_at > now()),
			coalesce(extract(epoch from now() - min(run_at) filter (where run_at <= now())), 0),
			(select count(*) from {table} where channel = $1 and failed_at is not null)
		from {table} where channel = $1 and failed_at is null`), s.channel).Scan(&waiting, &delayed, &seconds, &dead)
	return waiting, delayed, dead, time.Duration(seconds * float64(time.Second)), err
}

// fit returns why the table cannot be used.
func (s store) fit() error {
	_, err := s.exec(`
		with fits as (select id::bigint, channel::text, payload::text, attempts::int, run_at::timestamptz, last_error::text, failed_at::timestamptz from {table} where false),
		claims as (update {table} set attempts = attempts, run_at = run_at, last_error = last_error, failed_at = failed_at where false returning 1),
		completes as (delete from {table} where false returning 1)
		select 1 from fits, claims, completes`)
	return err
}

func (s store) exec(query string, args ...any) (int, error) {
	res, err := s.db.Exec(s.table.sql(query), args...)
	if err != nil {
		return 0, err
	}
	n, err := res.RowsAffected()
	return int(n), err
}

// table is the name of the outbox's table and of what belongs to it.
type table struct {
	name     string // as in OUTBOX_TABLE
	replacer *strings.Replacer
}

// parseTable reads OUTBOX_TABLE: NAME or SCHEMA.NAME. A part that contains a dot is
// written in double quotes; upper and lower case are kept.
func parseTable(s string) (table, error) {
	var parts []string
	for rest := s; ; {
		var part string
		if strings.HasPrefix(rest, `"`) {
			end := strings.Index(rest[1:], `"`)
			if end < 0 {
				return table{}, fmt.Errorf("%q has an open quote", s)
			}
			part, rest = rest[1:1+end], rest[end+2:]
		} else {
			end := strings.IndexByte(rest, '.')
			if end < 0 {
				end = len(rest)
			}
			part, rest = rest[:end], rest[end:]
		}
		if part == "" || len(part) > maxChannel || !utf8.ValidString(part) || strings.ContainsAny(part, "\x00\"") {
			return table{}, fmt.Errorf("%q is not a table name: NAME or SCHEMA.NAME, of 1 to %d bytes each", s, maxChannel)
		}
		parts = append(parts, part)
		if rest == "" {
			break
		}
		if !strings.HasPrefix(rest, ".") || len(parts) == 2 {
			return table{}, fmt.Errorf("%q is not a table name: NAME or SCHEMA.NAME", s)
		}
		rest = rest[1:]
	}
	name := parts[len(parts)-1]
	schema := ""
	if len(parts) == 2 {
		schema = pq.QuoteIdentifier(parts[0]) + "."
	}
	// PostgreSQL would cut a name that is too long, perhaps to one that is taken.
	with := func(suffix string) string { return pq.QuoteIdentifier(cutText(name, maxChannel-len(suffix)) + suffix) }
	return table{name: s, replacer: strings.NewReplacer(
		"{table}", schema+pq.QuoteIdentifier(name),
		"{due}", with("_due"),
		"{failed}", with("_failed"),
		"{notify}", schema+with("_notify"),
		"{trigger}", with("_notify"),
	)}, nil
}

// sql puts the names into a statement.
func (t table) sql(query string) string { return t.replacer.Replace(query) }

//go:embed outbox.sql
var outboxSQL string

// schema is the SQL that makes the table.
func (t table) schema() string { return t.sql(outboxSQL) }

// printSchema is the flag -outbox-schema.
func printSchema(lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	var c Config
	problems := c.decode(func(name string) (string, bool) {
		if name != "OUTBOX_TABLE" { // the only one that matters here
			return "", false
		}
		return lookup(name)
	})
	t, err := parseTable(c.OutboxTable)
	if err != nil || len(problems) > 0 {
		fmt.Fprintln(stderr, "pglistener: OUTBOX_TABLE:", err)
		return exitUsage
	}
	fmt.Fprint(stdout, t.schema())
	return exitOK
}

// hint says how to mend what the server objects to.
func (t table) hint(err error) string {
	switch {
	case pq.As(err, pqerror.UndefinedTable, pqerror.UndefinedColumn, pqerror.InvalidSchemaName) != nil:
		return `make it: OUTBOX_TABLE=` + t.name + ` pglistener -outbox-schema | psql "$DATABASE_URL"`
	case pq.As(err, pqerror.InsufficientPrivilege) != nil:
		return t.sql("as its owner: grant select, update, delete on {table} to the user in DATABASE_URL")
	}
	return advice(err).text
}

// cutText cuts s to at most n bytes, not within a character.
func cutText(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
