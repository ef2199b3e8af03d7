package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

// Listener hears NOTIFY on a set of channels and hands each notification to the
// worker of its channel. It wraps pq.Listener, which reconnects and re-LISTENs;
// what that one lacks is here and in dialer.go: a bound on every wait, pings that
// notice silence, and an account of what may have been lost.
//
// Everything lower-case below "loop" belongs to the goroutine of Run.
type Listener struct {
	cfg      *Config
	log      *slog.Logger
	workers  map[string]*worker
	handlers map[string]Handler
	dialer   *dialer
	quitCtx  context.Context // what the handlers' contexts are made of
	quit     context.CancelCauseFunc

	supervisor *supervisor // owned by the loop

	events     chan event // from lib/pq, in order
	registered chan error // from register: nil once every channel is LISTENed
	pong       chan error // from ping
	done       chan struct{}
	background sync.WaitGroup // what Run has started on goroutines of their own
	published  atomic.Pointer[status]

	// loop
	pq         *pq.Listener
	status     status
	complete   bool         // every channel is known to lib/pq, which re-LISTENs it from now on
	pinging    *boundedConn // what the ping in flight was meant for; nil when there is none
	since      time.Time    // when the subscription began
	deafSince  time.Time    // since when nothing is heard for sure; zero before the first subscription
	failures   repeated
	fatal      error // ends Run
	probe      probe
	held       *Notification // could not be handed on: its queue is full
	heldBy     *worker
	heldFrom   time.Time // since when a break of the connection may have gone unread; zero when it cannot have
	serial     uint64    // notifications so far
	lastWorker *worker   // of the previous notification: most often also of the next
}

// event is what lib/pq's callback was told.
type event struct {
	kind  pq.ListenerEventType
	err   error
	at    time.Time
	heard time.Time // when the last byte had come: soon the next connection will bring more
}

// pqPace is the pause that lib/pq makes between attempts. It sleeps through it
// even when closed, and has no jitter (facts 5 and 11), so the pauses that
// matter are made by the dialer.
const pqPace = time.Millisecond

// NewListener makes a Listener with a handler from table for each channel of
// cfg. Its error joins those of all handlers. Call Run once to start it.
func NewListener(cfg *Config, table map[string]newHandler, sup *supervisor, log *slog.Logger) (*Listener, error) {
	quit, cancel := context.WithCancelCause(context.Background())
	l := &Listener{
		cfg:      cfg,
		log:      log,
		workers:  map[string]*worker{},
		handlers: map[string]Handler{},
		dialer:   newDialer(cfg.PingTimeout, cfg.PingInterval+cfg.PingTimeout, backoff{cfg.ReconnectMin, cfg.ReconnectMax}),
		quitCtx:  quit,
		quit:     cancel,

		supervisor: sup,

		status: status{reason: "not connected yet"},
		probe:  newProbe(cfg),

		events:     make(chan event),
		registered: make(chan error),
		pong:       make(chan error, 1),
		done:       make(chan struct{}),
	}
	var problems []error
	for _, r := range cfg.routes {
		h, err := table[r.handler](r.arg, env{channel: r.channel, log: log.With("channel", r.channel), cfg: cfg, table: table})
		if err != nil {
			problems = append(problems, fmt.Errorf("CHANNELS: channel %q: %w", r.channel, err))
			continue
		}
		l.handlers[r.channel] = h
		l.workers[r.channel] = newWorker(quit, r.channel, h, r.mode == "doorbell", cfg.limits(), log)
	}
	return l, errors.Join(problems...)
}

