package main

import (
	"fmt"
	"time"
)

// status is how things stand with the connection. The loop owns one and
// publishes copies; whoever is asked for health reads the newest.
type status struct {
	beat      time.Time // when the loop last turned
	connected bool
	listening bool // connected, and every channel is LISTENed
	stopping  bool
	reason    string // why it is not listening, in words; never "" while it is not

	heldBy    string    // the channel whose full queue has stopped the reading; "" when none has
	heldSince time.Time // since when it has
	heldUntil time.Time // when reading was last known to be stopped

	proven     time.Time // when the last probe came back
	provenHere bool      // one has come back on this connection
	deaf       string    // the diagnosis, from a lost probe until one comes back
	sendError  string    // why the last probe could not be sent
	roundTrip  time.Duration
	queueUsage float64 // pg_notification_queue_usage(), 0 to 1

	gaps           int
	gapTotal       time.Duration
	reconnects     int
	failedAttempts int
	probesLost     int
}

// loopBound is how long the loop may take for one turn before it counts as stuck.
const loopBound = 10 * time.Second

// alive returns why the loop does not turn, or "".
func (l *Listener) alive() string {
	s := l.published.Load()
	if s == nil {
		return "not started"
	}
	if stuck := time.Since(s.beat); stuck > loopBound {
		return fmt.Sprintf("the loop is stuck since %v", stuck.Round(time.Second))
	}
	return ""
}

// deafness returns why a notification that is sent now might not be heard, or ""
// when all is known to be well. It answers from memory, and may be called from any goroutine.
func (l *Listener) deafness() string {
	if reason := l.alive(); reason != "" {
		return reason
	}
	return l.judge(*l.published.Load())
}

// judge is deafness as of s.
func (l *Listener) judge(s status) string {
	quiet := time.Since(l.dialer.lastHeard())
	// While reading is stopped for a full queue nothing can be heard, but the server
	// keeps what is sent; and the proofs that are missed meanwhile may still be due.
	window := l.cfg.ProbeInterval + 2*l.cfg.PingTimeout
	held := s.heldBy != "" || time.Since(s.heldUntil) < window
	switch {
	case s.stopping:
		return "shutting down"
	case !s.connected || !s.listening:
		return s.reason
	case s.deaf != "":
		return s.deaf
	case quiet > l.cfg.PingInterval+l.cfg.PingTimeout && !held:
		return fmt.Sprintf("nothing heard from the server for %v", quiet.Round(time.Millisecond))
	case s.heldBy != "" && time.Since(s.heldSince) > max(l.cfg.ProbeInterval, l.cfg.PingInterval)+l.cfg.PingTimeout:
		// Nothing need be lost; but nothing is heard, nor can it be known whether the connection still lives.
		return fmt.Sprintf("reading has stopped for %v because the queue of channel %q is full; the server keeps what is sent meanwhile",
			time.Since(s.heldSince).Round(time.Second), s.heldBy)
	case l.cfg.ProbeInterval == 0:
		return ""
	case !s.provenHere && s.sendError != "":
		return "delivery is not proven: the probe could not be sent: " + s.sendError
	case !s.provenHere && !held:
		return "delivery is not proven yet: the first probe is under way"
	case time.Since(s.proven) > window && !held:
		return fmt.Sprintf("delivery is not proven since %v: %s", time.Since(s.proven).Round(time.Second), s.sendError)
	}
	return ""
}
