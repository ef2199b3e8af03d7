package outbox

import (
	"context"
	"database/sql"
	"log/slog"
	"sync"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
)

// doorbell is a handler that runs when it is called, and by the schedule of a row of the outbox, so that replicas and restarts
// agree; never twice at once in this process.
type doorbell struct{ *Outbox }

// NewDoorbell makes a handler for a doorbell with a schedule. The row stands under a channel of its own, for a NOTIFY about the
// row is no ring.
func NewDoorbell(h notify.Handler, pool *Pool, options Options, setup notify.Setup) (notify.Handler, error) {
	channel := setup.Channel
	setup.Channel = scheduleChannel(channel)
	o, err := New(h, pool, options, setup)
	if err != nil {
		return nil, err
	}
	o.labels = []string{"by", "schedule"} // the runs that are rung are in the figures of the queue, which have the same names
	turn := make(chan struct{}, 1)
	o.handle = func(ctx context.Context, n notify.Notification) error {
		select {
		case turn <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		defer func() { <-turn }()
		n.Channel = channel
		return h.Handle(ctx, n)
	}
	return doorbell{o}, nil
}

// Handle implements notify.Handler: the doorbell was rung.
func (d doorbell) Handle(ctx context.Context, n notify.Notification) error { return d.handle(ctx, n) }

// scheduleChannel is the channel of the row of a doorbell.
func scheduleChannel(doorbell string) string { return notify.Cut(doorbell, 54) + " schedule" }

// ForgetSchedules deletes the rows that are left of doorbells whose schedule was taken away; tables are by their channels. It
// works on a goroutine of its own, which end waits for, and tries once: what is left over does no harm but a warning.
func ForgetSchedules(dsn string, timeout time.Duration, tables map[string]string, log *slog.Logger) (end func()) {
	forget := func(_ context.Context, db *sql.DB) error {
		for channel, name := range tables {
			t, err := parseTable(name)
			if err != nil {
				continue // it may be of no use to a doorbell
			}
			s := store{db: db, table: t, channel: scheduleChannel(channel), rights: "select, delete", timeout: limit(timeout)}
			err = s.keepSchedule(scheduleKey, "")
			if err == nil || pq.As(err, pqerror.UndefinedTable, pqerror.InvalidSchemaName, pqerror.UndefinedColumn) != nil {
				continue // nothing is left, or never was
			}
			log.Warn("could not look for what is left of a schedule that was taken away; delete the row of that key if there is one",
				"channel", channel, "key", scheduleKey, "error", s.explain(err))
			if pq.As(err) == nil {
				return err // the server is not there, and would not be for the others
			}
		}
		return nil
	}
	var w sync.WaitGroup
	w.Go(func() { _ = pgconn.Once(dsn, timeout, forget) }) // it has said why not, or the listener does
	return w.Wait
}
