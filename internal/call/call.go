// Package call makes single calls of a handler: with a time limit, and with panics turned into errors.
package call

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/retry"
)

// Func is the type of notify.Handler's Handle.
type Func func(context.Context, notify.Notification) error

// Longest is the most time that a call is given whose limit is limit: see Caller.
func Longest(limit time.Duration) time.Duration { return limit + limit/64 }

// overrunGrace is how long after its time limit a handler may still run before the log says so.
const overrunGrace = 5 * time.Second

// Caller makes one call after the other, each with a time limit. It is used by one goroutine at a time; the zero value is ready.
//
// A context with a deadline costs more than many a handler does. So calls that begin within a 64th of the limit share one: each
// has at least its limit, and at most Longest of it.
type Caller struct {
	Ended  time.Time // when the last call did
	shared *sharedContext
}

type sharedContext struct {
	context.Context
	cancel context.CancelFunc
	until  time.Time    // too old for another call afterwards
	began  atomic.Int64 // of the call that runs, in Unix nanoseconds; 0 while none does
}

// Call calls f with n once, and returns its error and how long it took. The context that f is given ends after limit, with the
// cause notify.ErrHandlerTimeout, and when parent does. A panic is an error, and is logged with its stack. Call blocks until f
// returns; a handler that does not obey its context is logged.
func (c *Caller) Call(parent context.Context, limit time.Duration, f Func, n notify.Notification, log *slog.Logger) (took time.Duration, err error) {
	began := time.Now()
	if c.shared == nil || began.After(c.shared.until) || c.shared.Err() != nil {
		c.Close()
		c.shared = newShared(parent, began, limit, log)
	}
	s := c.shared
	s.began.Store(began.UnixNano())
	defer func() {
		s.began.Store(0)
		c.Ended = time.Now()
		took = c.Ended.Sub(began)
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
			log.Error("handler panicked", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	return 0, f(s.Context, n)
}

// Close releases what the last call has left for the next one. Calling is possible afterwards.
func (c *Caller) Close() {
	if c.shared != nil {
		c.shared.cancel()
		c.shared = nil
	}
}

func newShared(parent context.Context, now time.Time, limit time.Duration, log *slog.Logger) *sharedContext {
	s := &sharedContext{until: now.Add(limit / 64)}
	s.Context, s.cancel = context.WithTimeoutCause(parent, Longest(limit), notify.ErrHandlerTimeout)
	context.AfterFunc(s.Context, func() {
		// Only calls that were given this very context are looked at: it also ends because it has grown too old, while a later
		// call runs with another.
		overrun := s.began.Load()
		if overrun == 0 || context.Cause(s.Context) != notify.ErrHandlerTimeout {
			return
		}
		time.AfterFunc(overrunGrace, func() {
			if s.began.Load() == overrun {
				log.Error("handler is still running after its time limit: it ignores its context, and its channel waits for it", "limit", limit)
			}
		})
	})
	return s
}

// Limits bound the calls of a channel's handler, whatever its mode.
type Limits struct {
	Concurrency int           `env:"CONCURRENCY,default=1" max:"10000" usage:"handlers at once per channel; 1 keeps the order"`
	Timeout     time.Duration `env:"HANDLER_TIMEOUT,default=30s" usage:"time limit of one attempt"`
	LateAfter   time.Duration `env:"LATE_AFTER,default=5m" usage:"not ready when work waits and nothing has succeeded for that long; at least twice HANDLER_TIMEOUT"`
}

// Late returns how long work may wait without any success.
func (l Limits) Late() time.Duration { return max(l.LateAfter, 2*l.Timeout) }

// Stats count the calls of a handler since the start. Their owner locks.
type Stats struct {
	OK, Failed, Retried uint64
	Seconds             notify.Histogram
}

// Observe counts one call: how long it took and what came of it.
func (s *Stats) Observe(took time.Duration, err error) {
	if err == nil {
		s.OK++
	} else {
		s.Failed++
	}
	s.Seconds.Observe(took)
}

// Stats are the figures.
func (s *Stats) Stats() []notify.Stat {
	return []notify.Stat{
		{Name: "pglistener_handler_failures_total", Kind: "counter", Help: "Calls of a handler that failed.", Value: float64(s.Failed)},
		{Name: "pglistener_handler_retries_total", Kind: "counter", Help: "Failed calls that were to be repeated.", Value: float64(s.Retried)},
		{Name: "pglistener_handler_duration_seconds", Kind: "histogram", Help: "Length of the calls of a handler.", Histogram: s.Seconds},
	}
}

// Item counts what became of notifications, doorbell runs and rows, by result.
func Item(result string, n uint64) notify.Stat {
	return notify.Stat{Name: "pglistener_items_total", Kind: "counter", Value: float64(n), Labels: []string{"result", result},
		Help: "Notifications, doorbell runs and rows of tables, by what became of them."}
}

// Kind is a text that is the same for errors that are alike, for retry.Failures.
func Kind(err error) string {
	switch {
	case notify.IsUnavailable(err):
		return "unavailable"
	case notify.IsPermanent(err):
		return "permanent"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, notify.ErrHandlerTimeout):
		return "timeout"
	}
	return "other"
}

// What is logged of a channel whose receiver is away.
const (
	Paused  = "channel paused: its receiver is unavailable; one try at a time until it is back"
	Resumed = "channel resumed: its receiver is back"
)

// PausedTooLong returns why a channel is not ready that has been paused for more than a minute.
func PausedTooLong(b *retry.Breaker) error {
	since, cause := b.Since()
	if paused := time.Since(since); b.Open() && paused > time.Minute {
		return fmt.Errorf("it has been paused for %v because its receiver is unavailable: %w", paused.Round(time.Second), cause)
	}
	return nil
}

// PausedStat is the figure of a Breaker.
func PausedStat(b *retry.Breaker) notify.Stat {
	return notify.Flag("pglistener_channel_paused", "1 while the channel is paused because its receiver is unavailable.", b.Open())
}
