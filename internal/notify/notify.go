// Package notify is the contract between the listener and its handlers. It imports nothing but the standard library, so that a
// handler can be read, written and tested on its own.
package notify

import (
	"context"
	"crypto/rand"
	"log/slog"
	"strconv"
	"time"
)

// Notification is what a handler is given.
type Notification struct {
	Channel string // as in CHANNELS
	Payload string // as the writer sent it: untrusted, any text without a zero byte
	PID     int    // process id of the notifying backend; 0 from the outbox
	Attempt int    // 1, 2, ... for the same notification

	CreatedAt time.Time // when the event was written, from the outbox; otherwise zero
	RunAt     time.Time // for which time a run was scheduled; zero for all that is not

	Key    string // the idempotency key, where the event has one of its own; read it through ID
	Serial uint64 // numbers the notifications of this process that have no Key
}

// ID is the idempotency key: the same at every attempt, and for a row of the outbox also after a restart and in every replica. A
// plain notification has none of its own, so it is given one that no other has.
func (n Notification) ID() string {
	if n.Key != "" {
		return n.Key
	}
	return processID + "-" + strconv.FormatUint(n.Serial, 10)
}

// processID begins the ids that this process makes. It never changes.
var processID = rand.Text()

// Handler handles the notifications of one channel.
//
// With CONCURRENCY=1 Handle is called for one notification at a time, in the order in which the server sent them; otherwise from
// up to CONCURRENCY goroutines at once. ctx ends HANDLER_TIMEOUT after the call, and earlier when shutting down takes longer than
// SHUTDOWN_TIMEOUT; Handle must return soon after that, for nothing else can stop it.
//
// An error, or a panic, means that it failed: it is called again after a pause with the same notification and the next Attempt.
// After HANDLER_ATTEMPTS, or at once for an error made by Permanent, the notification is logged as an ERROR and given up.
type Handler interface {
	Handle(ctx context.Context, n Notification) error
}

// HandlerFunc makes a Handler of a function.
type HandlerFunc func(ctx context.Context, n Notification) error

// Handle calls f.
func (f HandlerFunc) Handle(ctx context.Context, n Notification) error { return f(ctx, n) }

// CatchUper is implemented by a Handler that can find by itself what it has missed, because the truth is in a table and not in
// the payload. CatchUp is called after every (re)connect once all channels are LISTENed, the first included; after an overflow;
// when delivery resumes after a failed probe; and every CATCH_UP_INTERVAL. Requests made while one waits or is retried are
// merged, and CatchUp never runs twice at once. LISTEN comes before it, so the same work can be seen twice: here and in Handle.
// Context, errors and attempts are as for Handle.
type CatchUper interface {
	CatchUp(ctx context.Context) error
}

// Runner is implemented by a Handler that also works on its own. Run is called once, on a goroutine of its own, when the listener
// starts. It begins nothing new after stop has ended, finishes what it has begun, and returns soon after quit has ended, come what may.
type Runner interface {
	Run(stop, quit context.Context)
}

// Checker is implemented by a Handler that can say, for -check, whether what it needs is there. The text is one line; the error
// says what to do.
type Checker interface {
	Check(ctx context.Context) (string, error)
}

// Readier is implemented by a Handler that knows whether its work is being done. Ready returns why it is not, or nil: /readyz
// says so. It may be called from any goroutine and must not block.
type Readier interface {
	Ready() error
}

// Verifier is implemented by a Handler whose work depends on something in the database. Verify returns a statement that fails
// when the work cannot be done; the listener runs it at each probe, on the probe's connection, and calls Verified with the error
// or nil, on a goroutine of its own.
type Verifier interface {
	Verify() (query string)
	Verified(err error)
}

// Meter is implemented by a Handler that adds figures to /metrics. Stats may be called from any goroutine and must not block.
type Meter interface {
	Stats() []Stat
}

// Stat is one figure. Those of a handler are given the label channel.
type Stat struct {
	Name      string   // Prometheus's name for it
	Kind      string   // "gauge", "counter" or "histogram"
	Help      string   // one sentence
	Labels    []string // names and values by turns
	Value     float64
	Histogram Histogram // instead of Value, of a histogram
}

// Flag is a gauge that is 1 while something is so, and otherwise 0.
func Flag(name, help string, on bool) Stat {
	s := Stat{Name: name, Kind: "gauge", Help: help}
	if on {
		s.Value = 1
	}
	return s
}

// Setup is what a handler may need from the program around it.
type Setup struct {
	Channel     string
	Log         *slog.Logger  // carries the channel as an attribute
	LogPayloads bool          // payloads, and what receivers answer, may stand in logs and errors
	Grace       time.Duration // how long what Handle has started may take to end after ctx has
}

// HistogramBounds are the upper bounds of a Histogram's buckets but the last, which has none.
var HistogramBounds = [...]time.Duration{
	time.Millisecond, 5 * time.Millisecond, 25 * time.Millisecond, 100 * time.Millisecond,
	500 * time.Millisecond, time.Second, 5 * time.Second, 10 * time.Second, 30 * time.Second, time.Minute,
}

// Histogram counts durations. Its owner locks.
type Histogram struct {
	Buckets [len(HistogramBounds)]uint64 // each without those before it
	Count   uint64
	Sum     time.Duration
}

// Observe counts d.
func (h *Histogram) Observe(d time.Duration) {
	h.Count++
	h.Sum += d
	for i, bound := range HistogramBounds {
		if d <= bound {
			h.Buckets[i]++
			return
		}
	}
}
