package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// worker owns the queue of one channel and the goroutines that empty it. It keeps
// the order, limits how many handlers run at once and for how long, repeats what
// failed and survives what panicked.
//
// offer, requestCatchUp and the other methods never block for long: the select
// loop calls them. Handlers run on the worker's own goroutines, which exist only
// while there is work.
type worker struct {
	channel  string
	handle   handle
	catchUp  handle // nil when the handler cannot; its notification has no payload
	doorbell bool   // a notification is a request to catch up and nothing else
	limits   limits
	log      *slog.Logger
	quit     context.Context // ends when shutting down has taken too long: nothing is begun or repeated afterwards
	room     chan struct{}   // capacity 1: after a refused offer, a token says that half the queue is free

	mu       sync.Mutex
	queue    fifo
	running  int           // goroutines
	spare    []*deadline   // of goroutines that have ended, for the next ones
	done     chan struct{} // see drained
	rung     bool          // a catch-up waits
	catching bool          // a catch-up runs
	stalled  bool          // an offer was refused, and the queue is still more than half full
	fullAt   time.Time     // when an overflow began; zero when there is none
	calm     *time.Timer   // ends the overflow when the queue has stayed empty
	dropped  int           // in this overflow
	missed   bool          // something was dropped since the last catch-up
	counts   counts
}

// counts are a worker's totals since the start.
type counts struct {
	received, handled, failed, retried, gaveUp, dropped, abandoned int

	caughtUp int       // catch-ups that succeeded
	seconds  histogram // of every call
}

// handle is the type of Handler.Handle.
type handle func(context.Context, Notification) error

// limits are what Config says of every worker.
type limits struct {
	queue       int           // QUEUE_SIZE
	drop        bool          // OVERFLOW=drop
	concurrency int           // CONCURRENCY
	timeout     time.Duration // HANDLER_TIMEOUT
	attempts    int           // HANDLER_ATTEMPTS
	retry       backoff       // between attempts
}

func newWorker(quit context.Context, channel string, h Handler, doorbell bool, l limits, log *slog.Logger) *worker {
	w := &worker{
		channel: channel, handle: h.Handle, doorbell: doorbell, limits: l,
		log: log.With("channel", channel), quit: quit, room: make(chan struct{}, 1),
	}
	w.calm = time.AfterFunc(overflowCalm, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.endOverflow()
	})
	w.calm.Stop()
	if c, ok := h.(CatchUper); ok {
		w.catchUp = func(ctx context.Context, _ Notification) error { return c.CatchUp(ctx) }
	}
	if doorbell {
		w.catchUp = h.Handle
		w.limits.concurrency = 1
	}
	return w
}

// offer takes n, or returns false: the queue is full, try again when room says so.
// With OVERFLOW=drop, and once quit has ended, it takes everything.
func (w *worker) offer(n Notification) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.doorbell {
		w.counts.received++
		w.ring()
		return true
	}
	if w.quit.Err() != nil {
		w.abandon(n, errShutdownTimeout)
		return true
	}
	if w.queue.len() < w.limits.queue {
		w.counts.received++
		w.queue.push(n)
		w.start()
		return true
	}
	w.stalled = true
	w.calm.Stop()
	if w.fullAt.IsZero() {
		w.fullAt = time.Now()
		if w.limits.drop {
			w.log.Warn("queue full: new notifications are dropped until there is room", "queue", w.limits.queue)
		} else {
			w.log.Warn("queue full: reading stopped on all channels, the server buffers until there is room", "queue", w.limits.queue)
		}
	}
	if w.limits.drop {
		w.counts.received++
		w.counts.dropped++
		w.dropped, w.missed = w.dropped+1, true
	}
	return w.limits.drop
}

// requestCatchUp has the handler catch up, if it can; requests that wait are merged into one.
func (w *worker) requestCatchUp() {
	if w.catchUp == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ring()
}

func (w *worker) ring() {
	w.rung = true
	w.start()
}

// stats returns how many notifications wait, and the totals.
func (w *worker) stats() (waiting int, c counts) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.queue.len(), w.counts
}

// drained returns a channel that is closed once nothing waits and nothing runs.
// Call it once, when no more is offered.
func (w *worker) drained() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = make(chan struct{})
	if w.running == 0 {
		close(w.done)
	}
	return w.done
}

// abandonRest logs what still waits and returns how much was never handled to
// its end. Call it last, after quit has ended.
func (w *worker) abandonRest() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.queue.len() > 0 {
		w.abandon(w.queue.pop(), errShutdownTimeout)
	}
	w.endOverflow()
	if w.running > 0 {
		w.log.Error("handler still runs at the end; it does not obey its context", "running", w.running)
	}
	return w.counts.abandoned + w.running
}

// start sees to it that somebody works. w.mu is held.
func (w *worker) start() {
	if w.running < w.limits.concurrency {
		w.running++
		go w.run()
	}
}

// run works until there is nothing left to do.
func (w *worker) run() {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := &deadline{}
	if n := len(w.spare); n > 0 {
		d, w.spare = w.spare[n-1], w.spare[:n-1]
	}
	defer func() { w.spare = append(w.spare, d) }()
	for w.quit.Err() == nil {
		if w.rung && !w.catching {
			w.rung, w.catching = false, true
			if w.do(d, w.catchUp, Notification{Channel: w.channel, id: nonce()}) {
				w.counts.caughtUp++
			}
			w.catching = false
		} else if w.queue.len() > 0 {
			n := w.queue.pop()
			w.relax()
			if w.do(d, w.handle, n) {
				w.counts.handled++
			}
		} else {
			break
		}
	}
	w.running--
	if w.running == 0 && w.done != nil {
		close(w.done)
	}
}

