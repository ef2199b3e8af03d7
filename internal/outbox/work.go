package outbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
	"github.com/pglistener/pglistener/internal/retry"
)

// work is one of up to CONCURRENCY goroutines: it handles one job after the other.
func (o *Outbox) work(quit context.Context) {
	var c call.Caller
	defer c.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for len(o.buffer) == 0 && !o.stopping {
			o.idle++
			o.ready.Wait()
			o.idle--
		}
		if o.stopping {
			return
		}
		j := o.buffer[0]
		o.buffer[0] = job{} // release the payload
		o.buffer = o.buffer[1:]
		if len(o.buffer) <= o.low {
			retry.Nudge(o.taken)
		}
		switch {
		case time.Since(j.claimed) > o.margin, o.breaker.Open() && !j.try: // it waits untouched, for another replica or for later
			o.stale = append(o.stale, j)
		case j.schedule != "" && j.attempts == 0:
			o.results = append(o.results, result{j, nil}) // only its first time is to be found
		case j.lost && j.attempts > max(o.options.Attempts, leastLost):
			o.results = append(o.results, result{j, fmt.Errorf("begun %d times, and the outcome of the last time was never written: does it kill the listener?", j.attempts-1)})
		default:
			o.call(quit, &c, j)
		}
		retry.Nudge(o.written)
		if len(o.buffer) <= o.low {
			retry.Nudge(o.taken) // a slot is free
		}
	}
}

// leastLost is how many times a row is begun, at least, before it is given up because it was never finished: a listener that is stopped
// between the claim and the handler uses one up.
const leastLost = 10

// call handles a job. o.mu is held, but not during the call.
func (o *Outbox) call(quit context.Context, c *call.Caller, j job) {
	n := notify.Notification{Key: j.event, Channel: o.channel, Payload: j.payload, Attempt: j.attempts, CreatedAt: j.created}
	if j.schedule != "" {
		n.RunAt = j.due
	}
	o.running++
	o.mu.Unlock()
	took, err := c.Call(quit, o.options.Limits.Timeout, o.handle, n, o.log)
	o.mu.Lock()
	o.running--
	o.handling += (took - o.handling) / 8
	o.size += (len(j.payload) - o.size) / 8
	o.calls.Observe(took, err)
	j.payload = ""
	if blamed := o.judge(j, err); blamed {
		o.results = append(o.results, result{j, err})
	} else {
		o.stale = append(o.stale, j)
	}
}

// judge finds out what a call says of the receiver: it pauses the channel or ends the pause. blamed is false when the receiver
// was known to be away, so that the row spends no attempt. o.mu is held.
func (o *Outbox) judge(j job, err error) (blamed bool) {
	now := time.Now()
	if err == nil {
		o.health.progress, o.health.failingSince = now, time.Time{}
	} else if o.health.failingSince.IsZero() {
		o.health.failingSince = now
	}
	switch {
	case o.breaker.Open() && (notify.IsUnavailable(err) && !j.try || call.Kind(err) == "timeout"):
		return false // it began before the pause, and is no try; or it says nothing of the receiver, and nothing of the row
	case notify.IsUnavailable(err):
		opened, wasOpen := o.breaker.Fail(j.event, err, notify.RetryDelay(err), now)
		if opened || wasOpen && retry.IsPowerOfTwo(o.breaker.Tries()) {
			o.log.Warn(call.Paused, "tries", o.breaker.Tries(), "error", err)
		}
		return !wasOpen
	case err == nil, o.breaker.Open(): // it has answered
		if paused := o.breaker.Succeed(now); paused > 0 {
			o.log.Info(call.Resumed, "paused_for", paused.Round(time.Millisecond))
			retry.Nudge(o.taken)
			o.poke()
		}
	}
	return true
}

// lockedPause is how long results wait whose rows an open transaction holds.
const lockedPause = 200 * time.Millisecond

// gather is how long results wait for more that are written with them: a statement costs the server as much as a dozen rows.
const gather = 5 * time.Millisecond

