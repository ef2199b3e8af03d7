package outbox

import (
	"context"

	"github.com/pglistener/pglistener/internal/notify"
)

// doorbell is a handler that runs when it is called, and by the schedule of a row of the outbox, so that replicas and restarts
// agree; never twice at once in this process.
type doorbell struct{ *Outbox }

// NewDoorbell makes a handler for a doorbell with a schedule. The row stands under a channel of its own, for a NOTIFY about the
// row is no ring.
func NewDoorbell(h notify.Handler, pool *Pool, options Options, setup notify.Setup) (notify.Handler, error) {
	turn := make(chan struct{}, 1)
	exclusive := func(ctx context.Context, n notify.Notification) error {
		select {
		case turn <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		defer func() { <-turn }()
		n.Channel = setup.Channel
		return h.Handle(ctx, n)
	}
	own := setup
	own.Channel = notify.Cut(setup.Channel, 54) + " schedule"
	o, err := New(h, pool, options, own)
	if err != nil {
		return nil, err
	}
	o.handle = exclusive
	return doorbell{o}, nil
}

// Handle implements notify.Handler: the doorbell was rung.
func (d doorbell) Handle(ctx context.Context, n notify.Notification) error { return d.handle(ctx, n) }
