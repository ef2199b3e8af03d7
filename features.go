package main

import (
	"context"
	"errors"
	"fmt" // feature: outbox
	"io"  // feature: outbox
	"log/slog"
	"net/http" // feature: health
	"os"
	"slices" // feature: outbox
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/check" // feature: check
	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/env"
	"github.com/pglistener/pglistener/internal/execcmd" // feature: execcmd
	"github.com/pglistener/pglistener/internal/health"  // feature: health
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/outbox" // feature: outbox
	"github.com/pglistener/pglistener/internal/page"   // feature: page
	"github.com/pglistener/pglistener/internal/pipe"   // feature: pipe
	"github.com/pglistener/pglistener/internal/proc"   // feature: execcmd/pipe
	"github.com/pglistener/pglistener/internal/queue"
	"github.com/pglistener/pglistener/internal/retry"
	"github.com/pglistener/pglistener/internal/schedule" // feature: schedule
	"github.com/pglistener/pglistener/internal/sdnotify" // feature: sdnotify
	"github.com/pglistener/pglistener/internal/trigger"  // feature: outbox
	"github.com/pglistener/pglistener/internal/webhook"  // feature: webhook
)

// The features are what can be left out, each a folder of internal. This file connects them. make new WITHOUT="..." copies the
// project without the folders and the lines that name them.

// ChannelSettings are the variables of a channel.
type ChannelSettings struct {
	call.Limits
	Queue    queue.Settings
	Programs proc.Settings     // feature: execcmd/pipe
	Outbox   outbox.Settings   // feature: outbox
	Webhook  webhook.Settings  // feature: webhook
	Schedule schedule.Settings // feature: schedule
}

// FeatureSettings are the variables of features of which there is one in a process.
type FeatureSettings struct {
	Health health.Settings // feature: health
}

// addHandlers adds the handlers of the features to the table of handler.go.
func addHandlers(table map[string]newHandler) map[string]newHandler {
	// begin: execcmd
	table["exec"] = func(arg string, s Setup) (notify.Handler, error) {
		return execcmd.New(arg, s.Settings.Programs, s.Setup)
	}
	// end: execcmd
	// begin: pipe
	table["pipe"] = func(arg string, s Setup) (notify.Handler, error) {
		return pipe.New(arg, s.Settings.Programs, s.Settings.Concurrency, s.Setup)
	}
	// end: pipe
	// begin: webhook
	table["https"] = func(_ string, s Setup) (notify.Handler, error) {
		reread := func() (webhook.Settings, error) { // secrets and certificates may be replaced while it runs
			var again ChannelSettings
			problems := env.Decode(&again, s.Lookup)
			_, wrong := env.DecodeFor(&again, s.Lookup, s.Channel)
			return again.Webhook, errors.Join(append(problems, wrong...)...)
		}
		return webhook.New(s.Spec, s.Settings.Webhook, reread, s.Settings.Concurrency, s.Setup)
	}
	table["http"] = table["https"]
	// end: webhook
	return table
}

// wrap makes of a handler one that works in another mode, and may change how its queue works.
type wrap func(h notify.Handler, s Setup, q *queue.Options) (notify.Handler, error)

// modes are what may stand before a handler in CHANNELS.
func modes() map[string]wrap {
	all := map[string]wrap{
		"plain": func(h notify.Handler, s Setup, _ *queue.Options) (notify.Handler, error) {
			// begin: schedule
			if s.Settings.Schedule.Text != "" {
				return nil, errors.New("a plain channel has no schedule: it is for the other modes")
			}
			// end: schedule
			return h, nil
		},
		"doorbell": func(h notify.Handler, s Setup, q *queue.Options) (notify.Handler, error) {
			q.Doorbell = true
			// begin: schedule
			if q.Rung = s.Settings.Schedule.Text != ""; q.Rung {
				q.Times = s.Settings.Schedule.Clock()
			}
			// end: schedule
			return h, nil
		},
	}
	// begin: outbox
	pool := new(outbox.Pool) // of all channels
	options := func(s Setup) outbox.Options {
		return outbox.Options{
			Settings: s.Settings.Outbox, Limits: s.Settings.Limits, DSN: s.DSN, Timeout: s.Timeout, Memory: s.Memory,
			Next: schedule.Next, Schedule: s.Settings.Schedule.Text, // feature: schedule
		}
	}
	all["outbox"] = func(h notify.Handler, s Setup, _ *queue.Options) (notify.Handler, error) {
		return outbox.New(h, pool, options(s), s.Setup)
	}
	// end: outbox
	// begin: schedule outbox
	inProcess := all["doorbell"]
	all["doorbell"] = func(h notify.Handler, s Setup, q *queue.Options) (notify.Handler, error) {
		h, err := inProcess(h, s, q)
		if !q.Rung || !env.IsSet(s.Lookup, s.Channel, "OUTBOX_TABLE") {
			return h, err
		}
		q.Times = nil // the row has them, so that replicas and restarts agree
		return outbox.NewDoorbell(h, pool, options(s), s.Setup)
	}
	// end: schedule outbox
	return all
}

