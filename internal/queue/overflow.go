package queue

import (
	"time"

	"github.com/pglistener/pglistener/internal/notify"
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
			q.log.Warn("queue full: new notifications are dropped until there is room", "queue", q.options.Size)
		} else {
			q.log.Warn("queue full: reading stopped on all channels, the server buffers until there is room", "queue", q.options.Size)
		}
	}
	if drop {
		q.counts.received++
		q.counts.dropped++
		q.dropped, q.missed = q.dropped+1, true
	}
	return drop
}

// afterPop ends an overflow step by step as the queue empties. q.mu is held.
func (q *Queue) afterPop() {
	if q.stalled && q.waiting.len() <= q.options.Size/2 {
		q.stalled = false
		select {
		case q.room <- struct{}{}:
		default:
		}
		if q.missed && q.catchUp != nil {
			q.rung, q.missed = true, false
		}
	}
	if !q.fullAt.IsZero() && q.waiting.len() == 0 {
		// A queue that fills again and again is one overflow, not a thousand.
		q.quietTimer.Reset(overflowQuiet)
	}
}

// endOverflow logs the end of an overflow, if there was one and it is over. q.mu is held.
func (q *Queue) endOverflow() {
	if q.fullAt.IsZero() || q.stalled {
		return
	}
	q.log.Info("queue drained", "full_for", time.Since(q.fullAt).Round(time.Millisecond), "dropped", q.dropped)
	q.fullAt, q.dropped = time.Time{}, 0
}

// Stats implements notify.Meter.
func (q *Queue) Stats() []notify.Stat {
	q.mu.Lock()
	c, calls, waiting := q.counts, q.calls, q.waiting.len()
	q.mu.Unlock()
	counter := func(name, help string, value uint64) notify.Stat {
		return notify.Stat{Name: name, Kind: "counter", Help: help, Value: float64(value)}
	}
	return []notify.Stat{
		counter("pglistener_notifications_received_total", "Notifications that arrived.", c.received),
		counter("pglistener_notifications_handled_total", "Notifications whose handler succeeded.", c.handled),
		counter("pglistener_notifications_dropped_total", "Notifications discarded because the queue was full.", c.dropped),
		counter("pglistener_notifications_given_up_total", "Notifications and catch-ups that failed at every attempt.", c.gaveUp),
		counter("pglistener_catch_ups_total", "Catch-ups, doorbell runs included, that succeeded.", c.caughtUp),
		{Name: "pglistener_queue_length", Kind: "gauge", Help: "Notifications that wait for their handler.", Value: float64(waiting)},
		counter("pglistener_handler_failures_total", "Calls of a handler that failed.", calls.Failed),
		counter("pglistener_handler_retries_total", "Failed calls that were to be repeated.", calls.Retried),
		{Name: "pglistener_handler_duration_seconds", Kind: "histogram", Help: "Length of the calls of a handler.", Histogram: calls.Seconds},
	}
}
