package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
	"github.com/pglistener/pglistener/internal/probe"
	"github.com/pglistener/pglistener/internal/queue"
	"github.com/pglistener/pglistener/internal/retry"
)

// Settings are the variables of a Listener.
type Settings struct {
	PingInterval    time.Duration `env:"PING_INTERVAL,default=10s" usage:"silence after which the server is pinged"`
	PingTimeout     time.Duration `env:"PING_TIMEOUT,default=5s" usage:"bound on any single answer: dial, handshake, LISTEN, pong, probe"`
	ProbeInterval   time.Duration `env:"PROBE_INTERVAL,default=1m" min:"0" usage:"how often delivery is proven by a NOTIFY from a second connection; 0 turns it off"`
	ReconnectMin    time.Duration `env:"RECONNECT_MIN,default=100ms" usage:"first pause between attempts to connect; it doubles, with jitter"`
	ReconnectMax    time.Duration `env:"RECONNECT_MAX,default=2s" usage:"longest pause between attempts to connect"`
	StartTimeout    time.Duration `env:"START_TIMEOUT,default=0" min:"0" usage:"give up when not listening by then; 0 retries for ever"`
	ShutdownTimeout time.Duration `env:"SHUTDOWN_TIMEOUT,default=20s" usage:"how long SIGTERM waits for what was received to be handled"`
}

// Channel is a channel to LISTEN on, and what to do with its notifications.
type Channel struct {
	Name    string
	Handler notify.Handler
	Queue   queue.Options
}

// Listener hears NOTIFY on a set of channels and puts each notification into the queue of its channel. It wraps pq.Listener,
// which reconnects and re-LISTENs, and adds what that one lacks: a bound on every wait, pings that notice silence, probes that
// prove delivery, and an account of what may have been lost.
type Listener struct {
	// What never changes once Run has begun.
	Beat     time.Duration                                  // how often to call OnBeat
	OnBeat   func(listening, stopping bool, notReady error) // called by Run's goroutine while the loop turns; must not block
	dsn      string
	settings Settings
	log      *slog.Logger
	names    []string // of the channels, sorted
	channels []Channel
	queues   map[string]*queue.Queue
	dialer   *pgconn.Dialer
	quitCtx  context.Context // what the handlers' contexts are made of
	quit     context.CancelCauseFunc

	// From other goroutines to Run's, and back.
	events     chan event // from lib/pq, in order
	registered chan error // from register: nil once every channel is LISTENed
	pong       chan error // from a ping
	sent       chan probeSent
	done       chan struct{}
	background sync.WaitGroup // the goroutines that Run has started
	published  atomic.Pointer[Status]

	// Owned by Run's goroutine.
	pq          *pq.Listener
	account     *pgconn.Account
	probe       *probe.Probe
	usage       probe.Usage
	probeErrors retry.Failures       // of sending
	status      Status               // as published next
	complete    bool                 // every channel is known to lib/pq, which re-LISTENs it from now on
	pinging     *pgconn.Conn         // what the ping in flight was meant for; nil when there is none
	fatal       error                // ends Run
	held        *notify.Notification // could not be delivered: its queue is full
	heldBy      *queue.Queue
	unread      time.Time // since when a break of the connection may have gone unread; zero when it cannot have
	serial      uint64    // notifications so far
}

// event is one call of lib/pq's event callback. heard is when the last byte had come: soon the next connection will bring more.
type event struct {
	kind      pq.ListenerEventType
	err       error
	at, heard time.Time
}

// probeSent is what came of using the second connection.
type probeSent struct {
	err   error
	usage float64 // pg_notification_queue_usage(), 0 to 1
}

// pqPace is the pause that lib/pq makes between attempts. It sleeps through it even when closed, and has no jitter (facts 5 and
// 11), so the pauses that matter are made by the dialer.
const pqPace = time.Millisecond

