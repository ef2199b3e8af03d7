package main

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
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
	stale    []job         // claimed and not begun for too long: to be given back
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
	runAt    string    // before it was claimed, as the server writes it
	order    float64   // the same, in seconds
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
	o.giveBack(unbegun)
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
	expiry := time.NewTicker(o.margin / 2)
	defer expiry.Stop()
	var failures repeated
	pause := backoff{min: 100 * time.Millisecond, max: 5 * time.Second}
	stalled := 0 // times in a row that rows were due and could not be had
	for stop.Err() == nil {
		room := o.room()
		if room == 0 {
			select {
			case <-o.taken:
			case <-stop.Done():
			case <-expiry.C:
				o.expire()
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
		for asleep := true; asleep; {
			select {
			case <-timer.C:
				asleep = false
			case <-o.wake:
				asleep = false
			case <-stop.Done():
				asleep = false
			case <-expiry.C:
				o.expire()
			}
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
	if len(o.results) > prefetchRows {
		return 0 // the writer is behind, and is to catch up first
	}
	o.low = ahead / 2
	free := o.workers - o.running - len(o.buffer)
	if len(o.buffer) > o.low {
		return max(free, 0)
	}
	return max(free, ahead-len(o.buffer))
}

// expire has rows given back that were claimed ahead and wait for jobs that have turned slow:
// another replica may have a free slot, and their lease must outlive the handler.
func (o *outbox) expire() {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for n < len(o.buffer) && time.Since(o.buffer[n].claimed) > o.margin/2 {
		n++
	}
	o.stale = append(o.stale, o.buffer[:n]...)
	if n > 0 {
		o.buffer = slices.Clone(o.buffer[n:])
		o.handling = max(o.handling, o.margin) // or the same rows would be claimed again at once
		nudge(o.written)
	}
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
		o.buffer[0] = job{} // let go of the payload
		o.buffer = o.buffer[1:]
		if len(o.buffer) <= o.low {
			nudge(o.taken)
		}
		began := time.Now()
		if began.Sub(j.claimed) > o.margin {
			o.stale = append(o.stale, j)
			nudge(o.written)
			continue
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
		results, stale := o.results, o.stale
		o.results, o.stale = nil, nil
		o.mu.Unlock()
		if len(results) > prefetchRows {
			nudge(o.taken) // see room
		}
		o.giveBack(stale)
		for len(results) > 0 {
			rest, err := o.finish(results)
			results = rest
			if err == nil {
				failures.reset()
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

// giveBack returns claimed rows that were not begun, for whoever comes first.
func (o *outbox) giveBack(jobs []job) {
	if len(jobs) == 0 {
		return
	}
	if err := o.store.giveBack(jobs); err != nil {
		o.log.Warn("claimed rows could not be given back; they are due again when their lease ends", "rows", len(jobs), "error", err)
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.counts.givenBack += len(jobs)
}

// finish deletes the rows that are done, and sets when the others are tried again
// or that they have failed. Rows whose lease was lost stay as they are. It returns the
// results that could not be written.
func (o *outbox) finish(results []result) (rest []result, err error) {
	done := map[int][]result{} // by attempts, which is nearly always 1
	var failed []result
	for _, r := range results {
		if r.err == nil {
			done[r.attempts] = append(done[r.attempts], r)
		} else {
			failed = append(failed, r)
		}
	}
	for attempts, group := range done {
		ids := make([]int64, len(group))
		for i, r := range group {
			ids[i] = r.id
		}
		n, e := o.store.complete(ids, attempts)
		if e != nil {
			rest, err = append(rest, group...), e
			continue
		}
		o.tally(group, len(group)-n)
	}
	if len(failed) > 0 {
		again := make([]retry, len(failed))
		for i, r := range failed {
			again[i] = o.retryOf(r)
		}
		n, e := o.store.reschedule(again)
		if e != nil {
			return append(rest, failed...), e
		}
		o.tally(failed, len(failed)-n)
		o.poke() // the claimer may sleep until later
	}
	return rest, err
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

// tally counts and logs results that are written.
func (o *outbox) tally(results []result, lost int) {
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
			o.log.Warn("handler failed; the row will be tried again", "id", r.id, "attempt", r.attempts, "error", r.err)
		}
	}
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
