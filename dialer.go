package main

import (
	"context"
	"database/sql"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

// dialer opens connections to the server for lib/pq and bounds every wait on
// them. lib/pq waits for a pong, a LISTEN or a handshake without a limit and
// holds its lock meanwhile, so the limit has to be in the connection: when it
// passes, lib/pq sees a read error and reconnects by itself (DESIGN section 2,
// facts 1, 5 and 12).
//
// All methods may be called from any goroutine.
type dialer struct {
	timeout time.Duration // PING_TIMEOUT: for a dial, for a write, for the first byte of an answer
	silence time.Duration // PING_INTERVAL + PING_TIMEOUT: between two bytes at any time
	backoff backoff       // between two attempts to connect

	ctx    context.Context // done once close or refuse was called; ends dials and waits
	cancel context.CancelFunc
	epoch  time.Time    // what heard counts from
	heard  atomic.Int64 // when the last byte came, as nanoseconds since epoch

	mu       sync.Mutex
	conn     *boundedConn // the newest one
	born     time.Time    // when conn was subscribed; zero while it is not
	failures int          // attempts that failed one after the other
	flaps    int          // connections that broke early, one after the other
	delay    time.Duration
}

// errStopping is what a dial returns after refuse or close.
var errStopping = errors.New("listener is stopping")

func newDialer(timeout, silence time.Duration, b backoff) *dialer {
	ctx, cancel := context.WithCancel(context.Background())
	return &dialer{timeout: timeout, silence: silence, backoff: b, ctx: ctx, cancel: cancel, epoch: time.Now()}
}

// Dial implements pq.Dialer. It first waits until the backoff allows another attempt.
func (d *dialer) Dial(network, address string) (net.Conn, error) {
	return d.DialTimeout(network, address, d.timeout)
}

// DialTimeout implements pq.Dialer; lib/pq calls it when the DSN has a connect_timeout.
func (d *dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	// The wait belongs to the attempt, not to the host: of a DSN with several
	// hosts only the first waits.
	d.mu.Lock()
	wait := d.delay
	d.delay = 0
	d.mu.Unlock()
	if !sleep(d.ctx, wait) {
		return nil, errStopping
	}
	ctx, cancel := context.WithTimeout(d.ctx, min(timeout, d.timeout))
	defer cancel()
	nc, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		if d.ctx.Err() != nil {
			return nil, errStopping
		}
		return nil, err
	}
	c := &boundedConn{Conn: nc, timeout: d.timeout, silence: d.silence, heard: func() {
		d.heard.Store(int64(time.Since(d.epoch)))
	}}
	d.mu.Lock()
	d.conn = c
	refused := d.ctx.Err() != nil
	d.mu.Unlock()
	if refused {
		nc.Close()
		return nil, errStopping
	}
	return c, nil
}

// subscribed says that the newest connection is in use.
func (d *dialer) subscribed() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.born, d.failures = time.Now(), 0
}

// failed says that an attempt failed; the next one waits longer.
func (d *dialer) failed() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failures++
	d.delay = d.backoff.after(d.failures)
}

// lost says that a subscribed connection broke. The next attempt is made at once,
// unless connections break again and again soon after they were made.
func (d *dialer) lost() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flaps++
	if time.Since(d.born) > d.backoff.max {
		d.flaps = 0
	}
	d.delay = d.backoff.after(d.flaps)
}

// current is the newest connection, or nil before the first.
func (d *dialer) current() *boundedConn {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conn
}

// refuse ends every wait and dial and lets no new connection be made; an open one stays.
func (d *dialer) refuse() { d.cancel() }

// close is refuse, and breaks the open connection too. Nothing blocks on the network afterwards.
func (d *dialer) close() {
	d.refuse()
	if c := d.current(); c != nil {
		c.Conn.Close()
	}
}

// lastHeard is when the last byte came from the server, or when the dialer was made.
func (d *dialer) lastHeard() time.Time { return d.epoch.Add(time.Duration(d.heard.Load())) }

// sqlDialer opens the connections of database/sql. As these are read only while
// an answer is due, the timeout bounds every read.
type sqlDialer struct{ timeout time.Duration }

// Dial implements pq.Dialer.
func (d sqlDialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

// DialTimeout implements pq.Dialer.
func (d sqlDialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	return sqlDialer{min(timeout, d.timeout)}.Dial(network, address)
}

// DialContext implements pq.DialerContext: lib/pq prefers it.
func (d sqlDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := (&net.Dialer{Timeout: d.timeout}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &boundedConn{Conn: nc, timeout: d.timeout, silence: d.timeout, heard: func() {}}, nil
}

// openDB returns a pool for short statements, whose every wait is bounded by
// timeout. It connects when it is first used.
func openDB(dsn string, timeout time.Duration) (*sql.DB, error) {
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		return nil, errBadDSN // not the error itself: it may hold the password
	}
	// One round trip per statement, and none that a pooler could tear apart.
	cfg.BinaryParameters = true
	c, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, errBadDSN
	}
	c.Dialer(sqlDialer{timeout})
	return sql.OpenDB(c), nil
}

// boundedConn sets the deadlines of each read and write itself. A deadline is
// only set on entry to Read, so a reader that is held up elsewhere, by a full
// queue, raises no false alarm.
type boundedConn struct {
	net.Conn
	timeout time.Duration // for a write, and for the first byte after it
	silence time.Duration // between two bytes at any time
	heard   func()        // called when bytes have come

	mu    sync.Mutex // orders the read deadlines of Read and Write
	owed  bool       // something was written and nothing has come back yet
	limit time.Time  // set by lib/pq for connect_timeout
}

func (c *boundedConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	wait := c.silence
	if c.owed {
		wait = c.timeout
	}
	err := c.setReadDeadline(time.Now().Add(wait))
	c.mu.Unlock()
	if err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.heard()
		c.mu.Lock()
		c.owed = false
		c.mu.Unlock()
	}
	return n, err
}

func (c *boundedConn) Write(p []byte) (int, error) {
	deadline := time.Now().Add(c.timeout)
	c.mu.Lock()
	c.owed = true
	// This also cuts short the Read that is under way.
	err := c.setReadDeadline(deadline)
	c.mu.Unlock()
	if err == nil {
		err = c.Conn.SetWriteDeadline(deadline)
	}
	if err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// SetDeadline is called by lib/pq only, to impose connect_timeout and to lift it.
func (c *boundedConn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limit = t
	return nil
}

func (c *boundedConn) setReadDeadline(t time.Time) error {
	if !c.limit.IsZero() && c.limit.Before(t) {
		t = c.limit
	}
	return c.Conn.SetReadDeadline(t)
}

// backoff spaces attempts: it doubles from min to max, with jitter so that
// listeners which lost the same server do not come back in step.
type backoff struct{ min, max time.Duration }

// after returns the wait after n failures in a row: between half and the whole
// of min doubled n-1 times, capped at max. It is 0 for n = 0.
func (b backoff) after(n int) time.Duration {
	if n <= 0 {
		return 0
	}
	d := b.min
	for ; n > 1 && d < b.max; n-- {
		d *= 2
	}
	d = min(d, b.max)
	return d/2 + rand.N(d/2+1)
}

// sleep waits for d and returns true, or false at once when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
