package main

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
	"github.com/pglistener/pglistener/internal/probe"
)

// Status is how things stand with a Listener. The loop publishes copies of its own; whoever asks reads the newest.
type Status struct {
	pgconn.State
	Probe      probe.Status
	QueueUsage float64 // pg_notification_queue_usage() at the last probe, 0 to 1
	Stopping   bool

	turnedAt  time.Time // when the loop last turned
	heldBy    string    // the channel whose full queue has stopped the reading; "" when none has
	heldSince time.Time // since when it has
	heldUntil time.Time // when reading was last known to be stopped
}

// loopBound is how long the loop may take for one turn before it counts as stuck.
const loopBound = 10 * time.Second

// publish shows others how things stand. Only the loop calls it.
func (l *Listener) publish() {
	s := &l.status
	s.State, s.Probe, s.turnedAt = l.account.State, l.probe.Status(), time.Now()
	if s.heldBy == "" {
		s.heldSince = s.turnedAt
	}
	if s.heldBy = ""; l.held != nil {
		s.heldBy, s.heldUntil = l.heldBy.Channel(), s.turnedAt
	}
	published := *s
	l.published.Store(&published)
}

// newest returns the status published last.
func (l *Listener) newest() Status { return *l.published.Load() }

// Alive returns why the loop does not turn, or nil. It may be called from any goroutine and does not block.
func (l *Listener) Alive() error {
	if stuck := time.Since(l.newest().turnedAt); stuck > loopBound {
		return fmt.Errorf("the loop has been stuck for %v", stuck.Round(time.Second))
	}
	return nil
}

// Ready returns why a notification that is sent now might not be heard, or why the work of a channel is not being done; nil when
// all is known to be well. It answers from memory, from any goroutine.
func (l *Listener) Ready() error {
	err := l.Hears()
	for _, c := range l.channels {
		if why := l.Works(c); err == nil && why != nil {
			err = fmt.Errorf("channel %q: %w", c.Name, why)
		}
	}
	return err
}

// Hears returns why a notification that is sent now might not be heard, or nil. It may be called from any goroutine.
func (l *Listener) Hears() error {
	reason := l.deafness(l.newest())
	if err := l.Alive(); err != nil || reason == "" {
		return err
	}
	return errors.New(reason)
}

// Works returns why the work of a channel is not being done, or nil. It may be called from any goroutine.
func (l *Listener) Works(c Channel) error {
	if err := l.queues[c.Name].Ready(); err != nil {
		return err
	}
	if r, ok := c.Handler.(notify.Readier); ok {
		return r.Ready()
	}
	return nil
}

// deafness is why a notification might not be heard as of s, or "".
func (l *Listener) deafness(s Status) string {
	set := l.settings
	quiet := time.Since(l.dialer.LastHeard())
	// While reading is stopped for a full queue nothing can be heard, but the server keeps what is sent; and the proofs that are
	// missed meanwhile may still be due.
	window := set.ProbeInterval + 2*set.PingTimeout
	held := s.heldBy != "" || time.Since(s.heldUntil) < window
	switch {
	case s.Stopping:
		return "shutting down"
	case !s.Connected || !s.Listening:
		return s.Reason
	case s.Probe.Deaf != "":
		return s.Probe.Deaf
	case quiet > set.PingInterval+set.PingTimeout && !held:
		return fmt.Sprintf("nothing heard from the server for %v", quiet.Round(time.Millisecond))
	case s.heldBy != "" && time.Since(s.heldSince) > max(set.ProbeInterval, set.PingInterval)+set.PingTimeout:
		// Nothing need be lost; but nothing is heard, nor can it be known whether the connection still lives.
		return fmt.Sprintf("reading has stopped for %v because the queue of channel %q is full; the server keeps what is sent meanwhile",
			time.Since(s.heldSince).Round(time.Second), s.heldBy)
	case set.ProbeInterval == 0:
		return ""
	case !s.Probe.ProvenHere && s.Probe.SendError != "":
		return "delivery is not proven: the probe could not be sent: " + s.Probe.SendError
	case !s.Probe.ProvenHere && !held:
		return "delivery is not proven yet: the first probe is under way"
	case time.Since(s.Probe.Proven) > window && !held:
		return fmt.Sprintf("delivery has not been proven for %v: %s", time.Since(s.Probe.Proven).Round(time.Second), s.Probe.SendError)
	}
	return ""
}

// Stats implements notify.Meter: the figures of the listener, and those of each channel with its name as the label channel.
func (l *Listener) Stats() []notify.Stat {
	s := l.newest()
	ready := notify.Flag("pglistener_ready", "1 while /readyz answers 200.", l.Ready() == nil)
	stats := append(s.Stats(), ready, notify.Stat{Name: "pglistener_last_byte_age_seconds", Kind: "gauge",
		Help: "Time since the last byte came from the server.", Value: time.Since(l.dialer.LastHeard()).Seconds()})
	stats = append(stats, s.Probe.Stats(s.QueueUsage)...)
	for _, c := range l.channels {
		var of []notify.Stat
		if m, ok := c.Handler.(notify.Meter); ok {
			of = m.Stats()
		}
		// What a handler says of itself counts, and not what the queue says of it.
		own := func(s notify.Stat) bool {
			return slices.ContainsFunc(of, func(o notify.Stat) bool { return o.Name == s.Name && slices.Equal(o.Labels, s.Labels) })
		}
		of = append(of, slices.DeleteFunc(l.queues[c.Name].Stats(), own)...)
		for _, stat := range of {
			stat.Labels = append([]string{"channel", c.Name}, stat.Labels...)
			stats = append(stats, stat)
		}
	}
	return stats
}
