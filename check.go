package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
	"github.com/pglistener/pglistener/internal/retry"
)

// check is the flag -check: it tries everything once, prints one line per check and returns the exit code. No
// handler runs. It ends within 3 x PING_TIMEOUT, whatever the network does.
func check(ctx context.Context, e cli.Env) int {
	cfg, channels, _, problems := load(e)
	r := &report{out: e.Stdout}
	for _, p := range problems {
		r.line(p, "config", "")
	}
	if len(problems) == 0 {
		// Whatever the answers take, the lines are out in time.
		ctx, cancel := context.WithTimeout(ctx, 3*cfg.Listener.PingTimeout-cfg.Listener.PingTimeout/10)
		defer cancel()
		r.configuration(cfg)
		if r.server(ctx, cfg) {
			r.handlers(ctx, channels)
			r.delivery(ctx, cfg, channels)
		}
	}
	if r.failed {
		return cli.Failed
	}
	return cli.OK
}

// report prints what was found.
type report struct {
	out    io.Writer
	failed bool
}

// line prints err, or else text.
func (r *report) line(err error, what, text string) {
	verdict := "ok  "
	if err != nil {
		verdict, text, r.failed = "FAIL", pgconn.Explain(err), true
	}
	fmt.Fprintf(r.out, "%s  %-10s %s\n", verdict, what, text)
}

func (r *report) configuration(cfg *Config) {
	for _, route := range cfg.routes {
		r.line(nil, "handler", route.Channel+": "+route.Mode+" "+route.Spec())
		if w := route.Warning(); w != "" {
			r.line(nil, "warning", w)
		}
	}
}

// server asks the server what it is, and returns whether it can be listened to.
func (r *report) server(ctx context.Context, cfg *Config) bool {
	db, err := pgconn.OpenDB(cfg.dsn(), cfg.Listener.PingTimeout)
	var version string
	var standby bool
	if err == nil {
		defer db.Close()
		err = db.QueryRowContext(ctx, "select current_setting('server_version'), pg_is_in_recovery()").Scan(&version, &standby)
	}
	r.line(err, "connect", "PostgreSQL "+version)
	if err != nil {
		return false
	}
	if standby {
		err = fmt.Errorf("a standby, where LISTEN is not possible; add target_session_attrs=read-write and all hosts to DATABASE_URL, or wait until it is promoted")
	}
	r.line(err, "server", "a primary")
	return err == nil
}

// handlers asks each handler whether what it needs is there.
func (r *report) handlers(ctx context.Context, channels []Channel) {
	for _, c := range channels {
		if h, ok := c.Handler.(notify.Checker); ok {
			text, err := h.Check(ctx)
			if err != nil {
				err = fmt.Errorf("%s: %w", c.Name, err)
			}
			r.line(err, "handler", c.Name+": "+text)
		}
	}
}

// delivery says whether the channels can be LISTENed, and whether a probe comes back. It runs a real Listener,
// with handlers that do nothing, until it is ready, or knows that it is deaf, or ctx ends.
func (r *report) delivery(ctx context.Context, cfg *Config, channels []Channel) {
	idle := notify.HandlerFunc(func(context.Context, notify.Notification) error { return nil })
	silent := make([]Channel, len(channels))
	names := make([]string, len(channels))
	for i, c := range channels {
		silent[i], names[i] = Channel{Name: c.Name, Handler: idle, Queue: c.Queue}, c.Name
	}
	l := NewListener(cfg.dsn(), cfg.Listener, silent, slog.New(slog.DiscardHandler))
	listening, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = l.Run(listening)
	}()
	for l.Ready() != nil && l.newest().Probe.Deaf == "" && retry.Sleep(ctx, 10*time.Millisecond) {
	}
	s, err := l.newest(), l.Ready()
	stop()
	select { // it ends by itself; do not keep the caller waiting
	case <-ended:
	case <-ctx.Done():
	case <-time.After(time.Second):
	}
	if s.Listening || s.Probe.Deaf != "" {
		r.line(nil, "listen", strings.Join(names, ", "))
		if cfg.Listener.ProbeInterval == 0 {
			r.line(nil, "probe", "turned off by PROBE_INTERVAL=0: delivery is not proven")
		} else {
			r.line(err, "probe", "there and back in "+s.Probe.RoundTrip.Round(time.Microsecond).String())
		}
	} else {
		r.line(err, "listen", "")
	}
}