// Run listens until ctx ends, then stops as section 4 of the design says, and
// returns how many notifications were received but not handled to the end. It
// returns within SHUTDOWN_TIMEOUT of the end of ctx, in any state of the network.
// It returns an error, without waiting for ctx, when it cannot begin to listen and
// waiting is of no use, or START_TIMEOUT has passed.
func (l *Listener) Run(ctx context.Context) (abandoned int, err error) {
	defer l.awaitBackground()
	defer close(l.done)
	defer l.quit(errShutdownTimeout)
	l.pq = pq.NewDialListener(l.dialer, l.cfg.dsn(), pqPace, pqPace, l.onEvent)
	l.background.Go(l.register)
	runners, stopRunners := l.startRunners()
	defer stopRunners()

	beat := time.NewTicker(l.supervisor.beatInterval())
	defer beat.Stop()
	idle := time.NewTimer(l.cfg.PingInterval)
	defer idle.Stop()
	sweep := time.NewTimer(jitter(l.cfg.CatchUpInterval))
	defer sweep.Stop()
	if l.cfg.CatchUpInterval == 0 {
		sweep.Stop()
	}
	var started <-chan time.Time
	if l.cfg.StartTimeout > 0 {
		started = time.After(l.cfg.StartTimeout)
	}
	l.probe.timer = time.NewTimer(0)
	l.probe.timer.Stop() // until there is a subscription to prove
	defer l.probe.timer.Stop()

	stop := ctx.Done()
	var late, tooLate <-chan time.Time // after stop: when to cancel the handlers, when to leave
	l.publish()

	for {
		// While a notification is held nothing more is received, so that order
		// is kept and the server does the buffering; all else goes on.
		notify, room := l.pq.Notify, (<-chan struct{})(nil)
		if l.held != nil {
			notify, room = nil, l.heldBy.room
		}
		select {
		case n, ok := <-notify:
			if !ok {
				return l.drain(runners, beat.C, late, tooLate), l.fatal
			}
			l.dispatch(n)
			// Take what is already there without going through the whole select.
			for range len(notify) {
				if l.held != nil {
					break
				}
				l.dispatch(<-notify)
			}
			continue
		case <-room:
			l.handHeld()
		case e := <-l.events:
			l.observe(e)
		case err := <-l.registered:
			l.onRegistered(err)
		case <-idle.C:
			idle.Reset(l.pingIfIdle())
		case err := <-l.pong:
			l.onPong(err)
		case <-l.probe.timer.C:
			l.onProbeTimer()
		case r := <-l.probe.sent:
			l.onProbeSent(r)
		case <-sweep.C:
			sweep.Reset(jitter(l.cfg.CatchUpInterval))
			l.catchUp()
		case <-beat.C:
			l.supervisor.beat(!l.since.IsZero(), l.deafness())
		case <-started:
			if l.since.IsZero() {
				l.fatal = fmt.Errorf("not listening after START_TIMEOUT (%v): %s", l.cfg.StartTimeout, l.status.reason)
			}
		case <-stop:
			l.log.Info("shutting down", "timeout", l.cfg.ShutdownTimeout, "waiting", l.waiting())
			stop, l.status.stopping = nil, true
			l.supervisor.stopping()
			stopRunners()
			reserve := min(l.cfg.killGrace()+500*time.Millisecond, l.cfg.ShutdownTimeout/2)
			late, tooLate = time.After(l.cfg.ShutdownTimeout-reserve), time.After(l.cfg.ShutdownTimeout)
			politely := l.status.listening
			l.background.Go(func() { l.hangUp(politely) })
		case <-late:
			// Whatever hangs, be it a handler or the network, has had its time:
			// from now on the workers abandon what they are given.
			l.quit(errShutdownTimeout)
			l.dialer.close()
			if l.held != nil {
				l.handHeld()
			}
		case <-tooLate:
			return l.abandoned(), l.fatal
		}
		if l.fatal != nil && stop != nil {
			now := make(chan struct{})
			close(now)
			stop = now
		}
		l.publish()
	}
}

// beatInterval is how often the loop shows that it turns.
const beatInterval = time.Second

// publish shows others how things stand. Only the loop calls it.
func (l *Listener) publish() {
	l.status.beat = time.Now()
	if l.held == nil {
		l.status.heldBy = ""
	} else {
		if l.status.heldBy == "" {
			l.status.heldSince = l.status.beat
		}
		l.status.heldBy, l.status.heldUntil = l.heldBy.channel, l.status.beat
	}
	s := l.status
	l.published.Store(&s)
}

// dispatch hands one notification to the worker of its channel. nil is lib/pq's
// word for a reconnect, of which observe has already been told.
func (l *Listener) dispatch(n *pq.Notification) {
	if n == nil {
		return
	}
	w := l.lastWorker
	if w == nil || w.channel != n.Channel {
		if n.Channel == l.probe.channel {
			l.onProbeHeard(n.Extra)
			return
		}
		if w = l.workers[n.Channel]; w == nil {
			return // a server may say more than we asked for
		}
		l.lastWorker = w
	}
	l.probe.others++
	l.serial++
	l.hand(w, Notification{Channel: w.channel, Payload: n.Extra, PID: n.BePid, serial: l.serial})
}

