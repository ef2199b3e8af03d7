package outbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
)

// counts are for the metrics.
type counts struct {
	done, gaveUp, leaseLost, givenBack uint64

	rowCounts      // as they were counted last, and as this replica has changed them since
	none      bool // were due when they were counted last; false when that is not known
	counted   time.Time
	took      time.Duration // the counting
	heldBack  bool          // see Pool.findHolder
	changed   bool          // since then, by this replica, or perhaps by others
}

// countInterval is how old the counts of rows may be that this replica has changed.
const countInterval = 5 * time.Second

// count counts the rows, if it is time to, and returns when it is next: never sooner than a hundred times what it takes, so that
// counting millions of rows costs the server a hundredth of one core; and not at all while nothing runs or changes here, but for sweeps,
// pauses and, unless there were no rows, probes. The first count waits until nothing is due: with a great backlog it takes long.
func (o *Outbox) count(drained bool) (next time.Duration, err error) {
	o.mu.Lock()
	c := &o.counts
	if c.counted.IsZero() && !drained {
		c.counted = time.Now()
	}
	next = time.Until(c.counted.Add(max(countInterval, 100*c.took)))
	if !c.changed && !c.counted.IsZero() && len(o.health.retrying) == 0 && o.running == 0 && !o.breaker.Open() {
		next = time.Hour
	}
	retrying := slices.Collect(maps.Keys(o.health.retrying))
	o.mu.Unlock()
	if next > 0 {
		return next, nil
	}
	began := time.Now()
	rows, alive, err := o.store.count(retrying)
	o.mu.Lock()
	defer o.mu.Unlock()
	if c.counted, c.took, c.changed, c.none = time.Now(), time.Since(began), err != nil, false; err != nil {
		c.took /= 10 // of a count that takes longer than a statement may, so that claims have nine tenths of the time
		return 0, err
	}
	if rows.due > 0 {
		o.begins()
	}
	c.rowCounts, c.none = rows, rows.due == 0
	maps.DeleteFunc(o.health.retrying, func(id int64, _ time.Time) bool { // another replica, or a person, may have ended it
		return slices.Contains(retrying, id) && !slices.Contains(alive, id)
	})
	return countInterval, nil
}

// drained takes note that nothing could be claimed: nothing is due but what is in hand, here or at another replica, or all that is
// due is locked, and is to be counted.
func (o *Outbox) drained(locked bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !locked {
		o.counts.due, o.counts.oldest = o.running+len(o.buffer)+len(o.results), time.Time{}
	}
	o.counts.changed = o.counts.changed || locked
}