// relax ends an overflow step by step as the queue empties. w.mu is held.
func (w *worker) relax() {
	if w.stalled && w.queue.len() <= w.limits.queue/2 {
		w.stalled = false
		select {
		case w.room <- struct{}{}:
		default:
		}
		if w.missed && w.catchUp != nil {
			w.rung, w.missed = true, false
		}
	}
	if !w.fullAt.IsZero() && w.queue.len() == 0 {
		// A queue that fills again and again is one overflow, not a thousand.
		w.calm.Reset(overflowCalm)
	}
}

// overflowCalm is how long a queue must not have been full again before its overflow is over.
const overflowCalm = time.Second

// endOverflow says so in the log, if there was one and it is over. w.mu is held.
func (w *worker) endOverflow() {
	if w.fullAt.IsZero() || w.stalled {
		return
	}
	w.log.Info("queue drained", "full_for", time.Since(w.fullAt).Round(time.Millisecond), "dropped", w.dropped)
	w.fullAt, w.dropped = time.Time{}, 0
}

// do calls f with n until it succeeds, which it returns, or nothing more can be
// done. w.mu is held on entry and on return, and not while f runs.
func (w *worker) do(d *deadline, f handle, n Notification) (ok bool) {
	for n.Attempt = 1; ; n.Attempt++ {
		w.mu.Unlock()
		began := time.Now()
		err := callHandler(d.context(w.quit, began, w.limits.timeout, w.log), f, n, w.log)
		took := time.Since(began)
		d.end()
		w.mu.Lock()
		w.counts.seconds.observe(took)
		if err == nil {
			return true
		}
		w.counts.failed++
		switch {
		case w.quit.Err() != nil:
			w.abandon(n, err)
			return false
		case n.Attempt >= w.limits.attempts || isPermanent(err):
			w.counts.gaveUp++
			w.log.Error("gave up", "payload", n.Payload, "backend", n.PID, "attempts", n.Attempt, "error", err)
			return false
		}
		w.counts.retried++
		// What comes after it waits too, so it is not for the receiver to say for how long.
		wait := max(w.limits.retry.after(n.Attempt), min(retryAfter(err), w.limits.retry.max))
		w.mu.Unlock()
		w.log.Warn("handler failed", "attempt", n.Attempt, "again_in", wait.Round(time.Millisecond), "error", err)
		quit := !sleep(w.quit, wait)
		w.mu.Lock()
		if quit {
			w.abandon(n, err)
			return false
		}
	}
}

// callHandler calls f once and turns a panic into an error.
func callHandler(ctx context.Context, f handle, n Notification, log *slog.Logger) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
			log.Error("handler panicked", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	return f(ctx, n)
}

// abandon leaves a trace of what nobody will handle. w.mu is held.
func (w *worker) abandon(n Notification, cause error) {
	w.counts.abandoned++
	w.log.Error("abandoned", "payload", n.Payload, "backend", n.PID, "error", cause)
}

// The causes of the end of a handler's context.
var (
	errHandlerTimeout  = errors.New("HANDLER_TIMEOUT has passed")
	errShutdownTimeout = errors.New("SHUTDOWN_TIMEOUT has passed")
)

// overrunGrace is how long after its time limit a handler may still run before the log says so.
const overrunGrace = 5 * time.Second

// deadline makes contexts with a time limit, for one call after the other. Making one costs
// more than many a handler does, so calls that begin within a 64th of the limit
// share one: each has at least its limit and at most a 64th more.
type deadline struct {
	ctx    context.Context
	cancel context.CancelFunc
	until  time.Time    // when ctx is too old for another call
	began  atomic.Int64 // of the call that runs, in Unix nanoseconds; 0 while none does
}

// context returns a context for a call that begins now. Call end when it has ended.
func (d *deadline) context(parent context.Context, now time.Time, limit time.Duration, log *slog.Logger) context.Context {
	if d.ctx == nil || now.After(d.until) || d.ctx.Err() != nil {
		if d.ctx != nil {
			d.cancel()
		}
		d.until = now.Add(limit / 64)
		d.ctx, d.cancel = context.WithTimeoutCause(parent, limit+limit/64, errHandlerTimeout)
		context.AfterFunc(d.ctx, func() {
			overrun := d.began.Load()
			if overrun == 0 {
				return
			}
			time.AfterFunc(overrunGrace, func() {
				if d.began.Load() == overrun {
					log.Error("handler runs on after its time limit and does not obey its context; its channel waits for it", "limit", limit)
				}
			})
		})
	}
	d.began.Store(now.UnixNano())
	return d.ctx
}

func (d *deadline) end() { d.began.Store(0) }

// fifo is a ring that grows as needed; its owner sets the bound.
type fifo struct {
	ring []Notification
	head int
	n    int
}

func (q *fifo) len() int { return q.n }

func (q *fifo) push(n Notification) {
	if q.n == len(q.ring) {
		bigger := make([]Notification, max(16, 2*q.n))
		copy(bigger, q.ring[q.head:])
		copy(bigger[len(q.ring)-q.head:], q.ring[:q.head])
		q.ring, q.head = bigger, 0
	}
	q.ring[(q.head+q.n)%len(q.ring)] = n
	q.n++
}

func (q *fifo) pop() Notification {
	n := q.ring[q.head]
	q.ring[q.head] = Notification{} // let go of the payload
	q.head = (q.head + 1) % len(q.ring)
	q.n--
	if q.n == 0 {
		q.head = 0
		if len(q.ring) > 1024 { // a burst is over: give its memory back
			q.ring = nil
		}
	}
	return n
}
