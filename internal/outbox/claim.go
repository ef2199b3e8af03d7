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
	expiry := time.Tick(o.margin / 2)
	var failures retry.Failures
	pause := retry.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	stalled := 0 // times in a row that rows were due and could not be had
	for stop.Err() == nil {
		room, wait := o.room()
		if room == 0 {
			next, _ := o.count(o.scan.drained) // an error is told when there is room
			o.await(stop, expiry, o.taken, min(wait, max(next, time.Second)))
			continue
		}
		claimed, next, err := o.fetch(room)
		if err != nil {
			attempt, shouldLog := failures.Count(pgconn.Kind(err))
			if shouldLog {
				hint := o.store.hint(err)
				o.log.Error("outbox cannot be read; trying again", "attempt", attempt, "error", err, "hint", hint)
				o.readable(err, hint)
			}
			retry.Sleep(stop, pause.After(attempt))
			continue
		}
		failures.Reset()
		if stalled++; next > 0 || claimed > 0 {
			stalled = 0
		}
		if claimed < room { // stalled: somebody else has locked what is due, and may hold it for long
			o.await(stop, expiry, o.wake, max(next, pause.After(stalled), time.Millisecond))
		}
	}
}

// fetch claims rows, and returns how many. When fewer than room are due, next is when to look again. What it finds out is known
// to Ready at once.
func (o *Outbox) fetch(room int) (claimed int, next time.Duration, err error) {
	defer func() { o.readable(err, "") }()
	o.mu.Lock()
	unfit := o.health.read != nil || o.health.write != nil
	o.mu.Unlock()
	if err = o.keepSchedule(); err == nil && unfit { // what cannot be ended must not be claimed, or it would be handled again and again
		err = o.store.exec(statement("verify"))
	}
	if err != nil {
		return 0, 0, err
	}
	short := o.scan.short()
	if claimed, next, err = o.look(room, short); err == nil && short && o.scan.drained && o.scan.overdue() {
		more := 0
		more, next, err = o.look(room-claimed, false)
		claimed += more
	}
	if o.scan.drained && err == nil {
		o.drained(next <= 0)
		err = o.pool.lookForStrangers(o.store, o.log)
	}
	if err != nil {
		return claimed, 0, err
	}
	due, err := o.count(o.scan.drained)
	return claimed, min(next, due, o.scan.again()), err
}

// keepSchedule makes sure of the row of NAME_SCHEDULE, at the start and then at most once a minute: somebody may have deleted it.
// Without a schedule a row that is left over goes at the start.
func (o *Outbox) keepSchedule() error {
	if !o.kept.IsZero() && (o.options.Schedule == "" || time.Since(o.kept) < time.Minute) {
		return nil
	}
	err := o.store.keepSchedule(scheduleKey, o.options.Schedule)
	if err == nil {
		o.kept = time.Now()
	}
	return err
}

// scheduleKey is the key of the row of NAME_SCHEDULE.
const scheduleKey = "pglistener schedule"

// await waits until something is said on c, stop ends, or d has passed. Meanwhile it gives back what has been claimed for too
// long.
func (o *Outbox) await(stop context.Context, expiry <-chan time.Time, c <-chan struct{}, d time.Duration) {
	timer := time.After(d)
	for {
		select {
		case <-timer:
			return
		case <-c:
			return
		case <-stop.Done():
			return
		case <-expiry:
			o.expire()
		}
	}
}

// slowTry is how long a try of a paused channel may take before another is begun.
const slowTry = 2 * time.Second

// room is how many rows to claim now; 0 means none until taken says so, or wait has passed.
func (o *Outbox) room() (rows int, wait time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	free := o.options.Concurrency - o.running - len(o.buffer)
	if o.breaker.Open() {
		o.scan.looked = time.Time{} // what was given back comes before the rows that have been seen
		if free <= 0 {
			return 0, time.Hour
		}
		if wait = o.breaker.Try(time.Now(), slowTry); wait > 0 {
			return 0, wait
		}
		return 1, 0
	}
	// Slow jobs are claimed as slots come free, quick ones ahead, so that a round trip to the server is not what they wait for.
	ahead := min(prefetchRows, int(time.Duration(o.options.Concurrency)*prefetchTime/max(o.handling, 1)), int(o.store.bytes)/(o.size+rowBytes))
	if o.calls.OK+o.calls.Failed == 0 {
		ahead = 0 // nothing is known yet
	}
	if len(o.results) > prefetchRows {
		return 0, time.Hour // the writer is behind, and is to catch up first
	}
	o.low = ahead / 2
	if len(o.buffer) > o.low {
		return max(free, 0), time.Hour
	}
	return max(free, ahead-len(o.buffer)), time.Hour
}

// expire has rows given back that were claimed ahead and wait for jobs that have turned slow: another replica may have a free
// slot, and their lease must outlive the handler.
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
		retry.Nudge(o.written)
		retry.Nudge(o.taken) // nobody else may: with all workers idle the slots are free now
	}
}

// push gives claimed jobs to the workers.
func (o *Outbox) push(jobs []job) {
	if len(jobs) == 0 {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.begins()
	paused := o.breaker.Open()
	for _, j := range jobs {
		j.try = paused && len(jobs) == 1                                    // of more, the channel was paused since room was asked for
		o.buffer, o.size = append(o.buffer, j), max(o.size, len(j.payload)) // or as many large rows would come as there were small ones
	}
	for n := len(o.buffer) - o.idle; n > 0 && o.workers < o.options.Concurrency; n-- {
		o.workers++
		o.hire()
	}
	for range jobs {
		o.ready.Signal()
	}
}
