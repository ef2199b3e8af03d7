package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"strconv"
	"time"
)

// Notification is what a handler is given.
type Notification struct {
	Channel string // as in CHANNELS
	Payload string // as the writer sent it: untrusted, any text without a zero byte
	PID     int    // process id of the notifying backend; 0 from the outbox
	Attempt int    // 1, 2, ... for the same notification

	id     string // the row's, from the outbox; a random one for a doorbell's run
	serial uint64 // of the notification in this process, otherwise
}

// ID is the idempotency key: the same at every attempt, and for a row of the
// outbox also after a restart and in every replica. A plain notification has
// none of its own, so it is given one that no other has.
func (n Notification) ID() string {
	if n.id != "" {
		return n.id
	}
	return processID + "-" + strconv.FormatUint(n.serial, 10)
}

// processID is what the ids of this process begin with.
var processID = nonce()

// Handler handles the notifications of one channel.
//
// With CONCURRENCY=1 Handle is called for one notification at a time, in the
// order in which the server sent them; else from up to CONCURRENCY goroutines
// at once. ctx ends HANDLER_TIMEOUT after the call, and earlier when shutting
// down takes longer than SHUTDOWN_TIMEOUT; Handle must return soon after that,
// for nothing else can stop it.
//
// An error, or a panic, means that it failed: it is called again after a pause
// with the same notification and the next Attempt. After HANDLER_ATTEMPTS, or at
// once for an error made by Permanent, the notification is logged as an ERROR,
// payload and all, and given up.
type Handler interface {
	Handle(ctx context.Context, n Notification) error
}

// HandlerFunc makes a Handler of a function.
type HandlerFunc func(ctx context.Context, n Notification) error

// Handle calls f.
func (f HandlerFunc) Handle(ctx context.Context, n Notification) error { return f(ctx, n) }

// CatchUper is implemented by a Handler that can find by itself what it has
// missed, because the truth is in a table and not in the payload. CatchUp is
// called after every (re)connect once all channels are LISTENed, the first
// included; after an overflow; when delivery resumes after a failed probe; and
// every CATCH_UP_INTERVAL. Requests made while one waits or is retried are merged,
// and CatchUp never runs twice at once. LISTEN comes before it, so the same work
// can be seen twice: here and in Handle. Context, errors and attempts are as for Handle.
type CatchUper interface {
	CatchUp(ctx context.Context) error
}

// Runner is implemented by a Handler that also works on its own. Run is called
// once, on a goroutine of its own, when the listener starts. It begins nothing
// new after stop has ended, finishes what it has begun, and returns soon after quit has
// ended, come what may.
type Runner interface {
	Run(stop, quit context.Context)
}

// Checker is implemented by a Handler that can say, for -check, whether what it
// needs is there. The text is one line; the error says what to do.
type Checker interface {
	Check(ctx context.Context) (string, error)
}

// Meter is implemented by a Handler that adds figures to /metrics. Stats may be
// called from any goroutine and must not block. Every figure is given the label channel.
type Meter interface {
	Stats() []Stat
}

// Stat is one figure: its Prometheus name, "gauge" or "counter", what it means.
type Stat struct {
	Name, Kind, Help string
	Value            float64
}

// Permanent marks an error that no retry can mend. The nil error stays nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &marked{error: err, permanent: true}
}

// RetryAfter marks an error after which a retry should wait for d at least. The
// outbox waits for up to an hour, a plain channel or a doorbell for up to half a
// minute, since everything behind the notification waits with it.
func RetryAfter(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return &marked{error: err, after: d}
}

type marked struct {
	error
	permanent bool
	after     time.Duration
}

func (m *marked) Unwrap() error { return m.error }

func isPermanent(err error) bool {
	var m *marked
	return errors.As(err, &m) && m.permanent
}

func retryAfter(err error) time.Duration {
	var m *marked
	if errors.As(err, &m) {
		return m.after
	}
	return 0
}

// newHandler makes the handler of one channel at the start. arg is what follows
// the name and a colon in CHANNELS. An error is reported as one of the
// configuration.
type newHandler func(arg string, e env) (Handler, error)

// env is what a handler may need from the program around it.
type env struct {
	channel string
	log     *slog.Logger // carries the channel as an attribute
	cfg     *Config
	table   map[string]newHandler
}

// handlerTable names everything that may stand right of the "=" in CHANNELS.
// To add a handler write one function and add one line here.
func handlerTable() map[string]newHandler {
	return map[string]newHandler{
		"log":    newLog,
		"exec":   newExec,
		"append": newAppend,
	}
}

// newLog makes the handler that writes each notification to the log.
func newLog(_ string, e env) (Handler, error) {
	return HandlerFunc(func(_ context.Context, n Notification) error {
		// The payload is a value, never the format: it can forge neither lines nor attributes.
		e.log.Info("notification", "payload", n.Payload, "backend", n.PID)
		return nil
	}), nil
}

// newAppend makes the handler "append:FILE", which keeps a journal: one line of
// JSON for each notification. It is also the example to copy.
//
// It is called once here, at the start, where a wrong arg is best found. The function
// that it returns runs for each notification, one at a time and in order unless CONCURRENCY is more
// than 1. An error (a full disk, say) has it called again, with the same id; so
// has a kill in mid-line, in the outbox. Whoever reads the journal therefore
// takes the id for the key, and a line that is not JSON for one that came again.
func newAppend(arg string, _ env) (Handler, error) {
	if arg == "" {
		return nil, errors.New("append needs a file: append:FILE")
	}
	open := func() (*os.File, error) { return os.OpenFile(arg, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600) }
	f, err := open()
	if err != nil {
		return nil, err
	}
	f.Close()
	return HandlerFunc(func(_ context.Context, n Notification) error {
		line, err := json.Marshal(map[string]string{"id": n.ID(), "channel": n.Channel, "payload": n.Payload})
		if err != nil {
			return Permanent(err) // it will never be otherwise
		}
		f, err := open() // each time, so that logrotate may move it away
		if err != nil {
			return err
		}
		_, err = f.Write(append(line, '\n'))
		return errors.Join(err, f.Close())
	}), nil
}