// featureCommands are the flags of the features.
func featureCommands() []cli.Command {
	// begin: outbox
	states := "failed|waiting"
	states += "|scheduled" // feature: schedule
	// end: outbox
	// begin: health
	ask := func(path string) func(context.Context, cli.Env) int {
		return func(_ context.Context, e cli.Env) int { return health.Ask(e.Lookup, path, e.Stdout) }
	}
	// end: health
	return []cli.Command{
		{Flags: "-check", Usage: "try everything once, print one line per check, exit with 0 or 1", Run: checkAll}, // feature: check
		// begin: outbox
		{Flags: "-outbox-schema", Operands: "[CHANNEL...]", Usage: "print the SQL that makes OUTBOX_TABLE, for psql or a migration; inserts on these channels do not NOTIFY", Run: printSchema},
		{Flags: "-outbox-list", Operands: "[" + states + "] [ID...|CHANNEL|all]", Usage: "show rows of OUTBOX_TABLE, without payloads: as columns on a terminal, otherwise as lines of JSON", Run: operate(outbox.List)},
		{Flags: "-outbox-retry", Operands: "[-n] ID...|CHANNEL|all", Usage: "make rows due now that have failed or are to be tried again later; -n only says which", Run: operate(outbox.Retry)},
		{Flags: "-outbox-purge", Operands: "[-n] ID...|CHANNEL|all", Usage: "delete rows that have failed; -n only says which", Run: operate(outbox.Purge)},
		{Flags: "-trigger", Operands: trigger.Operands, Usage: "print the SQL of a trigger that puts each change of TABLE into the outbox, for psql or a migration", Run: printTrigger},
		// end: outbox
		// begin: health
		{Flags: "-healthy", Usage: "ask the listener at HTTP_ADDR whether it is ready, and exit with 0 or 1", Run: ask("/readyz")},
		{Flags: "-alive", Usage: "ask it whether its loop turns, which is what a liveness probe is for; exit with 0 or 1", Run: ask("/livez")},
		// end: health
	}
}

// begin: outbox

// outboxVariables reads the variables that a command about the outbox needs. What is wrong with others is no matter.
func outboxVariables(e cli.Env, names ...string) (cfg *Config, ok bool) {
	cfg, ok = &Config{}, true
	problems := env.Decode(cfg, e.Lookup)
	if name, err := env.CheckDSN(cfg.DatabaseURL, e.Lookup); err != nil {
		problems = append(problems, fmt.Errorf("%s: %w", name, err))
	}
	for _, problem := range problems {
		name, _, _ := strings.Cut(strings.Replace(problem.Error(), "_FILE:", ":", 1), ":")
		if slices.Contains(names, name) {
			names = slices.DeleteFunc(names, func(n string) bool { return n == name }) // one line a variable
			e.Fail(problem, cli.Usage)
			ok = false
		}
	}
	return cfg, ok
}

func printSchema(_ context.Context, e cli.Env) int {
	cfg, ok := outboxVariables(e, "OUTBOX_TABLE")
	if !ok {
		return cli.Usage
	}
	sql, err := outbox.Schema(cfg.Channel.Outbox.Table, e.Operands...)
	if err != nil {
		return e.Fail(err, cli.Usage)
	}
	_, err = io.WriteString(e.Stdout, sql)
	return e.Fail(err, cli.Failed)
}

// operate makes a command of one that a person gives about rows.
func operate(command outbox.Command) func(context.Context, cli.Env) int {
	return func(ctx context.Context, e cli.Env) int {
		cfg, ok := outboxVariables(e, "OUTBOX_TABLE", "PING_TIMEOUT", "DATABASE_URL", "PGSERVICE", "PG*")
		if !ok {
			return cli.Usage
		}
		return outbox.Operator{
			DSN: cfg.dsn(), Table: cfg.Channel.Outbox.Table, Timeout: cfg.Listener.PingTimeout,
			Operands: e.Operands, Stdout: e.Stdout, Stderr: e.Stderr, Fail: e.Fail,
		}.Run(ctx, command)
	}
}

