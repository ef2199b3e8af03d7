package main

import (
	"context"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
)

// How a Listener stops, in two phases (DESIGN section 4, invariant 6). First it UNLISTENs, and lets the handlers finish what has been
// received. Then, shortly before SHUTDOWN_TIMEOUT, it cancels the handlers, breaks the connection and counts what was not handled.

// grace is how long a handler may take to end after its context has: it fits into SHUTDOWN_TIMEOUT together with the work that is
// to be finished.
func (s Settings) grace() time.Duration { return min(2*time.Second, s.ShutdownTimeout/4) }

// beginShutdown begins the first phase, and returns when the second begins and when it is to be over.
func (l *Listener) beginShutdown() (late, tooLate <-chan time.Time) {
	timeout := l.settings.ShutdownTimeout
	l.log.Info("shutting down", "timeout", timeout)
	l.status.Stopping = true
	l.publish()
	l.OnBeat(true, true, l.Ready())
	politely := l.account.Listening
	l.background.Go(func() { l.hangUp(politely) })
	reserve := min(l.settings.grace()+500*time.Millisecond, timeout/2)
	return time.After(timeout - reserve), time.After(timeout)
}

// hangUp ends the connection so that nothing is lost that reached the server before: after the pong every notification is on its
// way, after UNLISTEN no more come, and after Close lib/pq hands on what it has and closes Notify. The bounds on the connection
// bound this too.
func (l *Listener) hangUp(politely bool) {
	if politely {
		l.dialer.Refuse()
		err := pgconn.Ping(l.pq)
		if err == nil {
			err = l.pq.UnlistenAll()
		}
		if err != nil {
			l.log.Warn("could not UNLISTEN cleanly; undelivered notifications are lost", "error", err)
		}
	}
	l.dialer.Close()
	_ = l.pq.Close()
}

// cutShort begins the second phase: from now on the queues abandon what they are given.
func (l *Listener) cutShort() {
	l.quit(notify.ErrShutdownTimeout)
	l.dialer.Close()
	if l.held != nil {
		l.retryHeld()
	}
}

// drain waits until the queues have finished what was received, at most until tooLate, and returns how many notifications were
// abandoned. lib/pq has ended by now.
func (l *Listener) drain(runners <-chan struct{}, beat, late, tooLate <-chan time.Time) int {
	pending := []<-chan struct{}{runners}
	for _, q := range l.queues {
		pending = append(pending, q.Drained())
	}
	for len(pending) > 0 {
		select {
		case <-pending[0]:
			pending = pending[1:]
		case <-beat: // this may take longer than the watchdog's patience
			l.publish()
			l.OnBeat(true, true, l.Ready())
		case <-late:
			l.quit(notify.ErrShutdownTimeout)
		case <-tooLate:
			pending = nil
		}
	}
	return l.abandoned()
}

// abandoned ends the queues and counts what they leave behind.
func (l *Listener) abandoned() int {
	l.quit(notify.ErrShutdownTimeout)
	n := 0
	for _, q := range l.queues {
		n += q.AbandonRest()
	}
	return n
}

// awaitBackground waits for the goroutines of Run, for a second at most: one that uses a silent second connection ends with that
// connection, within PING_TIMEOUT.
func (l *Listener) awaitBackground() {
	select {
	case <-ended(&l.background):
	case <-time.After(time.Second):
	}
}

// ended returns a channel that is closed when all of a group have.
func ended(all *sync.WaitGroup) <-chan struct{} {
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	return done
}

// startHandlers starts the catch-ups and runs the handlers that work on their own. all is closed when those have returned, which
// they do after stop.
func (l *Listener) startHandlers() (all <-chan struct{}, stop func()) {
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, c := range l.channels {
		l.queues[c.Name].Start()
		if r, ok := c.Handler.(notify.Runner); ok {
			running.Go(func() { r.Run(ctx, l.quitCtx) })
		}
	}
	return ended(&running), stop
}
