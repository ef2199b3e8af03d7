// Package logs makes the program's logger, which never stops the work when nobody reads stderr.
package logs

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"time"
)

// Settings are the variables of the log.
type Settings struct {
	Level  string `env:"LOG_LEVEL,default=info" oneof:"debug info warn error" usage:"debug, info, warn or error"`
	Format string `env:"LOG_FORMAT,default=text" oneof:"text json" usage:"text or json, on stderr"`
}

// New makes a plain logger that writes to w as the settings say; unknown words mean the defaults. It blocks for as long as w
// blocks: the program uses Open.
func New(s Settings, w io.Writer) *slog.Logger { return slog.New(newHandler(s, w)) }

// Open makes the program's logger and the Writer through which it writes to out. Logging is synchronous while out takes lines,
// and drops them while out blocks, as Writer.Write says; the line that tells how many is written at every LOG_LEVEL.
func Open(s Settings, out io.Writer) (*slog.Logger, *Writer) {
	w := &Writer{out: out, ended: make(chan struct{}), report: func(n uint64) []byte {
		var line bytes.Buffer
		New(Settings{Format: s.Format}, &line).Warn("log lines were dropped because stderr was not read", "dropped", n)
		return line.Bytes()
	}}
	w.more.L = &w.mu
	go w.run() // which Close ends
	f := &formatter{lock: make(chan struct{}, 1)}
	return slog.New(&handler{newHandler(s, f), f, w}), w
}

// Write logs at level INFO a line that must not be lost, because it is the work itself. It waits until the line has been written
// or ctx ends; any goroutine may call it. Of a logger that Open made, its error is that of Writer.WriteContext; of any other, its
// handler's. When LOG_LEVEL leaves out INFO it returns nil at once.
func Write(ctx context.Context, log *slog.Logger, msg string, args ...any) error {
	if !log.Enabled(ctx, slog.LevelInfo) {
		return nil
	}
	r := slog.NewRecord(time.Now(), slog.LevelInfo, msg, 0)
	r.Add(args...)
	return log.Handler().Handle(context.WithValue(ctx, sureKey{}, true), r)
}

// sureKey marks the context of a record that must not be dropped.
type sureKey struct{}

// handler formats records for a Writer. A handler of slog holds a lock while it writes, so the embedded one writes to formatter
// only: a record that waits for w holds no lock that another record needs.
type handler struct {
	slog.Handler
	formatter *formatter
	w         *Writer
}

// formatter keeps the line that was formatted last. Whoever holds lock, which is taken by sending, owns it.
type formatter struct {
	bytes.Buffer
	lock chan struct{}
}

func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	sure := ctx.Value(sureKey{}) != nil
	if !sure {
		ctx = context.WithoutCancel(ctx) // what is logged of the end of a context must not end with it
	}
	line, err := h.format(ctx, r)
	if err == nil && sure {
		err = h.w.WriteContext(ctx, line)
	} else if err == nil {
		_, err = h.w.Write(line)
	}
	return err
}

func (h *handler) format(ctx context.Context, r slog.Record) ([]byte, error) {
	select {
	case h.formatter.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, notWritten(ctx)
	}
	defer func() { <-h.formatter.lock }()
	h.formatter.Reset()
	err := h.Handler.Handle(ctx, r)
	return bytes.Clone(h.formatter.Bytes()), err
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &handler{h.Handler.WithAttrs(attrs), h.formatter, h.w}
}

func (h *handler) WithGroup(name string) slog.Handler {
	return &handler{h.Handler.WithGroup(name), h.formatter, h.w}
}

func newHandler(s Settings, w io.Writer) slog.Handler {
	var level slog.Level
	_ = level.UnmarshalText([]byte(s.Level))
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration { // JSON would have it in nanoseconds
			return slog.String(a.Key, a.Value.Duration().String())
		}
		return a
	}}
	if s.Format == "json" {
		return slog.NewJSONHandler(w, options)
	}
	return slog.NewTextHandler(w, options)
}
