package main

import (
	"context"
	"log/slog"
)

// Notification is what a handler is given.
type Notification struct {
	Channel string // as in CHANNELS
	Payload string // as the writer sent it: untrusted, any text without a zero byte
	PID     int    // process id of the notifying backend
	Attempt int    // 1, 2, ... up to HANDLER_ATTEMPTS
}

// Handler handles the notifications of one channel.
//
// With CONCURRENCY=1 Handle is called for one notification at a time, in the
// order in which the server sent them; else from up to CONCURRENCY goroutines
// at once. ctx ends HANDLER_TIMEOUT after the call, and earlier when shutting
// down takes longer than SHUTDOWN_TIMEOUT; Handle must return soon after that,
// for nothing else can stop it.
//
// An error, or a panic, means that it failed: it is called again after a pause
// with the same notification and the next Attempt. After HANDLER_ATTEMPTS the
// notification is logged as an ERROR, payload and all, and given up.
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
// included; after an overflow; and every CATCH_UP_INTERVAL. Requests made while
// one waits or is retried are merged, and CatchUp never runs twice at once.
// LISTEN comes before it, so the same work can be seen twice: here and in Handle.
// Context, errors and attempts are as for Handle.
type CatchUper interface {
	CatchUp(ctx context.Context) error
}

// newHandler makes the handler of one channel at the start. arg is what follows
// the name and a colon in CHANNELS. An error is reported as one of the
// configuration.
type newHandler func(arg string, e env) (Handler, error)

// env is what a handler may need from the program around it.
type env struct {
	log *slog.Logger // carries the channel as an attribute
	cfg *Config
}

// handlerTable names everything that may stand right of the "=" in CHANNELS.
// To add a handler write one function and add one line here.
func handlerTable() map[string]newHandler {
	return map[string]newHandler{
		"log":  newLog,
		"exec": newExec,
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
