// Package retry waits and wakes: it spaces repeated attempts, and keeps their log lines few.
package retry

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff spaces attempts: the wait doubles from Min to Max, with jitter, so that listeners which lost the same server do not
// come back in step.
type Backoff struct{ Min, Max time.Duration }

// After returns the wait after n failures in a row: between half and the whole of Min doubled n-1 times, capped at Max. It is 0
// for n = 0.
func (b Backoff) After(n int) time.Duration {
	if n <= 0 {
		return 0
	}
	d := b.Min
	for ; n > 1 && d < b.Max; n-- {
		d *= 2
	}
	d = min(d, b.Max)
	return d/2 + rand.N(d/2+1)
}

// Jitter shortens d by up to a fifth, so that replicas do not act in step.
func Jitter(d time.Duration) time.Duration { return d - rand.N(d/5+1) }

// Sleep waits for d and returns true, or returns false as soon as ctx ends.
func Sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Nudge leaves a token in a channel of capacity 1: whoever receives it looks once, however often he was nudged.
func Nudge(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Failures counts failures that may repeat for hours, and thins their log: of each kind it lets through the 1st, 2nd, 4th, 8th,
// ... until there has been none for a minute. The zero value is ready. It is used by one goroutine at a time.
type Failures struct {
	attempt int
	alike   map[string]repeated
}

type repeated struct {
	n    int
	last time.Time
}

// Reset forgets everything: the next failure is the first again.
func (f *Failures) Reset() { *f = Failures{} }

// Count counts one more failure. kind is a text that is the same for failures that are alike. It returns the number of the
// failure, counted over all kinds, and whether to log this one.
func (f *Failures) Count(kind string) (attempt int, shouldLog bool) {
	// A bound on memory, for a server that fails in ever new ways.
	if f.alike == nil || len(f.alike) > 100 {
		f.alike = map[string]repeated{}
	}
	f.attempt++
	r, now := f.alike[kind], time.Now()
	if now.Sub(r.last) > time.Minute {
		r.n = 0
	}
	r.n, r.last = r.n+1, now
	f.alike[kind] = r
	return f.attempt, IsPowerOfTwo(r.n)
}

// IsPowerOfTwo says whether the nth repetition of an event is worth a log line.
func IsPowerOfTwo(n int) bool { return n > 0 && n&(n-1) == 0 }
