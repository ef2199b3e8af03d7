package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"time"

	"github.com/lib/pq"
)

// probe is the part of a Listener that proves delivery. A ping proves that a
// socket answers; behind a pooler in transaction mode, or a proxy that has
// swapped the session, it is answered for ever and nothing is delivered. Only a
// NOTIFY from another connection tells the truth (DESIGN fact 14).
//
// Its fields belong to the loop.
type probe struct {
	interval time.Duration // PROBE_INTERVAL; 0 turns it off
	timeout  time.Duration // PING_TIMEOUT
	channel  string        // of this process alone
	timer    *time.Timer   // when to send the next one, or when the one under way is overdue
	sent     chan probeResult

	sending  bool       // the second connection is in use
	nonce    string     // of the probe under way; "" when there is none
	began    time.Time  // when it was sent
	others   int        // notifications received on the other channels
	before   int        // others, when the probe was sent
	lost     int        // probes in a row that did not come back
	lostHere bool       // one of them on this connection
	deafFrom time.Time  // until when delivery was sure, when lost is not 0
	failures repeated   // to send
	bounds   [2]float64 // of the server's queue: when to warn, when to raise an error
	level    int        // how many of them were exceeded when it was told last
}

// probeResult is what came of using the second connection.
type probeResult struct {
	err   error
	usage float64 // pg_notification_queue_usage(), 0 to 1
}

func newProbe(cfg *Config) probe {
	return probe{
		interval: cfg.ProbeInterval,
		timeout:  cfg.PingTimeout,
		channel:  "pglistener_" + nonce(),
		sent:     make(chan probeResult, 1),
		bounds:   [2]float64{0.25, 0.5},
	}
}

// nonce is unguessable, so that nobody else's NOTIFY is taken for a probe.
func nonce() string {
	b := make([]byte, 12)
	_, _ = rand.Read(b) // it never fails
	return hex.EncodeToString(b)
}

// lastProof is until when delivery was sure on this connection.
func (l *Listener) lastProof() time.Time {
	if l.status.proven.Before(l.since) {
		return l.since
	}
	return l.status.proven
}

// startProbe sends the first probe of a subscription.
func (l *Listener) startProbe() {
	if l.probe.interval > 0 {
		l.status.provenHere, l.probe.lostHere = false, false
		l.probe.timer.Reset(0)
	}
}

// endProbe forgets the probe under way, because the subscription that was to hear it has ended.
func (l *Listener) endProbe() {
	l.probe.nonce = ""
	l.probe.timer.Stop()
}

// onProbeTimer sends the next probe, or finds the one under way overdue.
func (l *Listener) onProbeTimer() {
	p := &l.probe
	switch {
	case p.sending:
		p.timer.Reset(p.timeout) // the second connection is slow, and its bounds will end it
	case p.nonce == "":
		l.sendProbe()
	case l.held != nil: // reading has stopped: nothing can be heard, and nothing follows from that
		p.nonce = ""
		p.timer.Reset(jitter(p.interval))
	case p.others != p.before: // what was sent earlier is still coming in: late is not lost
		p.before = p.others
		p.timer.Reset(p.timeout)
	default:
		l.onProbeLost()
	}
}

// sendProbe uses the second connection, on a goroutine of its own.
func (l *Listener) sendProbe() {
	p := &l.probe
	p.sending, p.began, p.before = true, time.Now(), p.others
	query := "select null, pg_notification_queue_usage()"
	if l.held == nil {
		p.nonce = nonce()
		// Without parameters, since a pooler in transaction mode may not keep a
		// prepared statement; both values are our own hexadecimal digits.
		query = "select pg_notify(" + pq.QuoteLiteral(p.channel) + ", " + pq.QuoteLiteral(p.nonce) + "), pg_notification_queue_usage()"
	}
	dsn, timeout := l.cfg.dsn(), p.timeout
	l.background.Go(func() { p.sent <- secondConnection(dsn, query, timeout) })
}

// secondConnection makes a connection, runs a query and closes it.
func secondConnection(dsn, query string, timeout time.Duration) probeResult {
	db, err := openDB(dsn, timeout)
	if err != nil {
		return probeResult{err: err}
	}
	defer db.Close()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var r probeResult
	r.err = db.QueryRowContext(ctx, query).Scan(new(any), &r.usage)
	return r
}

