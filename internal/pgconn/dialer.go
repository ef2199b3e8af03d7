package pgconn

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pglistener/pglistener/internal/retry"
)

// Dialer opens connections to the server for lib/pq's Listener and bounds every wait on them. lib/pq waits for a pong, a LISTEN
// or a handshake without a limit and holds its lock meanwhile, so the limit has to be in the connection: when it passes, lib/pq
// sees a read error and reconnects by itself (DESIGN section 2, facts 1, 5 and 12).
//
// All methods may be called from any goroutine, and none but the dials and Failed blocks.
type Dialer struct {
	timeout time.Duration // for a dial, for a write, for the first byte of an answer
	silence time.Duration // between two bytes at any time
	backoff retry.Backoff // between two attempts to connect

	ctx    context.Context // ends with Refuse or Close, and with it all dials and waits
	cancel context.CancelFunc
	epoch  time.Time    // what heard counts from
	heard  atomic.Int64 // when the last byte came, as nanoseconds since epoch

	mu           sync.Mutex
	conn         *Conn     // the newest one
	subscribedAt time.Time // when conn was subscribed; zero while it is not
	failures     int       // attempts that failed one after the other
	flaps        int       // connections that broke early, one after the other
	delay        time.Duration
	dialed       bool // by this attempt
}

// ErrStopping is what a dial returns after Refuse or Close.
var ErrStopping = errors.New("listener is stopping")

// NewDialer makes a Dialer. timeout bounds a dial, a write and the first byte of an answer to it, silence the time between any
// two bytes.
func NewDialer(timeout, silence time.Duration, b retry.Backoff) *Dialer {
	ctx, cancel := context.WithCancel(context.Background())
	return &Dialer{timeout: timeout, silence: silence, backoff: b, ctx: ctx, cancel: cancel, epoch: time.Now()}
}

// Dial implements pq.Dialer. It first waits until the backoff allows another attempt.
func (d *Dialer) Dial(network, address string) (net.Conn, error) {
	return d.DialTimeout(network, address, d.timeout)
}

// DialTimeout implements pq.Dialer; lib/pq calls it when the DSN has a connect_timeout.
func (d *Dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	// The wait belongs to the attempt, not to the host: of a DSN with several hosts only the first waits.
	d.mu.Lock()
	wait := d.delay
	d.delay, d.dialed = 0, true
	d.mu.Unlock()
	if !retry.Sleep(d.ctx, wait) {
		return nil, ErrStopping
	}
	ctx, cancel := context.WithTimeout(d.ctx, min(timeout, d.timeout))
	defer cancel()
	nc, err := new(net.Dialer).DialContext(ctx, network, address)
	if err == nil {
		c := &Conn{Conn: nc, timeout: d.timeout, silence: d.silence, heard: func() { d.heard.Store(int64(time.Since(d.epoch))) }}
		d.mu.Lock()
		d.conn = c
		d.mu.Unlock()
		if d.ctx.Err() == nil { // asked after conn is set, for Close to break it from now on
			return c, nil
		}
		nc.Close()
	}
	if d.ctx.Err() != nil {
		return nil, ErrStopping
	}
	return nil, err
}

// Subscribed tells the dialer that the newest connection is in use.
func (d *Dialer) Subscribed() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.subscribedAt, d.failures = time.Now(), 0
}

// Failed tells the dialer that an attempt failed; the next one waits longer. It says whether the attempt has come to a dial. When it has
// not, as with a service file that cannot be read, Failed itself makes the pause that the dial would have made.
func (d *Dialer) Failed() (dialed bool) {
	d.mu.Lock()
	dialed, wait := d.dialed, d.delay // which is zero if so
	d.dialed = false
	d.failures++
	d.delay = d.backoff.After(d.failures)
	d.mu.Unlock()
	retry.Sleep(d.ctx, wait)
	return dialed
}

// Lost tells the dialer that a subscribed connection broke. The next attempt is made at once, unless connections break again and
// again soon after they were made.
func (d *Dialer) Lost() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flaps++
	if time.Since(d.subscribedAt) > d.backoff.Max {
		d.flaps = 0
	}
	d.delay, d.dialed = d.backoff.After(d.flaps), false
}

// Current is the newest connection, or nil before the first.
func (d *Dialer) Current() *Conn {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conn
}

// Refuse ends every wait and dial and lets no new connection be made; an open one stays.
func (d *Dialer) Refuse() { d.cancel() }

// Close is Refuse, and breaks the open connection too. Nothing blocks on the network afterwards.
func (d *Dialer) Close() {
	d.Refuse()
	if c := d.Current(); c != nil {
		c.Break()
	}
}

// LastHeard is when the last byte came from the server, or when the Dialer was made, by the clock as it is now: it may have been set.
func (d *Dialer) LastHeard() time.Time {
	return time.Now().Add(time.Duration(d.heard.Load()) - time.Since(d.epoch))
}