// NewListener makes a Listener. Call Run once to start it.
func NewListener(dsn string, s Settings, channels []Channel, log *slog.Logger) *Listener {
	quit, cancel := context.WithCancelCause(context.Background())
	l := &Listener{
		Beat: time.Second, OnBeat: func(bool, bool, error) {},
		dsn: dsn, settings: s, log: log, channels: channels, queues: map[string]*queue.Queue{},
		dialer:  pgconn.NewDialer(s.PingTimeout, s.PingInterval+s.PingTimeout, retry.Backoff{Min: s.ReconnectMin, Max: s.ReconnectMax}),
		quitCtx: quit, quit: cancel,
		events: make(chan event), registered: make(chan error), pong: make(chan error, 1), sent: make(chan probeSent, 1), done: make(chan struct{}),
		account: pgconn.NewAccount(log),
		probe:   probe.New(s.ProbeInterval, s.PingTimeout),
		usage:   probe.Usage{Bounds: [2]float64{0.25, 0.5}},
	}
	for _, c := range channels {
		l.names = append(l.names, c.Name)
		l.queues[c.Name] = queue.New(quit, c.Name, c.Handler, c.Queue, log.With("channel", c.Name))
	}
	slices.Sort(l.names)
	l.published.Store(&Status{State: l.account.State, turnedAt: time.Now()})
	return l
}

// Run listens until ctx ends, then stops as shutdown.go says, and returns how many notifications were received but not handled to
// the end. It returns within SHUTDOWN_TIMEOUT of the end of ctx, in any state of the network. It returns an error, without
// waiting for ctx, when it cannot begin to listen and waiting is of no use, or START_TIMEOUT has passed.
func (l *Listener) Run(ctx context.Context) (abandoned int, err error) {
	defer l.awaitBackground()
	defer close(l.done)
	defer l.quit(notify.ErrShutdownTimeout)
	l.pq = pq.NewDialListener(l.dialer, l.dsn, pqPace, pqPace, l.onEvent)
	l.background.Go(l.register)
	runners, stopRunners := l.startHandlers()
	defer stopRunners()
	defer l.probe.Stop()
	beat := time.NewTicker(l.Beat)
	defer beat.Stop()
	idle := time.NewTimer(l.settings.PingInterval)
	defer idle.Stop()
	var startTimeout <-chan time.Time
	if d := l.settings.StartTimeout; d > 0 {
		startTimeout = time.After(d)
	}
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	stop := ctx.Done()
	var late, tooLate <-chan time.Time // after stop: when to cancel the handlers, when to leave
	l.publish()

	for {
		// While a notification is held nothing more is received, so that order is kept and the server does the buffering; all
		// else goes on.
		received, room := l.pq.Notify, (<-chan struct{})(nil)
		if l.held != nil {
			received, room = nil, l.heldBy.Room()
		}
		select {
		case n, ok := <-received: // a notification, and those behind it
			if !ok {
				return l.drain(runners, beat.C, late, tooLate), l.fatal
			}
			l.dispatchAll(n)
			if l.held == nil {
				continue
			}
		case <-room: // the full queue has room again
			l.retryHeld()
		case e := <-l.events: // the connection came, went, or could not be made
			l.observe(e)
		case err := <-l.registered: // all channels are LISTENed for the first time, or one was refused
			l.onRegistered(err)
		case <-idle.C: // nothing may have come for PING_INTERVAL
			idle.Reset(l.pingIfIdle())
		case err := <-l.pong: // a ping has ended
			l.onPong(err)
		case <-l.probe.C: // a probe is due, or overdue
			l.proceed(l.probe.Due(l.held == nil))
		case r := <-l.sent: // the second connection has been used
			l.onProbeSent(r)
		case <-beat.C: // the loop turns
			l.OnBeat(!l.account.Since.IsZero(), l.status.Stopping, l.Ready())
		case <-startTimeout: // START_TIMEOUT has passed
			if l.account.Since.IsZero() {
				l.fatal = fmt.Errorf("not listening after START_TIMEOUT (%v): %s", l.settings.StartTimeout, l.account.Reason)
			}
		case <-stop: // SIGTERM, or fatal
			stop = nil
			stopRunners()
			late, tooLate = l.beginShutdown()
		case <-late: // whatever hangs, be it a handler or the network, has had its time
			l.cutShort()
		case <-tooLate:
			return l.abandoned(), l.fatal
		}
		if l.fatal != nil {
			giveUp()
		}
		l.publish()
	}
}

