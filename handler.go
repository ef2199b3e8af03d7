package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"

	"github.com/pglistener/pglistener/internal/logs"
	"github.com/pglistener/pglistener/internal/notify"
)

// This is the file that a team edits. A handler is a function that makes a notify.Handler; package notify has the contract,
// internal/execcmd and internal/webhook are larger examples.

// newHandler makes the handler of one channel, at the start. arg is what follows the name and a colon in CHANNELS. An error is
// reported as one of the configuration.
type newHandler func(arg string, s Setup) (notify.Handler, error)

// handlerTable names everything that may stand right of the "=" in CHANNELS, besides what addHandlers adds. To add a handler
// write one function and add one line here.
func handlerTable() map[string]newHandler {
	return map[string]newHandler{
		"log":    newLog,
		"append": newAppend,
	}
}

// newLog makes the handler that writes each notification to the log.
func newLog(_ string, s Setup) (notify.Handler, error) {
	return notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		attrs := []any{"backend", n.PID}
		if s.LogPayloads {
			// The payload is a value, never the format: it can forge neither lines nor attributes.
			attrs = []any{"payload", n.Payload, "backend", n.PID}
		}
		// The lines are the work: it waits until they are written, and loses none.
		return notify.Unavailable(logs.Write(ctx, s.Log, "notification", attrs...))
	}), nil
}

// newAppend makes the handler "append:FILE", which keeps a journal: one line of JSON for each notification. It is also the
// example to copy.
//
// It is called once here, at the start, where a wrong arg is best found. The function that it returns runs for each notification,
// one at a time and in order unless CONCURRENCY is more than 1. It is called again, with the same id, after an error (a full
// disk, say), and from the outbox also after a kill in the middle of a line. Whoever reads the journal therefore takes the id for
// the key, and skips a line that is not JSON: it comes again, on a line of its own.
func newAppend(arg string, _ Setup) (notify.Handler, error) {
	if arg == "" {
		return nil, errors.New("append needs a file: append:FILE")
	}
	open := func() (*os.File, error) { return os.OpenFile(arg, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600) }
	f, err := open()
	if err != nil {
		return nil, err
	}
	f.Close()
	return notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		// Strings do not fail to be JSON.
		line, _ := json.Marshal(map[string]string{"id": n.ID(), "channel": n.Channel, "payload": n.Payload})
		f, err := open() // each time, so that logrotate may move it away
		if err != nil {
			return err
		}
		if end, _ := f.Seek(0, io.SeekEnd); end > 0 { // else it is empty, or a pipe
			if r, err := os.Open(arg); err == nil {
				defer r.Close()
				last := make([]byte, 1)
				if _, err := r.ReadAt(last, end-1); err == nil && last[0] != '\n' { // the last line was cut short
					line = append([]byte{'\n'}, line...)
				}
			}
		}
		_, err = f.Write(append(line, '\n'))
		return errors.Join(err, f.Close())
	}), nil
}
