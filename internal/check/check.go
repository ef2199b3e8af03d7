// Package check is the flag -check: it tries everything once.
package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
)

// Input is what is to be tried.
type Input struct {
	Problems []error  // of the configuration; nothing else is tried then
	Lines    []string // what is in force, as "subject: text"
	DSN      string
	Timeout  time.Duration             // of every answer
	Handlers map[string]notify.Handler // by channel
	Channels []string
	Probes   bool // whether there are any

	// Listen listens until it is ready, or knows that it is deaf, or ctx ends. It says how long a probe took, whether every
	// channel was LISTENed, and why it is not ready.
	Listen func(ctx context.Context) (roundTrip time.Duration, listened bool, err error)
}

// Run tries everything once, prints a line for each check and returns whether all is well. No handler runs. It ends within three
// times the timeout, whatever the network does.
func Run(ctx context.Context, in Input, out io.Writer) (ok bool) {
	r := &report{out: out}
	for _, p := range in.Problems {
		r.line(p, "config", "")
	}
	if len(in.Problems) > 0 {
		return false
	}
	// Whatever the answers take, the lines are out in time.
	ctx, cancel := context.WithTimeout(ctx, 3*in.Timeout-in.Timeout/10)
	defer cancel()
	for _, l := range in.Lines {
		what, text, _ := strings.Cut(l, ": ")
		r.line(nil, what, text)
	}
	if mute, ok := r.server(ctx, in); ok {
		r.handlers(ctx, in)
		r.delivery(ctx, in, mute)
	}
	return !r.failed
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

// mutes are servers that speak the protocol and may not LISTEN, by what their version() says of them.
var mutes = map[string]string{
	"CockroachDB": "CockroachDB has no LISTEN",
	"-YB-":        "YugabyteDB has LISTEN from 2025.2.3 on, and only with the flag ysql_yb_enable_listen_notify on all masters and tservers",
}

// server asks the server what it is, and returns whether it can be listened to; mute is why it might not LISTEN, or "".
func (r *report) server(ctx context.Context, in Input) (mute string, ok bool) {
	var version, full string
	var standby bool
	db, err := pgconn.OpenDB(in.DSN, in.Timeout)
	if err == nil {
		defer db.Close()
		err = db.QueryRowContext(ctx, "select current_setting('server_version'), pg_is_in_recovery(), version()").Scan(&version, &standby, &full)
	}
	r.line(err, "connect", "PostgreSQL "+version)
	if err != nil {
		return "", false
	}
	for mark, why := range mutes {
		if strings.Contains(full, mark) {
			mute = why
		}
	}
	if standby {
		err = errors.New("a standby, where LISTEN is not possible; add target_session_attrs=read-write and all hosts to DATABASE_URL, or wait until it is promoted")
	}
	r.line(err, "server", "a primary")
	return mute, err == nil
}

// handlers asks all handlers at once whether what they need is there, so that one that does not answer takes no time from another.
func (r *report) handlers(ctx context.Context, in Input) {
	ctx, cancel := context.WithTimeout(ctx, in.Timeout*9/10) // before connections end by themselves, so that the server is told to cancel
	defer cancel()
	texts, errs := make([]string, len(in.Channels)), make([]error, len(in.Channels))
	var asking sync.WaitGroup
	for i, channel := range in.Channels {
		if h, ok := in.Handlers[channel].(notify.Checker); ok {
			asking.Go(func() { texts[i], errs[i] = h.Check(ctx) })
		}
	}
	asking.Wait()
	for i, channel := range in.Channels {
		if errs[i] != nil {
			errs[i] = errors.New(channel + ": " + errs[i].Error()) // which has its own hint; those of line are about the server
		}
		if errs[i] != nil || texts[i] != "" {
			r.line(errs[i], "handler", channel+": "+texts[i])
		}
	}
}

// delivery says whether the channels can be LISTENed, and whether a probe comes back.
func (r *report) delivery(ctx context.Context, in Input, mute string) {
	roundTrip, listened, err := in.Listen(ctx)
	switch {
	case !listened && mute != "":
		err = fmt.Errorf("%s: %w", mute, err)
	case listened && in.Probes:
		r.line(err, "probe", "there and back in "+roundTrip.Round(time.Microsecond).String())
		err = nil
	case listened:
		r.line(nil, "probe", "turned off by PROBE_INTERVAL=0: delivery is not proven")
		err = nil
	}
	r.line(err, "listen", strings.Join(in.Channels, ", "))
}