// dispatchAll dispatches n and what is there behind it, without going through the whole select for each.
func (l *Listener) dispatchAll(n *pq.Notification) {
	l.dispatch(n)
	for i := len(l.pq.Notify); i > 0 && l.held == nil; i-- {
		l.dispatch(<-l.pq.Notify)
	}
}

// dispatch puts one notification into the queue of its channel. nil signals a reconnect, which observe has already handled.
func (l *Listener) dispatch(n *pq.Notification) {
	if n == nil {
		return
	}
	q := l.queues[n.Channel]
	if q == nil { // a server may say more than we asked for
		if n.Channel == l.probe.Channel {
			l.onProbeHeard(n.Extra)
		}
		return
	}
	l.probe.Other()
	l.serial++
	l.deliver(q, notify.Notification{Channel: q.Channel(), Payload: n.Extra, PID: n.BePid, Serial: l.serial})
}

// deliver gives n to q, or holds it until q has room.
func (l *Listener) deliver(q *queue.Queue, n notify.Notification) {
	if !q.Offer(n) {
		held := n // the address of n itself would cost an allocation for each notification
		l.held, l.heldBy = &held, q
		if l.unread.IsZero() {
			l.unread = time.Now()
		}
	}
}

// retryHeld tries to deliver what is held.
func (l *Listener) retryHeld() {
	n := *l.held
	l.held = nil
	l.deliver(l.heldBy, n)
}

// catchUp has every handler that can look for what it may have missed.
func (l *Listener) catchUp() {
	for _, q := range l.queues {
		q.CatchUp()
	}
}

// onEvent is lib/pq's callback. It runs on the goroutine that dispatches and reconnects, so it must neither call the pq.Listener
// nor wait for long (fact 10); the loop never blocks, and after it has ended nobody waits for events. After a failed attempt it may
// wait as long as the dial would: without a connection there is nothing to dispatch.
func (l *Listener) onEvent(kind pq.ListenerEventType, err error) {
	e := event{kind: kind, err: err, at: time.Now(), heard: l.dialer.LastHeard()}
	switch kind { // here, because lib/pq dials again as soon as this returns
	case pq.ListenerEventConnected, pq.ListenerEventReconnected:
		l.dialer.Subscribed()
	case pq.ListenerEventDisconnected:
		l.dialer.Lost()
	case pq.ListenerEventConnectionAttemptFailed:
		if !l.dialer.Failed() { // nothing else that is read before a dial can have changed since the start
			e.err = pgconn.ErrService
		}
	}
	select {
	case l.events <- e:
	case <-l.done:
	}
}

// observe follows the connection. Events are believed, and not what Listen returns: that can be nil when nothing is connected (fact 8).
func (l *Listener) observe(e event) {
	switch e.kind {
	case pq.ListenerEventConnected, pq.ListenerEventReconnected:
		l.account.Opened()
		if l.complete {
			l.subscribed(e.at)
		}
	case pq.ListenerEventDisconnected:
		var unread time.Time
		if l.account.Listening {
			unread, l.unread = l.unread, time.Time{}
			l.probe.Unsubscribed()
		}
		l.account.Lost(e.at, e.heard, unread, e.err)
	case pq.ListenerEventConnectionAttemptFailed:
		if errors.Is(e.err, pgconn.ErrStopping) {
			return
		}
		l.account.AttemptFailed(e.err)
		if l.account.Since.IsZero() && pgconn.Hopeless(e.err) {
			l.fatal = e.err
		}
	}
}

// register LISTENs every channel for the first time, on its own goroutine.
func (l *Listener) register() {
	channels := l.names
	if l.probe.Enabled() {
		channels = append([]string{l.probe.Channel}, channels...)
	}
	l.dialer.Listen(l.pq, channels, func(err error) {
		select {
		case l.registered <- err:
		case <-l.done:
		}
	})
}

func (l *Listener) onRegistered(err error) {
	if err != nil {
		l.account.Fail("server refuses to listen", err)
		return
	}
	l.complete = true
	if l.account.Connected {
		l.subscribed(time.Now())
	}
}