// hand gives n to w, or holds it until w has room.
func (l *Listener) hand(w *worker, n Notification) {
	if !w.offer(n) {
		held := n // the address of n itself would cost an allocation for each notification
		l.held, l.heldBy = &held, w
		if l.heldFrom.IsZero() {
			l.heldFrom = time.Now()
		}
	}
}

// handHeld tries again with what is held.
func (l *Listener) handHeld() {
	n := *l.held
	l.held = nil
	l.hand(l.heldBy, n)
}

// catchUp has every handler that can look for what it may have missed.
func (l *Listener) catchUp() {
	for _, w := range l.workers {
		w.requestCatchUp()
	}
}

// onEvent is lib/pq's callback. It runs on the goroutine that dispatches and
// reconnects, so it must neither call the pq.Listener nor wait for long (fact 10);
// the loop never blocks, and after it has ended nobody waits for events.
func (l *Listener) onEvent(kind pq.ListenerEventType, err error) {
	e := event{kind, err, time.Now(), l.dialer.lastHeard()}
	switch kind { // here, because lib/pq dials again as soon as this returns
	case pq.ListenerEventConnected, pq.ListenerEventReconnected:
		l.dialer.subscribed()
	case pq.ListenerEventDisconnected:
		l.dialer.lost()
	case pq.ListenerEventConnectionAttemptFailed:
		l.dialer.failed()
	}
	select {
	case l.events <- e:
	case <-l.done:
	}
}

// observe follows the connection. Events are believed, and not what Listen
// returns: that can be nil when nothing is connected (fact 8).
func (l *Listener) observe(e event) {
	switch e.kind {
	case pq.ListenerEventConnected, pq.ListenerEventReconnected:
		l.status.connected = true
		l.failures.reset()
		if l.complete {
			l.startListening(e.at)
		} else {
			l.status.reason = "LISTEN has not been answered yet"
		}
	case pq.ListenerEventDisconnected:
		l.onDisconnected(e)
	case pq.ListenerEventConnectionAttemptFailed:
		if errors.Is(e.err, errStopping) {
			return
		}
		l.status.failedAttempts++
		l.onFailure("connection attempt failed", e.err)
		if l.since.IsZero() && hopeless(e.err) {
			l.fatal = e.err
		}
	}
}

// onFailure tells of an attempt that failed, unless it failed as the last ones did.
func (l *Listener) onFailure(what string, err error) {
	l.status.reason = fmt.Sprintf("%s: %v", what, err)
	attrs := []any{"error", err}
	if text := advice(err).text; text != "" {
		l.status.reason += ": " + text
		attrs = append(attrs, "hint", text)
	}
	if attempt, worth := l.failures.count(err); worth {
		l.log.Warn(what, append([]any{"attempt", attempt}, attrs...)...)
	}
}

func (l *Listener) onDisconnected(e event) {
	l.status.connected = false
	l.status.reason = fmt.Sprintf("disconnected: %v", e.err)
	attrs := []any{"error", e.err}
	if l.status.listening {
		l.status.listening = false
		attrs = append(attrs, "uptime", e.at.Sub(l.since).Round(time.Millisecond))
		// Of a connection that fell silent only the last byte is sure; one that was
		// cut has heard everything until then.
		l.deafSince = e.at
		if isTimeout(e.err) {
			l.deafSince = e.heard
		}
		// While reading had stopped the break lay unread behind what had come before it.
		if !l.heldFrom.IsZero() {
			l.deafSince, l.heldFrom = l.heldFrom, time.Time{}
		}
		l.endProbe()
	}
	if !errors.Is(e.err, net.ErrClosed) { // else it was our own doing, and told elsewhere
		l.log.Warn("disconnected", attrs...)
	}
}

