package outbox

import (
	"context"
	"strconv"
	"time"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
	"github.com/pglistener/pglistener/internal/retry"
)

// work is one of CONCURRENCY goroutines: it handles one job after the other.
func (o *Outbox) work(quit context.Context) {
	var c call.Caller
	defer c.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for len(o.buffer) == 0 && !o.stopping {
			o.ready.Wait()
		}
		if o.stopping {
			return
		}
		j := o.buffer[0]
		o.buffer[0] = job{} // let go of the payload
		o.buffer = o.buffer[1:]
		if len(o.buffer) <= o.low {
			nudge(o.taken)
		}
		if time.Since(j.claimed) > o.margin {
			o.stale = append(o.stale, j)
			nudge(o.written)
			continue
		}
		o.running++
		o.mu.Unlock()
		n := notify.Notification{Key: strconv.FormatInt(j.id, 10), Channel: o.channel, Payload: j.payload, Attempt: j.attempts}
		took, err := c.Call(quit, o.timeout, o.handler.Handle, n, o.log)
		o.mu.Lock()
		o.running--
		o.handling += (took - o.handling) / 8
		o.size += (len(j.payload) - o.size) / 8
		j.payload = ""
		o.results = append(o.results, result{j, err})
		nudge(o.written)
		if len(o.buffer) <= o.low {
			nudge(o.taken) // a slot is free
		}
	}
}

// write writes results, as many at once as have gathered while the last ones were written.
func (o *Outbox) write(quit context.Context, last <-chan struct{}) {
	var failures retry.Failures
	pause := retry.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for ended := false; !ended; {
		select {
		case <-o.written:
		case <-last:
			ended = true
		}
		o.mu.Lock()
		results, stale := o.results, o.stale
		o.results, o.stale = nil, nil
		o.mu.Unlock()
		if len(results) > prefetchRows {
			nudge(o.taken) // see room
		}
		o.giveBack(stale)
		for len(results) > 0 {
			rest, err := o.finish(results)
			results = rest
			if err == nil {
				failures.Reset()
				break
			}
			attempt, shouldLog := failures.Count(pgconn.Kind(err))
			if shouldLog {
				o.log.Error("results of the outbox cannot be written; trying again", "attempt", attempt, "results", len(results), "error", err, "hint", o.store.table.hint(err))
			}
			if !retry.Sleep(quit, pause.After(attempt)) {
				o.log.Error("results of the outbox were not written: their rows come due again and are handled once more", "results", len(results), "error", err)
				break
			}
		}
	}
}

// giveBack returns claimed rows that were not begun, for whoever comes first.
func (o *Outbox) giveBack(jobs []job) {
	if len(jobs) == 0 {
		return
	}
	if err := o.store.giveBack(jobs); err != nil {
		o.log.Warn("claimed rows could not be given back; they are due again when their lease ends", "rows", len(jobs), "error", err)
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.counts.givenBack += len(jobs)
}

// finish deletes the rows that are done, and sets when the others are tried again
// or that they have failed. Rows whose lease was lost stay as they are. It returns the
// results that could not be written.
func (o *Outbox) finish(results []result) (rest []result, err error) {
	done := map[int][]result{} // by attempts, which is nearly always 1
	var failed []result
	for _, r := range results {
		if r.err == nil {
			done[r.attempts] = append(done[r.attempts], r)
		} else {
			failed = append(failed, r)
		}
	}
	for attempts, group := range done {
		ids := make([]int64, len(group))
		for i, r := range group {
			ids[i] = r.id
		}
		n, e := o.store.complete(ids, attempts)
		if e != nil {
			rest, err = append(rest, group...), e
			continue
		}
		o.tally(group, len(group)-n)
	}
	if len(failed) > 0 {
		again := make([]again, len(failed))
		for i, r := range failed {
			again[i] = o.retryOf(r)
		}
		n, e := o.store.reschedule(again)
		if e != nil {
			return append(rest, failed...), e
		}
		o.tally(failed, len(failed)-n)
		o.poke() // the claimer may sleep until later
	}
	return rest, err
}

// again says when a row is tried again; not at all when it has failed.
type again struct {
	id       int64
	attempts int
	wait     time.Duration
	failed   bool
	text     string
}

func (o *Outbox) retryOf(r result) again {
	wait := max(o.retry.After(r.attempts), notify.RetryDelay(r.err))
	return again{
		id:       r.id,
		attempts: r.attempts,
		wait:     min(wait, time.Hour),
		failed:   notify.IsPermanent(r.err) || r.attempts >= o.attempts,
		text:     notify.Cut(r.err.Error(), 2000),
	}
}

// tally counts and logs results that are written.
func (o *Outbox) tally(results []result, lost int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.counts.leaseLost += lost
	if lost > 0 {
		o.log.Warn("lease lost: a handler took longer than its lease, and its row is another's now", "rows", lost)
	}
	for _, r := range results {
		switch {
		case r.err == nil:
			o.counts.done++
		case notify.IsPermanent(r.err) || r.attempts >= o.attempts:
			o.counts.failed++
			o.log.Error("gave up; the row stays in the outbox as failed", "id", r.id, "attempts", r.attempts, "error", r.err)
		default:
			o.counts.retried++
			o.log.Warn("handler failed; the row will be tried again", "id", r.id, "attempt", r.attempts, "error", r.err)
		}
	}
}
