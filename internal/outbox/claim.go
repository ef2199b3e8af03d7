package outbox

import (
	"context"
	"slices"
	"time"

	"github.com/pglistener/pglistener/internal/pgconn"
	"github.com/pglistener/pglistener/internal/retry"
)

// claim fetches due rows until stop ends.
func (o *Outbox) claim(stop context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	expiry := time.NewTicker(o.margin / 2)
	defer expiry.Stop()
	var failures retry.Failures
	pause := retry.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
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
			failures.Reset()
			continue
		}
		// Nothing more is due now. When is it?
		var next time.Duration
		if err == nil {
			next, err = o.store.nextDue()
		}
		if err != nil {
			attempt, shouldLog := failures.Count(pgconn.Kind(err))
			if shouldLog {
				o.log.Error("outbox cannot be read; trying again", "attempt", attempt, "error", err, "hint", o.store.table.hint(err))
			}
			retry.Sleep(stop, pause.After(attempt))
			continue
		}
		failures.Reset()
		if stalled++; next > 0 || len(jobs) > 0 {
			stalled = 0
		}
		// Somebody else has locked what is due, and may hold it for long.
		timer.Reset(max(next, pause.After(stalled), time.Millisecond))
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
func (o *Outbox) room() int {
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
func (o *Outbox) expire() {
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

func (o *Outbox) push(jobs []job) {
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
