package pgconn

import (
	"errors"
	"fmt"
	"net"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/retry"
)

// Ping is pq.Listener.Ping, which panics when the server answers with an error (DESIGN fact 9). It blocks until the server
// answers or the connection's deadline passes; call it from another goroutine than the one that reads Notify (facts 1 and 2).
func Ping(p *pq.Listener) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("server refused the ping: %v", r)
		}
	}()
	return p.Ping()
}

// Listen LISTENs channels one after the other and repeats each until the server accepts it; lib/pq does it again on every later
// connection. It blocks while the server is away (DESIGN fact 3), so call it on a goroutine of its own. It calls report with each
// refusal, and at the end with nil, when every channel is known to lib/pq. It returns without that when the listener or d is closed.
func (d *Dialer) Listen(p *pq.Listener, channels []string, report func(error)) {
	for _, channel := range channels {
		for attempt := 1; ; attempt++ {
			err := p.Listen(channel)
			if err == nil || errors.Is(err, pq.ErrChannelAlreadyOpen) {
				break
			}
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// The server refused: a standby, until it is promoted (fact 18).
			report(fmt.Errorf("listen %q: %w", channel, err))
			if !retry.Sleep(d.ctx, d.backoff.After(attempt)) {
				return
			}
		}
	}
	// Listen also returns nil when the connection broke under it (fact 8). A pong proves that it did not; if none comes, a
	// reconnect follows and lib/pq LISTENs every channel again.
	_ = Ping(p)
	report(nil)
}
