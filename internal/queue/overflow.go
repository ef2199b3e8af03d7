package queue

import (
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/retry"
)

// overflowQuiet is how long a queue must not have been full again before its overflow is over.
const overflowQuiet = time.Second

// overflow refuses a notification, or drops it. q.mu is held.
func (q *Queue) overflow() (taken bool) {
	drop := q.options.Overflow == "drop"
	q.stalled = true
	q.quietTimer.Stop()
	if q.fullAt.IsZero() {
		q.fullAt = time.Now()
		if drop {
			q.log.Warn("queue full: new notifications are dropped until there is room", "queue", q.waiting.len(), "bytes", q.bytes)
		} else {
			q.log.Warn("queue full: reading stopped on all channels, the server buffers until there is room", "queue", q.waiting.len(), "bytes", q.bytes)
		}
	}
	if drop {
		q.counts.received++
		q.counts.dropped++
		q.dropped, q.missed = q.dropped+1, true
	}
	return drop
}

// pop takes the next notification, and ends an overflow step by step as the queue empties. q.mu is held.
func (q *Queue) pop() notify.Notification {
	n := q.waiting.pop()
	q.hold(-size(n))
	if q.stalled && (q.waiting.len() == 0 || q.waiting.len() <= q.options.Size/2 && q.fits(q.bytes)) {
		q.stalled = false
		retry.Nudge(q.room)
		if q.missed && q.catchUp != nil {
			q.rung, q.missed = true, false
		}
	}
	if !q.fullAt.IsZero() && q.waiting.len() == 0 {
		// A queue that fills again and again is one overflow, not a thousand.
		q.quietTimer.Reset(overflowQuiet)
	}
	return n
}

// endOverflow logs the end of an overflow, if there was one and it is over. q.mu is held.
func (q *Queue) endOverflow() {
	if q.fullAt.IsZero() || q.stalled {
		return
	}
	q.log.Info("queue drained", "full_for", time.Since(q.fullAt).Round(time.Millisecond), "dropped", q.dropped)
	q.fullAt, q.dropped = time.Time{}, 0
}
