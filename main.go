// Pglistener listens on PostgreSQL channels and hands each payload to the handler registered for its channel. It is
// configured by environment variables; -h prints them. Exit codes: 0 after a requested stop with nothing left undone,
// 1 when it failed or had to abandon notifications, 2 for a configuration that cannot work.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/config"
	"github.com/pglistener/pglistener/internal/logs"
	"github.com/pglistener/pglistener/internal/pgconn"
)

func main() {
	signals := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signals = append(signals, syscall.SIGHUP)
	}
	signal.Ignore(syscall.SIGPIPE) // whoever reads the log may end before us
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	// The first signal stops in order; from then on a second one ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], cli.Env{Lookup: os.LookupEnv, Stdout: os.Stdout, Stderr: os.Stderr}))
}

// run is the program: it does what args say and returns the exit code.
func run(ctx context.Context, args []string, e cli.Env) int {
	c, err := cli.Parse(args, commands())
	if err != nil {
		return e.Fail(err, cli.Usage)
	}
	return c.Run(ctx, e)
}

func commands() []cli.Command {
	return append([]cli.Command{
		{Flags: "", Run: listen},
		{Flags: "-V, --version", Usage: "print the version", Run: printVersion},
		{Flags: "-h, -?, --help", Usage: "print this", Run: printUsage},
	}, featureCommands()...)
}

// listen is what the program is for: it listens until ctx ends.
func listen(ctx context.Context, e cli.Env) int {
	cfg, channels, log, problems := load(e)
	for _, p := range problems {
		e.Fail(p, cli.Usage)
	}
	if len(problems) > 0 {
		return cli.Usage
	}
	for _, r := range cfg.routes {
		if w := r.Warning(); w != "" {
			log.Warn(w)
		}
	}
	log.Info("starting", "version", version(), "pid", os.Getpid())
	listener := NewListener(cfg.dsn(), cfg.Listener, channels, log)
	ends, err := watch(listener, cfg, e.Lookup, log)
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
		log.Error("stopped", "abandoned", abandoned)
		return cli.Failed
	}
	log.Info("stopped")
	return cli.OK
}

// load reads the configuration and makes the handlers. It returns every problem at once, one error each.
func load(e cli.Env) (*Config, []Channel, *slog.Logger, []error) {
	handlers, modes := addHandlers(handlerTable()), modes()
	cfg, problems := loadConfig(e.Lookup, handlers, modes)
	log := logs.New(cfg.Log, e.Stderr)
	channels, wrong := makeChannels(cfg, handlers, modes, log)
	return cfg, channels, log, append(problems, wrong...)
}

func printUsage(_ context.Context, e cli.Env) int {
	fmt.Fprint(e.Stdout, `pglistener listens on PostgreSQL channels and hands each payload to the handler of its channel.

  CHANNELS=orders,jobs=doorbell:log DATABASE_URL=postgres://... pglistener

Flags:
`)
	cli.Print(e.Stdout, commands())
	fmt.Fprintf(e.Stdout, "\nCHANNELS has the modes %s and the handlers %s.\n\nVariables, with default and meaning:\n",
		strings.Join(sortedKeys(modes()), ", "), strings.Join(sortedKeys(addHandlers(handlerTable())), ", "))
	config.Print(e.Stdout, &Config{})
	return cli.OK
}

func printVersion(_ context.Context, e cli.Env) int {
	fmt.Fprintln(e.Stdout, "pglistener", version())
	return cli.OK
}

// version is the module's version, or the commit it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version + " " + info.GoVersion
}
