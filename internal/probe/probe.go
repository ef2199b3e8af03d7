// Package probe proves delivery. A ping proves that a socket answers; behind a pooler in transaction mode, or a proxy that has
// swapped the session, it is answered for ever and nothing is delivered. Only a NOTIFY from another connection tells the truth
// (DESIGN fact 14).
package probe

import (
	"crypto/rand"
	"strings"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/retry"
)

// state is where a Probe stands. Unsubscribed leads from every state to off.
type state int

const (
	off      state = iota // no subscription; Subscribed leads to idle, due at once
	idle                  // the next probe is sent when C fires: sending
	sending               // the second connection is in use; Sent leads to awaiting, or to idle if it failed or proves nothing
	awaiting              // it must come back before C fires; Heard leads to idle, C to lost
	lost                  // it did not come back; the next one is sent when C fires: sending
)

// Step is what the owner has to do next.
type Step int

// The steps.
const (
	Wait      Step = iota // nothing, until something happens
	Send                  // run Query on another connection, then call Sent
	Reconnect             // the session has lost its subscription: break the connection
	CatchUp               // a fresh connection is deaf too: have the handlers look for work
)

// Diagnoses of a probe that did not come back.
const (
	deafOnce    = "notifications no longer arrive although the connection answers: a pooler or a proxy has lost or swapped the session; reconnecting"
	deafForGood = "notifications do not arrive on a fresh connection either: most likely a pooler in transaction mode; point DATABASE_URL at the server or at a session-mode port"
)

// Status is what a Probe knows of the delivery.
type Status struct {
	Proven     time.Time     // when the last probe came back; zero before the first
	ProvenHere bool          // one has come back on this subscription
	Deaf       string        // the diagnosis, from a lost probe until one comes back
	SendError  string        // why the last probe could not be sent; "" when it could
	RoundTrip  time.Duration // of the last one that came back
	Lost       int           // probes that did not come back, in all
}

// Probe decides when to send a probe and what follows from the answer, or from none. It does no I/O of its own: its owner sends,
// listens on Channel, waits for C, and calls the methods, all on one goroutine. None of them blocks.
type Probe struct {
	Channel string // of this process alone
	C       <-chan time.Time

	interval time.Duration // between probes; 0 turns them off
	timeout  time.Duration // for a probe to come back
	timer    *time.Timer
	state    state
	stale    bool   // in sending: what is being sent proves nothing about this subscription
	nonce    string // what comes back; "" when nothing is expected
	began    time.Time
	others   int // notifications received on other channels
	before   int // others, when it was looked at last
	inARow   int // lost one after the other
	lostHere bool
	deafFrom time.Time // until when delivery was sure, while inARow > 0
	since    time.Time // of the subscription
	status   Status
}

// New makes a Probe, in state off. With an interval of 0 it stays there. Call Stop when done.
func New(interval, timeout time.Duration) *Probe {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &Probe{
		Channel: "pglistener_" + strings.ToLower(rand.Text()), C: t.C,
		interval: interval, timeout: timeout, timer: t,
	}
}

// Enabled says whether there are probes at all, Status what they have shown. Stop stops the timer.
func (p *Probe) Enabled() bool { return p.interval > 0 }

func (p *Probe) Status() Status { return p.status }

func (p *Probe) Stop() { p.timer.Stop() }

// Subscribed begins a subscription, at a time: the first probe is due at once.
func (p *Probe) Subscribed(at time.Time) {
	p.since = at
	p.status.ProvenHere, p.lostHere, p.nonce = false, false, ""
	if !p.Enabled() {
		return
	}
	if p.state == sending { // it was sent for the subscription before; Sent goes on
		p.stale = true
		return
	}
	p.state = idle
	p.timer.Reset(0)
}

// Unsubscribed ends the subscription: a probe under way can no longer be heard.
func (p *Probe) Unsubscribed() {
	p.nonce = ""
	p.timer.Stop()
	if p.state == sending {
		p.stale = true
		return
	}
	p.state = off
}

// Other counts a notification on another channel: what was sent earlier is still coming in, so a probe behind it is late and not lost.
func (p *Probe) Other() { p.others++ }

