// Package pgconn connects to PostgreSQL so that no wait is without a bound. It also knows what a connection string may hold, what
// a server's error means and what a person can do about it.
package pgconn

import (
	"net"
	"sync"
	"time"
)

// Conn is a connection that sets the deadlines of each read and write itself. A deadline is only set on entry to Read, so a
// reader that is held up elsewhere, by a full queue, raises no false alarm.
type Conn struct {
	net.Conn
	timeout time.Duration // for a write, and for the first byte after it
	silence time.Duration // between two bytes at any time
	heard   func()        // called when bytes have come

	mu            sync.Mutex // orders the read deadlines of Read and Write
	awaitingReply bool       // something was written and nothing has come back yet
	limit         time.Time  // set by lib/pq for connect_timeout
}

func (c *Conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	wait := c.silence
	if c.awaitingReply {
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
		c.awaitingReply = false
		c.mu.Unlock()
	}
	return n, err
}

func (c *Conn) Write(p []byte) (int, error) {
	deadline := time.Now().Add(c.timeout)
	c.mu.Lock()
	c.awaitingReply = true
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
func (c *Conn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limit = t
	return nil
}

func (c *Conn) setReadDeadline(t time.Time) error {
	if !c.limit.IsZero() && c.limit.Before(t) {
		t = c.limit
	}
	return c.Conn.SetReadDeadline(t)
}

// Break closes the connection under whoever uses it; reads and writes fail from then on.
func (c *Conn) Break() { _ = c.Conn.Close() }
