package queue

import (
	"fmt"
	"time"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/retry"
)

// pause says whether a failed run of a doorbell was the receiver's fault, so that the channel waits for it and the run spends no
// attempt. While it waits, no answer in time says nothing new; any other failure is an answer. q.mu is held.
func (q *Queue) pause(n notify.Notification, err error) (paused bool) {
	if open := q.breaker.Open(); !q.options.Doorbell || !notify.IsUnavailable(err) && !(open && call.Kind(err) == "timeout") {
		if open {
			q.resume(time.Now())
		}
		return false
	}
	// A run has no payload that could be at fault, so each try counts as another.
	opened, wasOpen := q.breaker.Fail(fmt.Sprint(n.Key, n.Attempt), err, notify.RetryDelay(err), time.Now())
	if opened || wasOpen && retry.IsPowerOfTwo(q.breaker.Tries()) {
		q.log.Warn(call.Paused, "tries", q.breaker.Tries(), "error", err)
	}
	return opened || wasOpen
}

// awaitReceiver waits until it is time for the next try of a paused channel, or returns false: the listener stops.
// q.mu is held, but not while it waits.
func (q *Queue) awaitReceiver() bool {
	wait := q.breaker.Try(time.Now(), 0)
	q.mu.Unlock()
	defer q.mu.Lock()
	return retry.Sleep(q.drain, wait)
}

// succeeded takes note of a call that succeeded just now. q.mu is held.
func (q *Queue) succeeded(now time.Time) {
	q.busySince, q.undone = now, false
	q.resume(now)
}

// resume ends a pause, if there is one: the receiver has answered. q.mu is held.
func (q *Queue) resume(now time.Time) {
	if paused := q.breaker.Succeed(now); paused > 0 {
		q.log.Info(call.Resumed, "paused_for", paused.Round(time.Millisecond))
	}
}

// Ready returns why the work of the channel is not done, or nil. It may be called from any goroutine.
func (q *Queue) Ready() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := call.PausedTooLong(&q.breaker); err != nil {
		return err
	}
	if waited := time.Since(q.busySince); (q.running > 0 || q.undone) && waited > q.options.Late() {
		return fmt.Errorf("its handler has not succeeded for %v, and there is work", waited.Round(time.Second))
	}
	return nil
}

// Stats implements notify.Meter.
func (q *Queue) Stats() []notify.Stat {
	q.mu.Lock()
	defer q.mu.Unlock()
	stats := []notify.Stat{
		{Name: "pglistener_notifications_received_total", Kind: "counter", Help: "Notifications that arrived.", Value: float64(q.counts.received)},
		{Name: "pglistener_queue_length", Kind: "gauge", Help: "Notifications that wait for their handler.", Value: float64(q.waiting.len())},
		call.Item("done", q.counts.done), call.Item("failed", q.counts.failed),
		call.Item("dropped", q.counts.dropped), call.Item("abandoned", q.counts.abandoned),
		call.PausedStat(&q.breaker),
	}
	return append(stats, q.calls.Stats()...)
}