// onProbeSent begins to wait for the probe, once the server has taken it.
func (l *Listener) onProbeSent(r probeResult) {
	p := &l.probe
	p.sending = false
	if r.err != nil {
		// Says nothing about the listening connection, which stays.
		p.nonce = ""
		l.status.sendError = r.err.Error()
		if attempt, worth := p.failures.count(r.err); worth {
			l.log.Warn("probe could not be sent; delivery is not proven", "attempt", attempt, "error", r.err, "hint", advice(r.err).text)
		}
		p.timer.Reset(jitter(min(p.interval, max(p.timeout, time.Second))))
		return
	}
	p.failures.reset()
	l.status.sendError = ""
	l.status.queueUsage = r.usage
	l.tellQueueUsage(r.usage)
	switch {
	case !l.status.listening:
		p.nonce = ""
	case p.nonce != "":
		p.timer.Reset(p.timeout)
	case l.status.provenHere || l.held != nil: // heard already, or nothing can be heard now
		p.timer.Reset(jitter(p.interval))
	default: // it was meant for the subscription before this one
		l.sendProbe()
	}
}

// onProbeHeard is called for every notification on the probe's channel.
func (l *Listener) onProbeHeard(payload string) {
	p := &l.probe
	if payload != p.nonce || p.nonce == "" {
		return // late, or a stranger's
	}
	now := time.Now()
	l.caughtUpReading()
	p.nonce = ""
	p.timer.Reset(jitter(p.interval)) // or what onProbeSent makes of it, if that is still to come
	l.status.roundTrip, l.status.proven, l.status.deaf = now.Sub(p.began), now, ""
	if !l.status.provenHere {
		l.status.provenHere = true
		l.log.Info("delivery proven", "round_trip", l.status.roundTrip.Round(time.Microsecond))
	}
	if p.lost > 0 {
		to := l.since // a fresh connection has been hearing from its beginning
		if p.lostHere {
			to = now
			l.catchUp()
		}
		l.tellGap("delivery resumed; notifications sent during the gap are lost to plain channels", p.deafFrom, to)
		p.lost, p.lostHere = 0, false
	}
	l.publish()
}

// The diagnoses of a lost probe, for the log and for /readyz.
const (
	deafOnce    = "notifications no longer arrive although the connection answers: a pooler or a proxy has lost or swapped the session; reconnecting"
	deafForGood = "notifications do not arrive on a fresh connection either: most likely a pooler in transaction mode; point DATABASE_URL at the server or at a session-mode port"
)

// onProbeLost reconnects once; if that does not help it stays and lets those handlers
// that can look for work do so at every probe.
func (l *Listener) onProbeLost() {
	p := &l.probe
	p.nonce = ""
	if p.lost == 0 {
		p.deafFrom = l.lastProof()
	}
	p.lost++
	p.lostHere = true
	l.status.probesLost++
	l.status.deaf = deafForGood
	if l.status.provenHere {
		l.status.deaf = deafOnce
	}
	if p.lost&(p.lost-1) == 0 {
		l.log.Error(l.status.deaf, "probes_lost", p.lost, "proven_until", p.deafFrom)
	}
	if p.lost == 1 {
		l.dialer.current().Conn.Close() // lib/pq makes another
		return
	}
	l.catchUp()
	p.timer.Reset(jitter(p.interval))
}

// tellQueueUsage warns of a server whose NOTIFY queue fills: when it is full,
// every transaction that notifies fails (DESIGN fact 13).
func (l *Listener) tellQueueUsage(usage float64) {
	p := &l.probe
	level := 0
	for _, bound := range p.bounds {
		if usage > bound {
			level++
		}
	}
	if level == p.level {
		return
	}
	p.level = level
	attrs := []any{"usage", usage, "cause", "another listener does not read"}
	if l.held != nil {
		attrs = []any{"usage", usage, "cause", "this listener: the queue of a channel is full", "channel", l.heldBy.channel}
	}
	switch level {
	case 0:
		l.log.Info("the server's NOTIFY queue has emptied", "usage", usage)
	case 1:
		l.log.Warn("the server's NOTIFY queue fills; when it is full every transaction that notifies fails", attrs...)
	default:
		l.log.Error("the server's NOTIFY queue is more than half full; when it is full every transaction that notifies fails", attrs...)
	}
}
