// Package queue is what stands between the listener and the handler of one channel: it keeps the order, limits how many handlers
// run at once and for how long, repeats what failed and survives what panicked.
package queue

import (
	"cmp"
	"context"
	"crypto/rand"
	"log/slog"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/retry"
)

// Settings are the variables of a queue.
type Settings struct {
	Size     int    `env:"QUEUE_SIZE,default=10000" usage:"waiting notifications per channel"`
	Overflow string `env:"OVERFLOW,default=block" oneof:"block drop" usage:"when a queue is full: block (stop reading, the server buffers) or drop (discard, log, catch up)"`
	Attempts int    `env:"HANDLER_ATTEMPTS,default=5" usage:"attempts before a notification is logged as an error and given up"`

	CatchUpInterval time.Duration `env:"CATCH_UP_INTERVAL,default=5m" min:"0" usage:"how often doorbell handlers run without being rung; 0 turns it off"`
}

// Options say how a queue works.
type Options struct {
	Settings
	call.Limits
	Doorbell bool          // a notification is a request to run the handler, and nothing else
	Retry    retry.Backoff // between attempts; 500 ms to 30 s if zero
	Secret   bool          // payloads are kept out of the log
	Rung     bool          // a doorbell that runs when it is rung, and neither at starts and gaps nor every CatchUpInterval

	// Go runs a function that may block, beside all others; nil is a goroutine for each.
	Go func(func())
	// Memory bounds the bytes that all queues hold together; nil does not.
	Memory interface {
		Fits(held, more int64) bool
		Changed(before, now int64)
	}
	// Times says when a doorbell rings by itself, if it does: for how long to wait until it is asked whether it is Due, and for
	// which time. It is used by one goroutine at a time.
	Times interface {
		Wait() time.Duration
		Due() (nominal time.Time, due bool)
	}
}

// Queue owns the notifications of one channel that wait, and the goroutines that handle them.
//
// Its methods never block for long, so that the select loop can call them from its goroutine; Stats may be called from any.
// Handlers run on the goroutines of Options.Go, while there is work.
type Queue struct {
	channel string
	handle  call.Func
	catchUp call.Func // nil when the handler cannot; its notification has no payload
	options Options
	log     *slog.Logger
	quit    context.Context // ends when shutting down has taken too long: nothing is begun or repeated afterwards
	drain   context.Context // ends with quit, and when no more is offered
	endWait context.CancelFunc
	room    chan struct{} // capacity 1: see Room
	work    func()        // run; its method value would be an allocation for each start

	mu         sync.Mutex // guards what follows
	waiting    fifo
	bytes      int64          // that wait
	running    int            // how many work
	sweep      *time.Timer    // rings every CatchUpInterval; nil before Start and after Drained
	spare      []*call.Caller // of those that have ended, for the next ones
	done       chan struct{}  // see Drained
	rung       bool           // a catch-up waits
	nominal    time.Time      // for which time of its schedule
	catching   bool           // a catch-up runs
	stalled    bool           // an offer was refused, and the queue is still more than half full
	fullAt     time.Time      // when an overflow began; zero when there is none
	quietTimer *time.Timer    // ends the overflow when the queue has stayed empty
	dropped    int            // in this overflow
	missed     bool           // something was dropped since the last catch-up
	breaker    retry.Breaker  // of a doorbell
	failures   retry.Failures // of the handler
	busySince  time.Time      // since when there has been work, or when a call last succeeded
	undone     bool           // the last run of a doorbell was given up: what it was to do is still to be done
	counts     counts
	calls      call.Stats
}

// counts are totals since the start.
type counts struct{ received, done, failed, dropped, abandoned uint64 }

// New makes a queue that gives what it is offered to h. Once quit has ended it begins and repeats nothing.
func New(quit context.Context, channel string, h notify.Handler, o Options, log *slog.Logger) *Queue {
	o.Retry = cmp.Or(o.Retry, retry.Backoff{Min: 500 * time.Millisecond, Max: 30 * time.Second})
	if o.Go == nil {
		o.Go = func(f func()) { go f() }
	}
	q := &Queue{
		channel: channel, handle: h.Handle, options: o,
		log: log, quit: quit, room: make(chan struct{}, 1),
	}
	q.drain, q.endWait = context.WithCancel(quit)
	q.work = q.run
	q.quietTimer = time.AfterFunc(overflowQuiet, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.endOverflow()
	})
	q.quietTimer.Stop()
	if c, ok := h.(notify.CatchUper); ok {
		q.catchUp = func(ctx context.Context, _ notify.Notification) error { return c.CatchUp(ctx) }
	}
	if o.Doorbell {
		q.catchUp = h.Handle
		q.options.Concurrency = 1
	}
	return q
}

// Start begins to catch up every CatchUpInterval, or to ring at the times of Options, until Drained.
func (q *Queue) Start() {
	wait := func() time.Duration { return retry.Jitter(q.options.CatchUpInterval) }
	due := func() (time.Time, bool) { return time.Time{}, true }
	if t := q.options.Times; t != nil {
		wait, due = t.Wait, t.Due
	} else if q.catchUp == nil || q.options.CatchUpInterval == 0 || q.options.Rung {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.sweep = time.AfterFunc(wait(), func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.sweep == nil || q.quit.Err() != nil {
			return
		}
		if nominal, ok := due(); ok {
			q.nominal = nominal
			q.ring()
		}
		q.sweep.Reset(wait())
	})
}

// Channel is the channel whose queue this is.
func (q *Queue) Channel() string { return q.channel }

