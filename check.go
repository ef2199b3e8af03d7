package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"
)

// runCheck tries everything once, prints one line per check and returns the exit
// code. problems are those of the configuration, programs included. l is not started: no
// handler runs. It ends within 3 x PING_TIMEOUT whatever the network does.
func runCheck(ctx context.Context, cfg *Config, l *Listener, problems []error, out io.Writer) int {
	failed := false
	line := func(ok bool, what, format string, args ...any) {
		verdict := "ok  "
		if !ok {
			verdict, failed = "FAIL", true
		}
		fmt.Fprintf(out, "%s  %-10s %s\n", verdict, what, fmt.Sprintf(format, args...))
	}
	if len(problems) > 0 {
		for _, p := range problems {
			line(false, "config", "%v", p)
		}
		return exitFailed
	}
	// Whatever the answers take, the lines are out in time.
	ctx, cancel := context.WithTimeout(ctx, 3*cfg.PingTimeout-cfg.PingTimeout/10)
	defer cancel()

	names := make([]string, len(cfg.routes))
	for i, r := range cfg.routes {
		names[i] = r.channel
		line(true, "handler", "%s: %s %s", r.channel, r.mode, strings.TrimSuffix(r.handler+":"+r.arg, ":"))
	}
	for _, w := range cfg.warnings() {
		line(true, "warning", "%s", w)
	}

	version, standby, err := server(ctx, cfg)
	if err != nil {
		line(false, "connect", "%s", explain(err))
		return exitFailed
	}
	line(true, "connect", "PostgreSQL %s", version)
	if standby {
		line(false, "server", "a standby, where LISTEN is not possible; add target_session_attrs=read-write and all hosts to DATABASE_URL, or wait until it is promoted")
		return exitFailed
	}
	line(true, "server", "a primary")

	for _, channel := range slices.Sorted(maps.Keys(l.handlers)) {
		if c, ok := l.handlers[channel].(Checker); ok {
			text, err := c.Check(ctx)
			if err != nil {
				text = err.Error()
			}
			line(err == nil, "handler", "%s: %s", channel, text)
		}
	}

	s, reason := tryListen(ctx, cfg)
	listened := s.listening || s.deaf != ""
	line(listened, "listen", "%s", orReason(listened, strings.Join(names, ", "), reason))
	switch {
	case cfg.ProbeInterval == 0:
		line(true, "probe", "turned off by PROBE_INTERVAL=0: delivery is not proven")
	case listened:
		line(s.provenHere, "probe", "%s", orReason(s.provenHere, "there and back in "+s.roundTrip.Round(time.Microsecond).String(), reason))
	}
	if failed {
		return exitFailed
	}
	return exitOK
}

func orReason(ok bool, text, reason string) string {
	if ok {
		return text
	}
	return reason
}

// server asks the server what it is.
func server(ctx context.Context, cfg *Config) (version string, standby bool, err error) {
	db, err := openDB(cfg.dsn(), cfg.PingTimeout)
	if err != nil {
		return "", false, err
	}
	defer db.Close()
	err = db.QueryRowContext(ctx, "select current_setting('server_version'), pg_is_in_recovery()").Scan(&version, &standby)
	return version, standby, err
}

// tryListen runs a real Listener, with handlers that do nothing, until it is ready, or knows
// that it is deaf, or ctx ends. It returns where it got to, and why not further.
func tryListen(ctx context.Context, cfg *Config) (status, string) {
	idle := func(string, env) (Handler, error) {
		return HandlerFunc(func(context.Context, Notification) error { return nil }), nil
	}
	table := map[string]newHandler{}
	for _, r := range cfg.routes {
		table[r.handler] = idle
	}
	quiet := slog.New(slog.DiscardHandler)
	l, err := NewListener(cfg, table, &supervisor{log: quiet}, quiet)
	if err != nil {
		return status{}, err.Error()
	}
	listening, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		_, err := l.Run(listening)
		ended <- err
	}()
	defer func() {
		stop()
		select { // it ends by itself; the caller's time is not waited for in vain
		case <-ended:
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var s status
	reason := "no answer"
	for done := false; !done; {
		select {
		case <-ctx.Done():
			done = true
		case <-tick.C:
		}
		if p := l.published.Load(); p != nil {
			s, reason = *p, l.judge(*p)
			if s.deaf != "" { // it listens, and is about to try another connection
				return s, s.deaf
			}
			done = done || reason == ""
		}
	}
	return s, reason
}
