package main

import (
	"context"
	"sync"
	"time"
)

// How a Listener stops: UNLISTEN, hand on what is here, let the handlers finish, and give up
// in time (DESIGN section 4, invariant 6).

// hangUp ends the connection so that nothing is lost that reached the server
// before: after the pong every notification is on its way, after UNLISTEN no more
// come, and after Close lib/pq hands on what it has and closes Notify. The bounds on
// the connection bound this too.
func (l *Listener) hangUp(politely bool) {
	if politely {
		l.dialer.refuse()
		err := ping(l.pq)
		if err == nil {
			err = l.pq.UnlistenAll()
		}
		if err != nil {
			l.log.Warn("could not take leave of the server; what it still had for us is lost", "error", err)
		}
	}
	l.dialer.close()
	_ = l.pq.Close()
}

// drain waits until the workers have finished what was received, at most until
// tooLate, and returns how many notifications were abandoned. lib/pq has ended by now.
func (l *Listener) drain(runners <-chan struct{}, beat, late, tooLate <-chan time.Time) int {
	pending := []<-chan struct{}{runners}
	for _, w := range l.workers {
		pending = append(pending, w.drained())
	}
	for len(pending) > 0 {
		select {
		case <-pending[0]:
			pending = pending[1:]
		case <-beat: // this may take longer than the watchdog's patience
			l.publish()
			l.supervisor.beat(true, "shutting down")
		case <-late:
			l.quit(errShutdownTimeout)
		case <-tooLate:
			pending = nil
		}
	}
	return l.abandoned()
}

// abandoned ends the workers and counts what they leave behind.
func (l *Listener) abandoned() int {
	l.quit(errShutdownTimeout)
	n := 0
	for _, w := range l.workers {
		n += w.abandonRest()
	}
	return n
}

// awaitBackground waits for the goroutines of Run, for a second at most: one that
// uses a silent second connection ends with that connection, within PING_TIMEOUT.
func (l *Listener) awaitBackground() {
	done := make(chan struct{})
	go func() {
		l.background.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Second):
	}
}

// startRunners runs the handlers that work on their own. all is closed when all have returned.
func (l *Listener) startRunners() (all <-chan struct{}, stop func()) {
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, h := range l.handlers {
		if r, ok := h.(Runner); ok {
			running.Go(func() { r.Run(ctx, l.quitCtx) })
		}
	}
	done := make(chan struct{})
	go func() {
		running.Wait()
		close(done)
	}()
	return done, stop
}

// waiting is how many notifications are queued.
func (l *Listener) waiting() int {
	n := 0
	for _, w := range l.workers {
		waiting, _ := w.stats()
		n += waiting
	}
	return n
}