// Offer takes n, or returns false: the queue is full, try again when Room says so. With OVERFLOW=drop, and once quit has ended,
// it takes everything.
func (q *Queue) Offer(n notify.Notification) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.options.Doorbell {
		q.counts.received++
		q.ring()
		return true
	}
	if q.quit.Err() != nil {
		q.abandon(n, notify.ErrShutdownTimeout)
		return true
	}
	if q.waiting.len() == 0 || q.waiting.len() < q.options.Size && q.fits(size(n)) {
		q.counts.received++
		q.waiting.push(n)
		q.hold(size(n))
		q.start()
		return true
	}
	return q.overflow()
}

// Room returns a channel on which, after a refused Offer, a token says that half of the queue is free.
func (q *Queue) Room() <-chan struct{} { return q.room }

// CatchUp has the handler catch up, if it can; requests that wait are merged into one.
func (q *Queue) CatchUp() {
	if q.catchUp == nil || q.options.Rung {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ring()
}

func (q *Queue) ring() {
	q.rung = true
	q.start()
}

// Drained returns a channel that is closed once nothing waits and nothing runs. Call it once, when no more is offered.
func (q *Queue) Drained() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.sweep != nil {
		q.sweep.Stop()
		q.sweep = nil
	}
	q.endWait()
	q.done = make(chan struct{})
	if q.running == 0 {
		close(q.done)
	}
	return q.done
}

// AbandonRest logs what still waits and returns how much was never handled to its end. Call it last, after quit has ended.
func (q *Queue) AbandonRest() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.waiting.len() > 0 {
		q.abandon(q.pop(), notify.ErrShutdownTimeout)
	}
	if q.rung && q.options.Rung {
		q.abandon(notify.Notification{Channel: q.channel}, notify.ErrShutdownTimeout)
	}
	q.endOverflow()
	if q.running > 0 {
		q.log.Error("handler is still running at the end: it ignores its context", "running", q.running)
	}
	return int(q.counts.abandoned) + q.running
}

// start has one more work if the limit allows. q.mu is held.
func (q *Queue) start() {
	if q.running == 0 && !q.undone {
		q.busySince = time.Now()
	}
	if q.running < q.options.Concurrency {
		q.running++
		q.options.Go(q.work)
	}
}

// run works until there is nothing left to do.
func (q *Queue) run() {
	q.mu.Lock()
	defer q.mu.Unlock()
	c := &call.Caller{}
	if n := len(q.spare); n > 0 {
		c, q.spare = q.spare[n-1], q.spare[:n-1]
	}
	defer func() { q.spare = append(q.spare, c) }()
	for q.quit.Err() == nil {
		if q.rung && !q.catching {
			q.rung, q.catching = false, true
			n := notify.Notification{Channel: q.channel, Key: rand.Text(), RunAt: q.nominal}
			q.nominal = time.Time{}
			q.do(c, q.catchUp, n)
			q.catching = false
		} else if q.waiting.len() > 0 {
			n := q.pop()
			q.do(c, q.handle, n)
		} else {
			break
		}
	}
	q.running--
	if q.running == 0 && q.done != nil {
		close(q.done)
	}
}

// do calls f with n until it succeeds or nothing more can be done. q.mu is held on entry and on return, and not while f runs.
func (q *Queue) do(c *call.Caller, f call.Func, n notify.Notification) {
	for n.Attempt = 1; ; n.Attempt++ {
		q.mu.Unlock()
		took, err := c.Call(q.quit, q.options.Timeout, f, n, q.log)
		q.mu.Lock()
		q.calls.Observe(took, err)
		if err == nil {
			q.counts.done++
			q.succeeded(c.Ended)
			return
		}
		switch {
		case q.quit.Err() != nil:
			q.abandon(n, err)
			return
		case q.pause(n, err):
			if !q.awaitReceiver() {
				if q.options.Rung { // otherwise the doorbell runs when it starts again
					q.abandon(n, err)
				}
				return
			}
			n.Attempt-- // it was not the run's fault
			continue
		case n.Attempt >= q.options.Attempts || notify.IsPermanent(err):
			q.counts.failed++
			q.undone = q.options.Doorbell && (!q.options.Rung || q.options.Times != nil) // else others call the handler past this queue
			q.log.Error("gave up", q.trace(n, "attempts", n.Attempt, "error", err)...)
			return
		}
		q.calls.Retried++
		// Retry-After is capped: the whole queue waits behind this one.
		wait := max(q.options.Retry.After(n.Attempt), min(notify.RetryDelay(err), q.options.Retry.Max))
		if _, shouldLog := q.failures.Count(call.Kind(err)); shouldLog {
			q.log.Warn("handler failed", "attempt", n.Attempt, "again_in", wait.Round(time.Millisecond), "error", err)
		}
		q.mu.Unlock()
		quit := !retry.Sleep(q.quit, wait)
		q.mu.Lock()
		if quit {
			q.abandon(n, err)
			return
		}
	}
}

// trace is what the log says of a notification that nobody has handled.
func (q *Queue) trace(n notify.Notification, attrs ...any) []any {
	if !q.options.Secret {
		attrs = append([]any{"payload", n.Payload}, attrs...)
	}
	return append([]any{"id", n.ID(), "backend", n.PID}, attrs...)
}

// abandon leaves a trace of what nobody will handle. q.mu is held.
func (q *Queue) abandon(n notify.Notification, cause error) {
	q.counts.abandoned++
	q.log.Error("abandoned", q.trace(n, "error", cause)...)
}