func printTrigger(_ context.Context, e cli.Env) int {
	cfg, ok := outboxVariables(e, "PING_TIMEOUT", "DATABASE_URL", "PGSERVICE", "PG*")
	options, wrong := trigger.Parse(e.Operands)
	box, err := outbox.SQLName(cfg.Channel.Outbox.Table)
	if wrong = errors.Join(wrong, err); wrong != nil {
		return e.Fail(wrong, cli.Usage)
	} else if !ok {
		return cli.Usage
	}
	return e.Fail(trigger.Print(cfg.dsn(), cfg.Listener.PingTimeout, box, options, e.Stdout), cli.Failed)
}

// end: outbox

// watch connects what watches l while it runs. ends are to be called when it has stopped.
func watch(l *Listener, p loaded, lookup env.Lookuper) (ends []func(), err error) {
	l.Beat, l.OnBeat = sdnotify.Start(l.Beat, lookup, p.log) // feature: sdnotify
	root := http.NotFoundHandler()                           // feature: health
	// begin: page
	if p.cfg.Features.Health.Addr != "" {
		s := page.Source{Version: cli.Version(), Alive: l.Alive, Hears: l.Hears, Stats: l.Stats}
		s.Next = schedule.Next           // feature: schedule
		for i, r := range p.cfg.routes { // of each of which makeChannels has made a channel
			c := page.Channel{Name: r.Channel, Shown: r.Shown(), Works: func() error { return l.Works(l.channels[i]) }}
			c.Schedule = p.cfg.perChannel[r.Channel].Schedule.Text // feature: schedule
			s.Channels = append(s.Channels, c)
		}
		root, ends = p.page, append(ends, p.page.Start(s))
	}
	// end: page
	// begin: health
	server, err := health.Serve(p.cfg.Features.Health, root, l, cli.Version(), p.log, p.lines)
	ends = append(ends, server.Close)
	// end: health
	// begin: schedule outbox
	plain := map[string]string{} // doorbells without a schedule, with the table that may hold what is left of one
	for _, r := range p.cfg.routes {
		if s := p.cfg.perChannel[r.Channel]; r.Mode == "doorbell" && s.Schedule.Text == "" && env.IsSet(lookup, r.Channel, "OUTBOX_TABLE") {
			plain[r.Channel] = s.Outbox.Table
		}
	}
	if len(plain) > 0 && err == nil {
		ends = append(ends, outbox.ForgetSchedules(p.cfg.dsn(), p.cfg.Listener.PingTimeout, plain, p.log))
	}
	// end: schedule outbox
	return ends, err
}

// begin: check

// checkAll is the flag -check.
func checkAll(ctx context.Context, e cli.Env) int {
	p := load(e)
	cfg, channels := p.cfg, p.channels
	in := check.Input{Problems: p.problems, DSN: cfg.dsn(), Timeout: cfg.Listener.PingTimeout, Probes: cfg.Listener.ProbeInterval > 0, Handlers: map[string]notify.Handler{}}
	silent := make([]Channel, len(channels)) // no handler runs
	for i, c := range channels {
		in.Handlers[c.Name], in.Channels = c.Handler, append(in.Channels, c.Name)
		silent[i] = Channel{Name: c.Name, Queue: c.Queue, Handler: notify.HandlerFunc(func(context.Context, notify.Notification) error { return nil })}
	}
	for _, r := range cfg.routes {
		line := "handler: " + r.Channel + ": " + r.Shown()
		if own := cfg.set[r.Channel]; len(own) > 0 {
			line += ", with " + strings.Join(own, ", ")
		}
		in.Lines = append(in.Lines, line)
	}
	for _, w := range cfg.warnings(os.Environ()) {
		in.Lines = append(in.Lines, "warning: "+w)
	}
	in.Listen = func(ctx context.Context) (time.Duration, bool, error) {
		l := NewListener(cfg.dsn(), cfg.Listener, silent, slog.New(slog.DiscardHandler))
		s, err := l.try(ctx)
		return s.Probe.RoundTrip, s.Listening || s.Probe.Deaf != "", err
	}
	if !check.Run(ctx, in, e.Stdout) {
		return cli.Failed
	}
	return cli.OK
}

// try runs l until it is ready, or knows that it is deaf, or ctx ends. It returns where it got to.
func (l *Listener) try(ctx context.Context) (Status, error) {
	listening, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { _, _ = l.Run(listening); close(ended) }()
	for l.Ready() != nil && l.newest().Probe.Deaf == "" && retry.Sleep(ctx, 10*time.Millisecond) {
	}
	s, err := l.newest(), l.Ready()
	if s.Probe.Deaf != "" { // it is about to try another connection, and says so
		err = errors.New(s.Probe.Deaf)
	}
	stop()
	select { // it ends by itself; do not keep the caller waiting
	case <-ended:
	case <-ctx.Done():
	case <-time.After(time.Second):
	}
	return s, err
}

// end: check