// Stats implements notify.Meter: its own figures and the handler's.
func (o *Outbox) Stats() []notify.Stat {
	more := o.pool.stats(o.channel)
	if m, ok := o.handler.(notify.Meter); ok {
		more = append(more, m.Stats()...)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	c := o.counts
	rows := func(state string, n int) notify.Stat {
		return notify.Stat{Name: "pglistener_outbox_rows", Kind: "gauge", Labels: []string{"state", state}, Value: float64(n),
			Help: "Rows of the outbox: due (waiting or being handled here), delayed (for later, or to be tried again), or failed (given up)."}
	}
	stats := []notify.Stat{
		call.Item("done", c.done), call.Item("failed", c.gaveUp), call.Item("given_back", c.givenBack), call.Item("lease_lost", c.leaseLost),
		rows("due", c.due), rows("delayed", c.delayed), rows("failed", c.failed),
		{Name: "pglistener_outbox_oldest_seconds", Kind: "gauge", Value: o.oldest().Seconds(),
			Help: "For how long the oldest row has been due that waits or is tried again."},
		call.PausedStat(&o.breaker), notify.Flag("pglistener_outbox_vacuum_held_back",
			"1 while claims are slow because somebody holds a snapshot that keeps dead rows from being removed.", c.heldBack),
	}
	stats = append(stats, o.calls.Stats()...)
	for i := range stats {
		stats[i].Labels = append(stats[i].Labels, o.labels...)
	}
	return append(stats, more...)
}

// oldest is for how long the oldest row has been due that is known to wait, to be handled, or to be tried again. o.mu is held.
func (o *Outbox) oldest() time.Duration {
	known := slices.Collect(maps.Values(o.health.retrying))
	if !o.counts.oldest.IsZero() {
		known = append(known, o.counts.oldest)
	}
	if len(o.buffer) > 0 {
		known = append(known, o.buffer[0].due)
	}
	if len(known) == 0 {
		return 0
	}
	return max(0, time.Since(slices.MinFunc(known, time.Time.Compare)))
}

// Check implements notify.Checker: it says whether the table fits, and asks the handler too.
func (o *Outbox) Check(ctx context.Context) (string, error) {
	_, err := o.store.db.ExecContext(ctx, o.Verify()) // the channels share two connections, and each may have to wait for the table
	if ctx.Err() != nil {
		return "", errors.New("no answer in time, as when somebody has locked the table " + o.store.table.name)
	} else if err != nil {
		return "", o.store.explain(err)
	}
	text := "table " + o.store.table.name + " fits"
	if c, ok := o.handler.(notify.Checker); ok {
		more, err := c.Check(ctx)
		return text + ", " + more, err
	}
	return text, nil
}

// maxRetrying bounds how many rows are remembered that are to be tried again.
const maxRetrying = 1000

// health is what Ready goes by.
type health struct {
	read, write  error               // why the table could not be read or written, the last time
	progress     time.Time           // when a row was done last, or work began after there was none
	failingSince time.Time           // when a row failed for the first time since one was done
	retrying     map[int64]time.Time // the rows that failed and are tried again, with since when they have been due
}

// readable takes note of whether the table can be read. Finding a hint takes longer than the error itself, which must be known at
// once.
func (o *Outbox) readable(err error, hint string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err == nil || o.health.read == nil || hint != "" {
		o.health.read = withHint(err, hint)
	}
}

// begins takes note that there is work; lateness counts from here if there was none. o.mu is held.
func (o *Outbox) begins() {
	if o.running == 0 && len(o.buffer) == 0 && len(o.health.retrying) == 0 && o.counts.due == 0 {
		o.health.progress = time.Now()
	}
}

// Verify implements notify.Verifier.
func (o *Outbox) Verify() string { return o.store.table.sql(statement("verify")) }

// Verified implements notify.Verifier.
func (o *Outbox) Verified(err error) {
	o.readable(err, pgconn.Advice(err))
	o.mu.Lock()
	stale := o.counts.due+o.counts.delayed+o.counts.failed > 0 // an alert may hang on rows that another replica or a person has ended
	o.counts.changed = o.counts.changed || stale
	o.mu.Unlock()
	if err != nil || stale {
		o.poke() // the claimer tells the log, and finds out when it is mended
	}
}

// Ready implements notify.Readier: it returns why rows are not being handled.
func (o *Outbox) Ready() error {
	if r, ok := o.handler.(notify.Readier); ok {
		if err := r.Ready(); err != nil {
			return err
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	h := &o.health
	// With nothing left that a try could be made of, only a new row can end a pause.
	left := !o.counts.none || o.running+len(o.buffer)+len(o.results)+len(h.retrying) > 0
	if err := call.PausedTooLong(&o.breaker); err != nil && left {
		return err
	}
	stuck := time.Since(h.progress)
	switch {
	case h.read != nil:
		return fmt.Errorf("the outbox cannot be read: %w", h.read)
	case h.write != nil:
		return fmt.Errorf("the outbox cannot be written: %w", h.write)
	case stuck <= o.options.Late():
		return nil
	case len(h.retrying) > 0 && !h.failingSince.IsZero() && time.Since(h.failingSince) > o.options.Late():
		return fmt.Errorf("no row has succeeded for %v; %d have failed and are tried again, first %v",
			stuck.Round(time.Second), len(h.retrying), slices.Min(slices.Collect(maps.Keys(h.retrying))))
	case o.running > 0 || len(o.buffer) > 0 || o.counts.due > 0:
		return fmt.Errorf("no row has succeeded for %v, and %d wait", stuck.Round(time.Second), max(o.counts.due, o.running+len(o.buffer)))
	}
	return nil
}
