package retry

import (
	"slices"
	"time"
)

// Breaker finds out that a receiver is away, and when to try whether it is back. It opens when several different items in a row
// have failed because of the receiver and none has succeeded between. Its owner locks; the zero value is ready.
type Breaker struct {
	failed []string  // the different items that have failed in a row, while it is closed
	since  time.Time // when it opened; zero while it is closed
	tries  int       // that have failed since
	next   time.Time // when to try again
	cause  error     // of the last failure
}

// threshold is how many different items make the receiver guilty: one alone may be what the receiver chokes on.
const threshold = 3

// breakerPause spaces the tries while a Breaker is open.
var breakerPause = Backoff{Min: 2 * time.Second, Max: time.Minute}

// Fail counts a failure of an item that was the receiver's, who may ask for a pause. It returns whether the Breaker has just opened, and
// whether it was open already: then the item is not to blame, and spends no attempt.
func (b *Breaker) Fail(item string, cause error, asked time.Duration, now time.Time) (opened, wasOpen bool) {
	b.cause, wasOpen = cause, b.Open()
	if !wasOpen && !slices.Contains(b.failed, item) {
		b.failed = append(b.failed, item)
	}
	if !wasOpen && len(b.failed) < threshold {
		return false, false
	}
	if !wasOpen {
		b.since, b.failed = now, nil
	}
	b.tries++
	b.next = now.Add(max(breakerPause.After(b.tries), min(asked, breakerPause.Max)))
	return !wasOpen, wasOpen
}

// Succeed closes the Breaker: the receiver has answered. It returns for how long it was open; 0 when it was not.
func (b *Breaker) Succeed(now time.Time) (paused time.Duration) {
	if b.Open() {
		paused = max(now.Sub(b.since), 1)
	}
	*b = Breaker{failed: b.failed[:0]}
	return paused
}

// Open says whether the receiver is held to be away.
func (b *Breaker) Open() bool { return !b.since.IsZero() }

// Since returns since when it is open, and the last cause; the zero time when it is closed.
func (b *Breaker) Since() (time.Time, error) { return b.since, b.cause }

// Tries is how many tries have failed since it opened.
func (b *Breaker) Tries() int { return b.tries }

// Try says whether to try now, while it is open; if not, when. A try that is begun is followed by the next one after slow at the
// latest, answered or not: an item that is never answered must not be taken for the receiver.
func (b *Breaker) Try(now time.Time, slow time.Duration) (wait time.Duration) {
	if wait = b.next.Sub(now); wait > 0 {
		return wait
	}
	b.next = now.Add(slow)
	return 0
}
