package outbox

import (
	"context"
	"fmt"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
)

// count counts the rows for the metrics, now and then: an idle outbox costs nothing.
// The first time waits until nothing is due: with a great backlog it takes long.
func (o *Outbox) count(drained bool) error {
	o.mu.Lock()
	recent := time.Since(o.counts.counted) < countInterval
	if o.counts.counted.IsZero() && !drained {
		o.counts.counted, recent = time.Now(), true
	}
	o.mu.Unlock()
	if recent {
		return nil
	}
	waiting, delayed, dead, oldest, err := o.store.count()
	if err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.counts.waiting, o.counts.delayed, o.counts.dead, o.counts.oldest = waiting, delayed, dead, oldest
	o.counts.counted = time.Now()
	return nil
}

// Stats implements Meter.
func (o *Outbox) Stats() []notify.Stat {
	o.mu.Lock()
	c := o.counts
	o.mu.Unlock()
	return []notify.Stat{
		{Name: "pglistener_outbox_rows_waiting", Kind: "gauge", Help: "Rows of the outbox that are due, when they were counted last.", Value: float64(c.waiting)},
		{Name: "pglistener_outbox_rows_delayed", Kind: "gauge", Help: "Rows that are scheduled, to be tried again or being handled, likewise.", Value: float64(c.delayed)},
		{Name: "pglistener_outbox_rows_failed", Kind: "gauge", Help: "Rows that were given up and wait for a person, likewise.", Value: float64(c.dead)},
		{Name: "pglistener_outbox_oldest_waiting_seconds", Kind: "gauge", Help: "For how long the oldest due row has been due, likewise.", Value: c.oldest.Seconds()},
		{Name: "pglistener_outbox_jobs_done_total", Kind: "counter", Help: "Rows whose handler succeeded.", Value: float64(c.done)},
		{Name: "pglistener_outbox_jobs_retried_total", Kind: "counter", Help: "Rows whose handler failed and which are tried again.", Value: float64(c.retried)},
		{Name: "pglistener_outbox_jobs_failed_total", Kind: "counter", Help: "Rows that were given up.", Value: float64(c.failed)},
		{Name: "pglistener_outbox_jobs_given_back_total", Kind: "counter", Help: "Rows claimed and not begun when the listener stopped.", Value: float64(c.givenBack)},
		{Name: "pglistener_outbox_leases_lost_total", Kind: "counter", Help: "Rows whose handler outlived its lease, so that its result was not written.", Value: float64(c.leaseLost)},
	}
}

// Check implements Checker: it says whether the table fits.
func (o *Outbox) Check(context.Context) (string, error) {
	if err := o.store.fit(); err != nil {
		hint := o.store.table.hint(err)
		if hint != "" {
			return "", fmt.Errorf("%w: %s", err, hint)
		}
		return "", err
	}
	return "table " + o.store.table.name + " fits", nil
}
