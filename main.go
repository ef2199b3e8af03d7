// Pglistener listens on PostgreSQL channels and hands each payload to the handler registered for its channel. It is configured by
// environment variables; -h prints them. Exit codes: 0 after a requested stop with nothing left undone, 1 when it failed or had
// to abandon notifications, 2 for a configuration that cannot work.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/env"
	"github.com/pglistener/pglistener/internal/logs"
	"github.com/pglistener/pglistener/internal/page" // feature: page
	"github.com/pglistener/pglistener/internal/pgconn"
)

func main() {
	signals := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signals = append(signals, syscall.SIGHUP)
	}
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // whoever reads the log may end before us; to ignore it would have programs ignore it too
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	// The first signal stops in order; from then on a second one ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], cli.Env{Lookup: os.LookupEnv, Stdout: os.Stdout, Stderr: os.Stderr}))
}

// run is the program: it does what args say and returns the exit code.
func run(ctx context.Context, args []string, e cli.Env) int {
	c, operands, err := cli.Parse(args, commands())
	if err != nil {
		return e.Fail(err, cli.Usage)
	}
	e.Operands = operands
	return c.Run(ctx, e)
}

func commands() []cli.Command {
	return append([]cli.Command{
		{Flags: "", Run: listen},
		{Flags: "-V, --version", Usage: "print the version", Run: func(_ context.Context, e cli.Env) int {
			fmt.Fprintln(e.Stdout, "pglistener", cli.Version())
			return cli.OK
		}},
		{Flags: "-h, -?, --help", Usage: "print this", Run: printUsage},
	}, featureCommands()...)
}

// listen is what the program is for: it listens until ctx ends.
func listen(ctx context.Context, e cli.Env) int {
	p := load(e)
	e.Stderr = p.lines                                // which never blocks
	defer func() { _ = p.lines.Close(time.Second) }() // what stderr has not taken by then is lost
	for _, problem := range p.problems {
		e.Fail(problem, cli.Usage)
	}
	if len(p.problems) > 0 {
		return cli.Usage
	}
	for _, w := range p.cfg.warnings(os.Environ()) {
		p.log.Warn(w)
	}
	if os.Getenv("GOMEMLIMIT") == "" { // the garbage collector works harder from here on
		debug.SetMemoryLimit(int64(p.cfg.QueueMemory) + 48<<20)
	}
	if os.Getenv("GOGC") == "" { // the heap is small, and would be collected a hundred times a second under load
		debug.SetGCPercent(400)
	}
	p.log.Info("starting", "version", cli.Version(), "pid", os.Getpid())
	listener := NewListener(p.cfg.dsn(), p.cfg.Listener, p.channels, p.log)
	ends, err := watch(listener, p, e.Lookup)
	if err != nil {
		return e.Fail(err, cli.Failed)
	}
	for _, end := range ends {
		defer end()
	}
	abandoned, err := listener.Run(ctx)
	if err != nil {
		return e.Fail(errors.New(pgconn.Explain(err)), cli.Failed)
	}
	if abandoned > 0 {
		p.log.Error("stopped", "abandoned", abandoned)
		return cli.Failed
	}
	p.log.Info("stopped")
	return cli.OK
}

// loaded is what the configuration makes.
type loaded struct {
	cfg      *Config
	channels []Channel
	log      *slog.Logger
	lines    *logs.Writer   // through which log writes
	problems []error        // every one of the configuration
	page     *page.Recorder // feature: page
}

func load(e cli.Env) (p loaded) {
	handlers, modes := addHandlers(handlerTable()), modes()
	p.cfg, p.problems = loadConfig(e.Lookup, handlers, modes)
	p.log, p.lines = logs.Open(p.cfg.Log, e.Stderr)
	p.page, p.log = page.Watch(p.log) // feature: page
	channels, wrong := makeChannels(p.cfg, handlers, modes, p.log)
	p.problems = env.Merge(p.problems, wrong) // a handler repeats what is wrong with its settings
	p.channels = channels
	return p
}

func printUsage(_ context.Context, e cli.Env) int {
	cli.Help(e.Stdout, commands(), sortedKeys(modes()), sortedKeys(addHandlers(handlerTable())), &Config{}, &ChannelSettings{})
	return cli.OK
}