// startListening begins a subscription: every channel is LISTENed, on one connection.
func (l *Listener) startListening(at time.Time) {
	l.status.listening, l.status.reason, l.since = true, "", at
	c := l.dialer.current()
	attrs := []any{"channels", slices.Sorted(maps.Keys(l.workers)),
		"server", c.RemoteAddr().String(), "local", c.LocalAddr().String()} // local is client_addr and client_port in pg_stat_activity
	switch {
	case l.deafSince.IsZero():
		l.log.Info("listening", attrs...)
	case l.probe.lost > 0: // the gap goes on until a probe comes back
		l.status.reconnects++
		l.log.Warn("reconnected; whether notifications arrive now is yet to be proven", attrs...)
	default:
		// What was sent meanwhile went to nobody: PostgreSQL keeps nothing for a
		// listener that is away, so what it was cannot be known.
		l.status.reconnects++
		l.tellGap("reconnected; notifications sent during the gap are lost to plain channels", l.deafSince, at, attrs...)
	}
	l.catchUp()
	l.startProbe()
	l.publish()
	l.supervisor.beat(true, l.deafness())
}

// tellGap counts and logs a time in which notifications may have been lost.
func (l *Listener) tellGap(message string, from, to time.Time, attrs ...any) {
	gap := to.Sub(from)
	l.status.gaps++
	l.status.gapTotal += gap
	l.log.Warn(message, append(attrs, "gap_from", from, "gap_to", to, "gap", gap.Round(time.Millisecond))...)
}

// register LISTENs every channel for the first time, on its own goroutine since
// it blocks while the server is away (fact 3). lib/pq repeats it on every later connection.
func (l *Listener) register() {
	report := func(err error) {
		select {
		case l.registered <- err:
		case <-l.done:
		}
	}
	for channel := range l.channels() {
		for attempt := 1; ; attempt++ {
			err := l.pq.Listen(channel)
			if err == nil || errors.Is(err, pq.ErrChannelAlreadyOpen) {
				break
			}
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// The server refused: a standby, until it is promoted (fact 18).
			report(fmt.Errorf("listen %q: %w", channel, err))
			if !sleep(l.dialer.ctx, l.dialer.backoff.after(attempt)) {
				return
			}
		}
	}
	// Listen says nil also when the connection broke under it. A pong proves that
	// it did not; if there is none, a reconnect follows and lib/pq LISTENs it all.
	_ = ping(l.pq)
	report(nil)
}

// channels yields what is to be LISTENed: the probe's own channel first.
func (l *Listener) channels() iter.Seq[string] {
	return func(yield func(string) bool) {
		if l.probe.interval > 0 && !yield(l.probe.channel) {
			return
		}
		for _, r := range l.cfg.routes {
			if !yield(r.channel) {
				return
			}
		}
	}
}

func (l *Listener) onRegistered(err error) {
	if err != nil {
		l.onFailure("server refuses to listen", err)
		return
	}
	l.complete = true
	if l.status.connected {
		l.startListening(time.Now())
	}
}

// pingIfIdle pings when nothing has come for PING_INTERVAL, and returns when to look again.
// The pong has no timer of its own: the connection's read deadline is that (fact 12).
func (l *Listener) pingIfIdle() time.Duration {
	quiet := time.Since(l.dialer.lastHeard())
	if quiet < l.cfg.PingInterval {
		return l.cfg.PingInterval - quiet
	}
	// While reading has stopped no pong can arrive, and silence means nothing.
	if l.status.connected && l.pinging == nil && l.held == nil {
		l.pinging = l.dialer.current()
		// On its own goroutine: the pong is read only while Notify is drained (fact 2).
		l.background.Go(func() { l.pong <- ping(l.pq) })
	}
	return l.cfg.PingInterval
}

// onPong ends a ping. lib/pq notices a broken connection by itself, but not one
// whose server answers with an error.
func (l *Listener) onPong(err error) {
	c := l.pinging
	l.pinging = nil
	if err == nil {
		l.caughtUpReading()
	}
	if err != nil && l.status.connected && c == l.dialer.current() {
		l.log.Warn("ping failed", "error", err)
		c.Conn.Close()
	}
}

// caughtUpReading is called when the server has just been heard to answer: nothing lies unread.
func (l *Listener) caughtUpReading() {
	if l.held == nil {
		l.heldFrom = time.Time{}
	}
}

// ping is pq.Listener.Ping, which panics when the server answers with an error (fact 9).
func ping(p *pq.Listener) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("server refused the ping: %v", r)
		}
	}()
	return p.Ping()
}

// jitter shortens d by up to a fifth, so that replicas do not act in step.
func jitter(d time.Duration) time.Duration { return d - rand.N(d/5+1) }