// subscribed begins a subscription: every channel is LISTENed, on one connection.
func (l *Listener) subscribed(at time.Time) {
	lost, _ := l.probe.Deaf()
	l.account.Subscribed(at, l.dialer.Current(), l.names, lost == 0)
	l.catchUp()
	l.probe.Subscribed(at)
	l.publish()
	l.OnBeat(true, l.status.Stopping, l.Ready())
}

// pingIfIdle pings when nothing has come for PING_INTERVAL, and returns when to look again. The pong has no timer of its own: the
// connection's read deadline is that (fact 12).
func (l *Listener) pingIfIdle() time.Duration {
	quiet := time.Since(l.dialer.LastHeard())
	if quiet < l.settings.PingInterval {
		return l.settings.PingInterval - quiet
	}
	// While reading has stopped no pong can arrive, and silence means nothing.
	if l.account.Connected && l.pinging == nil && l.held == nil {
		l.pinging = l.dialer.Current()
		// On its own goroutine: the pong is read only while Notify is drained (fact 2).
		l.background.Go(func() { l.pong <- pgconn.Ping(l.pq) })
	}
	return l.settings.PingInterval
}

// onPong ends a ping. lib/pq notices a broken connection by itself, but not one whose server answers with an error.
func (l *Listener) onPong(err error) {
	c := l.pinging
	l.pinging = nil
	if err == nil && l.held == nil {
		l.unread = time.Time{} // the server has just answered: nothing lies unread
	}
	if err != nil && l.account.Connected && c == l.dialer.Current() {
		l.log.Warn("ping failed", "error", err)
		c.Break()
	}
}

// proceed does what the probe asks for.
func (l *Listener) proceed(step probe.Step) {
	switch step {
	case probe.Send:
		query := l.probe.Query()
		l.background.Go(func() {
			var r probeSent
			r.err = pgconn.Once(l.dsn, l.settings.PingTimeout, func(ctx context.Context, db *sql.DB) error {
				err := db.QueryRowContext(ctx, query).Scan(new(any), &r.usage)
				if err == nil {
					l.verify(ctx, db)
				}
				return err
			})
			l.sent <- r
		})
	case probe.Reconnect, probe.CatchUp:
		if n, from := l.probe.Deaf(); retry.IsPowerOfTwo(n) {
			l.log.Error(l.probe.Status().Deaf, "probes_lost", n, "proven_until", from)
		}
		if step == probe.CatchUp {
			l.catchUp()
		} else {
			l.dialer.Current().Break() // lib/pq makes another
		}
	}
}

// verify has the server say whether the handlers can work: see notify.Verifier.
func (l *Listener) verify(ctx context.Context, db *sql.DB) {
	asked := map[string]error{}
	for _, c := range l.channels {
		if v, ok := c.Handler.(notify.Verifier); ok {
			query := v.Verify()
			err, known := asked[query]
			if !known {
				_, err = db.ExecContext(ctx, query)
				asked[query] = err
			}
			v.Verified(err)
		}
	}
}

// onProbeSent goes on once the second connection has been used.
func (l *Listener) onProbeSent(r probeSent) {
	if r.err != nil {
		if attempt, shouldLog := l.probeErrors.Count(pgconn.Kind(r.err)); shouldLog {
			l.log.Warn("probe could not be sent; delivery is not proven", "attempt", attempt, "error", pgconn.Explain(r.err))
		}
	} else {
		l.probeErrors.Reset()
		l.status.QueueUsage = r.usage
		l.usage.Tell(r.usage, l.status.heldBy, l.log)
	}
	l.proceed(l.probe.Sent(r.err, l.account.Listening))
}

// onProbeHeard is called for every notification on the probe's channel.
func (l *Listener) onProbeHeard(payload string) {
	proof, ok := l.probe.Heard(payload)
	if !ok {
		return
	}
	if l.held == nil {
		l.unread = time.Time{}
	}
	if proof.First {
		l.log.Info("delivery proven", "round_trip", l.probe.Status().RoundTrip.Round(time.Microsecond))
	}
	if !proof.GapFrom.IsZero() {
		if proof.CatchUp {
			l.catchUp()
		}
		l.account.Gap("delivery resumed; notifications sent during the gap are lost to plain channels", proof.GapFrom, proof.GapTo)
	}
	l.publish()
}
