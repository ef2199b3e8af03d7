// Package cli finds out what the command line asks for. Everything else is set by the environment.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strings"

	"github.com/pglistener/pglistener/internal/env"
)

// The exit codes.
const (
	OK     = 0 // done; after a requested stop: with nothing left undone
	Failed = 1 // it failed, or had to abandon notifications
	Usage  = 2 // a command line or a configuration that cannot work
)

// Env is what a command works with.
type Env struct {
	Lookup         func(name string) (string, bool) // os.LookupEnv, or a map in tests
	Stdout, Stderr io.Writer
	Operands       []string // what follows the flag on the command line
}

// Fail prints err, a line for each of those that are joined in it, and returns the exit code: that of success without one.
func (e Env) Fail(err error, code int) int {
	if err == nil {
		return OK
	}
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintln(e.Stderr, "pglistener:", strings.TrimSuffix(line, "\n"))
	}
	return code
}

// Command is something that the program can do. Run returns the exit code.
type Command struct {
	Flags    string // that ask for it, comma-separated; "" is the command without any
	Operands string // what may follow, for -h; "" if nothing may
	Usage    string // one line
	Run      func(ctx context.Context, e Env) int
}

// Parse returns the command that args ask for, and what follows its flag. No error shows an argument that is no flag, nor the
// value of one: a connection string may hold a password.
func Parse(args []string, commands []Command) (c Command, operands []string, err error) {
	name, unexpected := "", errors.New("unexpected argument: everything is set by environment variables; see pglistener --help")
	if len(args) > 0 {
		var hasValue bool
		name, _, hasValue = strings.Cut(args[0], "=")
		if !strings.HasPrefix(name, "-") || hasValue || strings.ContainsAny(name, ":@/0123456789") { // as in -pPASSWORD
			return Command{}, nil, unexpected
		}
		operands = args[1:]
	}
	for _, c := range commands {
		for _, flag := range strings.Split(c.Flags, ", ") {
			if strings.TrimLeft(flag, "-") != strings.TrimLeft(name, "-") {
				continue
			}
			if c.Operands == "" && len(operands) > 0 {
				return Command{}, nil, unexpected
			}
			return c, operands, nil
		}
	}
	return Command{}, nil, fmt.Errorf("unknown flag %q; see pglistener --help", name)
}

// Help writes what -h says: the flags, what CHANNELS may name, and the variables of config, and of channel, which may be set for a
// channel alone. Both are pointers to structs, as package env has them.
func Help(w io.Writer, commands []Command, modes, handlers []string, config, channel any) {
	fmt.Fprint(w, `pglistener listens on PostgreSQL channels and hands each payload to the handler of its channel.

  CHANNELS=orders,jobs=doorbell:log DATABASE_URL=postgres://... pglistener

Flags:
`)
	for _, c := range commands {
		switch {
		case c.Operands != "":
			fmt.Fprintf(w, "  %s %s\n  %-15s %s\n", c.Flags, c.Operands, "", c.Usage)
		case c.Flags != "":
			fmt.Fprintf(w, "  %-15s %s\n", c.Flags, c.Usage)
		}
	}
	fmt.Fprintf(w, "\nCHANNELS has the modes %s and the handlers %s.\n\nVariables, with default and meaning:\n",
		strings.Join(modes, ", "), strings.Join(handlers, ", "))
	env.Print(w, config, channel)
	fmt.Fprint(w, "\nVariables of channels, which may be set for one alone, as ORDERS_CONCURRENCY for orders;\nand ORDERS_HANDLER=[MODE:]HANDLER for what CHANNELS says of it otherwise:\n")
	env.Print(w, channel, &struct{}{})
}

// Version is the module's version, or the commit it was built from, and Go's.
func Version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version + " " + info.GoVersion
	}
	return "unknown"
}