// write writes results, as many at once as have gathered.
func (o *Outbox) write(quit context.Context, last <-chan struct{}) {
	var failures retry.Failures
	pause := retry.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	var again <-chan time.Time
	// take returns results with those that have come meanwhile: what the server refuses may be one row. But no more than room allows for,
	// and of each row only the newest: if it was claimed again, the others are lost.
	take := func(results []result) []result {
		o.mu.Lock()
		stale := o.stale
		if o.stale = nil; len(results) <= prefetchRows {
			all := slices.Concat(results, o.results, o.locked)
			slices.SortFunc(all, func(a, b result) int { return cmp.Or(cmp.Compare(a.id, b.id), b.claimed.Compare(a.claimed)) })
			results, o.results, o.locked = slices.CompactFunc(all, func(a, b result) bool { return a.id == b.id }), nil, nil
			o.counts.leaseLost += uint64(len(all) - len(results))
			if len(all) > prefetchRows {
				retry.Nudge(o.taken) // see room
			}
		}
		o.mu.Unlock()
		o.giveBack(stale)
		return results
	}
	for ended := false; !ended; {
		select {
		case <-o.written:
			retry.Sleep(quit, gather)
		case <-again:
		case <-last:
			ended = true
		}
		for results := take(nil); len(results) > 0; results = take(results) {
			rest, err := o.finish(results)
			results = rest
			o.mu.Lock()
			o.health.write = err
			o.mu.Unlock()
			if err == nil {
				failures.Reset()
				break
			}
			attempt, shouldLog := failures.Count(pgconn.Kind(err))
			if shouldLog {
				o.log.Error("results of the outbox cannot be written; trying again", "attempt", attempt, "results", len(results), "error", err, "hint", o.store.hint(err))
			}
			if !retry.Sleep(quit, pause.After(attempt)) {
				o.log.Error("results of the outbox were not written: their rows come due again and are handled once more", "results", len(results), "error", err)
				break
			}
		}
		o.mu.Lock()
		if n := len(o.locked); n > 0 && ended {
			o.log.Error("results of the outbox were not written, for an open transaction holds their rows, which are handled once more", "results", n)
		} else if n > 0 {
			again = time.After(lockedPause)
		}
		o.mu.Unlock()
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
	o.counts.givenBack += uint64(len(jobs))
}

// finish writes results: it deletes the rows that are done, and sets when the others run again or that they have failed. Rows
// whose lease was lost stay as they are. It returns the results that could not be written.
func (o *Outbox) finish(results []result) (rest []result, err error) {
	simple := map[int][]result{}  // by attempts, which is nearly always 1
	others := map[bool][]result{} // by whether they are copied, for which there may be no right
	for _, r := range results {
		if r.err == nil && !r.keyed && r.schedule == "" {
			simple[r.attempts] = append(simple[r.attempts], r)
		} else {
			copied := r.schedule != "" && o.isLast(r)
			others[copied] = append(others[copied], r)
		}
	}
	for attempts, group := range simple {
		switch n, e := o.store.complete(group, attempts); {
		case pq.As(e, pqerror.LockNotAvailable) != nil:
			others[false] = append(others[false], group...) // end passes over what is locked
		case e != nil:
			rest, err = append(rest, group...), e
		default:
			o.mu.Lock()
			for _, r := range group[:n] {
				o.tally(r, ending{})
			}
			o.lose(group[n:])
			o.mu.Unlock()
		}
	}
	for _, group := range others {
		if e := o.end(group); e != nil {
			rest, err = append(rest, group...), e
		}
		o.poke() // the claimer may sleep until later
	}
	return rest, err
}

// end writes results of rows that are not simply deleted.
func (o *Outbox) end(results []result) error {
	now, err := o.store.now()
	if err != nil {
		return err
	}
	endings := make([]ending, len(results))
	for i, r := range results {
		endings[i] = o.endingOf(r, now)
	}
	fates, err := o.store.end(endings)
	if pq.As(err, pqerror.UntranslatableCharacter) != nil { // to the encoding of the database
		for i := range endings {
			endings[i].text = strings.Trim(strconv.QuoteToASCII(endings[i].text), `"`)
		}
		fates, err = o.store.end(endings)
	}
	if err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, r := range results {
		switch fates[r.id] {
		case ended:
			o.tally(r, endings[i])
		case changed:
			o.log.Debug("a row was changed while its handler ran: it is handled once more", "id", r.id)
		case locked:
			r.keyed = true // so that end writes it again
			o.locked = append(o.locked, r)
		default:
			o.lose(results[i : i+1])
		}
	}
	return nil
}

// isLast says whether a row is given up.
func (o *Outbox) isLast(r result) bool {
	return r.err != nil && (notify.IsPermanent(r.err) || r.attempts >= o.options.Attempts)
}

// endingOf says what becomes of a row, by the server's clock.
func (o *Outbox) endingOf(r result, now time.Time) ending {
	e := ending{job: r.job}
	if r.err != nil {
		// "" would be success.
		e.text = notify.Cut(cmp.Or(strings.ToValidUTF8(strings.ReplaceAll(r.err.Error(), "\x00", ""), "?"), "it failed without a text"), 2000)
		e.failed = o.isLast(r)
		e.wait = min(max(o.retry.After(r.attempts), notify.RetryDelay(r.err)), time.Hour)
	}
	if r.schedule == "" || r.err != nil && !e.failed {
		return e
	}
	err := errors.New("this listener was built without schedules")
	if o.options.Next != nil {
		e.runAt, err = o.options.Next(r.schedule, r.due, now)
	}
	if err != nil {
		e.runAt, e.failed, e.text = time.Time{}, true, notify.Cut(fmt.Sprintf("schedule %q: %v", r.schedule, err), 2000)
	}
	return e
}

// lose takes note of results whose rows are another's now. o.mu is held.
func (o *Outbox) lose(results []result) {
	if len(results) == 0 {
		return
	}
	o.counts.leaseLost += uint64(len(results))
	o.log.Warn("lease lost: a handler took longer than its lease, and its row is another's now", "rows", len(results))
}

// tally counts and logs a result that is written. o.mu is held.
func (o *Outbox) tally(r result, e ending) {
	o.counts.changed = true
	if r.err == nil || e.failed {
		delete(o.health.retrying, r.id)
	}
	switch {
	case e.failed:
		o.counts.gaveUp++
		o.counts.failed++
		o.counts.due = max(0, o.counts.due-1)
		o.log.Error("gave up; the row stays in the outbox as failed", "id", r.id, "event", r.event, "attempts", r.attempts, "error", e.text,
			"retry", fmt.Sprint("pglistener -outbox-retry ", r.id))
	case r.err != nil:
		o.calls.Retried++
		if _, known := o.health.retrying[r.id]; !known && len(o.health.retrying) < maxRetrying {
			o.health.retrying[r.id] = r.due
		}
		if _, shouldLog := o.failures.Count(call.Kind(r.err)); shouldLog {
			o.log.Warn("handler failed; the row will be tried again", "id", r.id, "event", r.event, "attempt", r.attempts, "error", r.err)
		}
	case r.attempts > 0: // else only its first time was found
		o.counts.done++
		o.counts.due = max(0, o.counts.due-1)
	}
}
