package pgconn

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/retry"
)

// State is how things stand with the listening connection.
type State struct {
	Connected bool
	Listening bool      // connected, and every channel is LISTENed
	Since     time.Time // when the last subscription began; zero before the first
	Reason    string    // why it is not listening, in words; never "" while it is not

	Gaps           int // times in which notifications may have been lost
	GapTotal       time.Duration
	Reconnects     int
	FailedAttempts int
}

// Account follows the listening connection, logs what happens to it and keeps the account of what may have been lost. It is used
// by one goroutine; State may be copied.
type Account struct {
	State
	log       *slog.Logger
	deafSince time.Time // since when nothing is heard for sure; zero before the first subscription
	failures  retry.Failures
}

// NewAccount makes an Account of a connection that has not been made yet.
func NewAccount(log *slog.Logger) *Account {
	return &Account{State: State{Reason: "not connected yet"}, log: log}
}

// Opened takes note of a connection.
func (a *Account) Opened() {
	a.Connected = true
	a.failures.Reset()
	a.Reason = "LISTEN has not been answered yet"
}

// AttemptFailed takes note of an attempt to connect that failed.
func (a *Account) AttemptFailed(err error) {
	a.FailedAttempts++
	a.Fail("connection attempt failed", err)
}

// Fail logs a failure, unless it failed as the last ones did.
func (a *Account) Fail(what string, err error) {
	a.Reason = fmt.Sprintf("%s: %v", what, err)
	attrs := []any{"error", err}
	if text := Advice(err); text != "" {
		a.Reason += ": " + text
		attrs = append(attrs, "hint", text)
	}
	if attempt, shouldLog := a.failures.Count(Kind(err)); shouldLog {
		a.log.Warn(what, append([]any{"attempt", attempt}, attrs...)...)
	}
}

// Lost takes note of the end of a connection. heard is when the last byte had come; unreadSince is since when nothing has been
// read, so that the break may have gone unnoticed, or zero.
func (a *Account) Lost(at, heard, unreadSince time.Time, err error) {
	attrs := []any{"error", err}
	if a.Listening {
		attrs = append(attrs, "uptime", at.Sub(a.Since).Round(time.Millisecond))
		// What the server sent before its last word has been heard. Of a connection that the network ended only the last byte is
		// sure: it may have been dead for long before a ping was answered by a reset.
		a.deafSince = heard
		if pq.As(err) != nil {
			a.deafSince = at
		}
		if !unreadSince.IsZero() {
			a.deafSince = unreadSince
		}
	}
	a.Connected, a.Listening, a.Reason = false, false, fmt.Sprintf("disconnected: %v", err)
	if !errors.Is(err, net.ErrClosed) { // else we closed it ourselves, and the reason is in the log
		a.log.Warn("disconnected", attrs...)
	}
}

// Subscribed takes note of a subscription: every channel is LISTENed on c. proven is false while probes are being lost; the gap
// then goes on until one comes back.
func (a *Account) Subscribed(at time.Time, c *Conn, channels []string, proven bool) {
	a.Listening, a.Reason, a.Since = true, "", at
	// local is client_addr and client_port in pg_stat_activity.
	attrs := []any{"channels", channels, "server", c.RemoteAddr().String(), "local", c.LocalAddr().String()}
	if a.deafSince.IsZero() {
		a.log.Info("listening", attrs...)
		return
	}
	a.Reconnects++
	if !proven {
		a.log.Warn("reconnected; whether notifications arrive now is yet to be proven", attrs...)
		return
	}
	// PostgreSQL keeps nothing for a listener that is away, so what was sent meanwhile cannot be known.
	a.Gap("reconnected; notifications sent during the gap are lost to plain channels", a.deafSince, at, attrs...)
}

// Gap counts and logs a time in which notifications may have been lost.
func (a *Account) Gap(message string, from, to time.Time, attrs ...any) {
	gap := to.Sub(from)
	a.Gaps++
	a.GapTotal += gap
	a.log.Warn(message, append(attrs, "gap_from", from, "gap_to", to, "gap", gap.Round(time.Millisecond))...)
}

// Stats are the figures of a State.
func (s State) Stats() []notify.Stat {
	counter := func(name, help string, value float64) notify.Stat {
		return notify.Stat{Name: name, Kind: "counter", Help: help, Value: value}
	}
	return []notify.Stat{
		notify.Flag("pglistener_connected", "1 while a connection to the server is open.", s.Connected),
		counter("pglistener_gaps_total", "Times in which notifications may have been lost.", float64(s.Gaps)),
		counter("pglistener_gap_seconds_total", "Length of all gaps together.", s.GapTotal.Seconds()),
		counter("pglistener_reconnects_total", "Connections made after the first.", float64(s.Reconnects)),
		counter("pglistener_connection_attempts_failed_total", "Attempts to connect and LISTEN that failed.", float64(s.FailedAttempts)),
	}
}
