// Pglistener listens on PostgreSQL channels and hands each payload to the
// handler registered for its channel. It is configured by environment variables;
// -h prints them. Exit codes: 0 after a requested stop with nothing left undone,
// 1 when it failed or had to abandon notifications, 2 for a configuration that cannot work.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
)

const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// The first signal stops in order; from then on a second one ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// run is the program: it returns the exit code once ctx has ended and everything is tidied up.
func run(ctx context.Context, args []string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("pglistener", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { usage(stderr) }
	help := flags.Bool("h", false, "print the variables")
	check := flags.Bool("check", false, "try everything once")
	schema := flags.Bool("outbox-schema", false, "print the SQL of the outbox") // feature: outbox
	healthy := flags.Bool("healthy", false, "ask the running listener")         // feature: health
	version := flags.Bool("version", false, "print the version")
	if err := flags.Parse(args); err != nil {
		return exitUsage
	}
	switch {
	case *help:
		usage(stdout)
		return exitOK
	case *version:
		fmt.Fprintln(stdout, "pglistener", buildVersion())
		return exitOK
	case *schema: // feature: outbox
		return printSchema(lookup, stdout, stderr) // feature: outbox
	case *healthy: // feature: health
		return askHealth(lookup, stdout) // feature: health
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "pglistener: unexpected argument %q: everything is set by environment variables; see pglistener -h\n", flags.Arg(0))
		return exitUsage
	}

	table := allHandlers()
	cfg, problems := loadConfig(lookup, table)
	log := cfg.logger(stderr)
	listener, err := NewListener(cfg, table, newSupervisor(lookup, log), log)
	if err != nil {
		problems = append(problems, split(err)...)
	}
	if *check {
		return runCheck(ctx, cfg, listener, problems, stdout)
	}
	if len(problems) > 0 {
		for _, p := range problems {
			fmt.Fprintln(stderr, "pglistener:", p)
		}
		return exitUsage
	}

	for _, w := range cfg.warnings() {
		log.Warn(w)
	}
	log.Info("starting", "version", buildVersion(), "pid", os.Getpid())
	if closeHealth, err := startHealth(cfg.HTTPAddr, listener, log); err != nil { // feature: health
		fmt.Fprintln(stderr, "pglistener:", err) // feature: health
		return exitFailed                        // feature: health
	} else { // feature: health
		defer closeHealth() // feature: health
	} // feature: health
	abandoned, err := listener.Run(ctx)
	if err != nil {
		fmt.Fprintln(stderr, "pglistener:", explain(err))
		return exitFailed
	}
	if abandoned > 0 {
		log.Error("stopped", "abandoned", abandoned)
		return exitFailed
	}
	log.Info("stopped")
	return exitOK
}

// allHandlers is the table of handler.go, and the handlers that a team may not want. To do without
// a feature delete its files and the lines that are marked with its name in this file.
func allHandlers() map[string]newHandler {
	table := handlerTable()
	table["outbox"] = outboxes()                                            // feature: outbox
	table["http"], table["https"] = newWebhook("http"), newWebhook("https") // feature: webhook
	return table
}

func usage(w io.Writer) {
	fmt.Fprint(w, `pglistener listens on PostgreSQL channels and hands each payload to the handler of its channel.

  CHANNELS=orders,jobs=doorbell:exec:./drain DATABASE_URL=postgres://... pglistener

Flags:
  -check    try everything once, print one line per check, exit with 0 or 1
  -h        print this
  -healthy  ask the listener at HTTP_ADDR whether it is ready, and exit with 0 or 1
  -outbox-schema
            print the SQL that makes OUTBOX_TABLE, for psql or a migration
  -version  print the version

Variables, with default and meaning:
`)
	printVariables(w)
}

// buildVersion is the module's version, or the commit it was built from.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	version := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && (version == "" || version == "(devel)") {
			version = s.Value
		}
	}
	return version + " " + info.GoVersion
}

// split takes a joined error apart.
func split(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}