// Due is to be called when C has fired. reading says whether notifications are being read: while they are not, nothing can be
// heard, and nothing follows from that.
func (p *Probe) Due(reading bool) Step {
	switch p.state {
	case idle, lost:
		return p.send(reading)
	case awaiting:
		switch {
		case !reading:
			p.rest()
		case p.others != p.before:
			p.before = p.others
			p.timer.Reset(p.timeout)
		default:
			return p.lose()
		}
	}
	return Wait // sending: the second connection's own bounds will end it
}

func (p *Probe) send(reading bool) Step {
	p.state, p.stale = sending, false
	p.began, p.before = time.Now(), p.others
	p.nonce = ""
	if reading {
		p.nonce = rand.Text()
	}
	return Send
}

// Query is the statement to run in state sending. It returns a row of two columns, of which the second is how full the server's
// NOTIFY queue is, 0 to 1. It has no parameters, since a pooler in transaction mode may not keep a prepared statement; the values
// in it are our own letters and digits.
func (p *Probe) Query() string {
	what := "null"
	if p.nonce != "" {
		what = "pg_notify(" + pq.QuoteLiteral(p.Channel) + ", " + pq.QuoteLiteral(p.nonce) + ")"
	}
	return "select " + what + ", pg_notification_queue_usage()"
}

// Sent ends the state sending: err says whether the server took the query. listening says whether there is a subscription.
func (p *Probe) Sent(err error, listening bool) Step {
	p.state = idle
	p.status.SendError = ""
	if err != nil {
		// It says nothing about the listening connection, which stays.
		p.nonce = ""
		p.status.SendError = err.Error()
	}
	switch {
	case !listening:
		p.state, p.nonce = off, ""
	case p.stale: // the subscription it was sent for has ended
		p.stale = false
		p.timer.Reset(0)
	case err != nil:
		p.timer.Reset(retry.Jitter(min(p.interval, max(p.timeout, time.Second))))
	case p.nonce == "": // heard already, or nothing can be heard now
		p.timer.Reset(retry.Jitter(p.interval))
	default:
		p.state = awaiting
		p.timer.Reset(p.timeout)
	}
	return Wait
}

// rest waits for the next probe.
func (p *Probe) rest() {
	p.nonce = ""
	if p.state != sending { // else Sent follows
		p.state = idle
	}
	p.timer.Reset(retry.Jitter(p.interval))
}

// Proof is what a probe that came back has shown.
type Proof struct {
	First   bool      // on this subscription
	GapFrom time.Time // when delivery had been lost: from when; else zero
	GapTo   time.Time // until when nothing arrived
	CatchUp bool      // what was missed on this subscription is to be looked for
}

// Heard takes a notification on Channel. ok says whether it is the probe: one that is late, or a stranger's, is not.
func (p *Probe) Heard(payload string) (proof Proof, ok bool) {
	if payload != p.nonce || p.nonce == "" {
		return Proof{}, false
	}
	now := time.Now()
	p.rest()
	p.status.RoundTrip, p.status.Proven, p.status.Deaf = now.Sub(p.began), now, ""
	proof.First, p.status.ProvenHere = !p.status.ProvenHere, true
	if p.inARow > 0 {
		// A connection on which no probe was lost has been hearing from its beginning.
		proof.GapFrom, proof.GapTo, proof.CatchUp = p.deafFrom, p.since, p.lostHere
		if p.lostHere {
			proof.GapTo = now
		}
		p.inARow, p.lostHere = 0, false
	}
	return proof, true
}

// Deaf says for how many probes in a row nothing has come back, and until when delivery was sure.
func (p *Probe) Deaf() (inARow int, from time.Time) { return p.inARow, p.deafFrom }

// lose reconnects once; if that does not help, the connection stays, and those handlers that can look for work do so at every probe.
func (p *Probe) lose() Step {
	p.state, p.nonce = lost, ""
	if p.inARow == 0 {
		p.deafFrom = p.since
		if p.status.Proven.After(p.since) {
			p.deafFrom = p.status.Proven
		}
	}
	p.inARow++
	p.lostHere = true
	p.status.Lost++
	p.status.Deaf = deafForGood
	if p.status.ProvenHere {
		p.status.Deaf = deafOnce
	}
	if p.inARow == 1 {
		p.timer.Stop()
		return Reconnect
	}
	p.timer.Reset(retry.Jitter(p.interval))
	return CatchUp
}
