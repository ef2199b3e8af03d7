// Package execcmd is the handler exec:PROGRAM [ARG...]: it runs a program for each notification.
package execcmd

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/proc"
)

// handler runs a program for each notification. There is no shell, and the payload goes to stdin only, so no payload can become a
// command.
type handler struct {
	path    string
	args    []string
	environ []string // besides the notification's
	setup   notify.Setup
}

// New makes the handler of a command, a program and its arguments.
func New(command string, programs proc.Settings, s notify.Setup) (notify.Handler, error) {
	path, args, err := proc.Program("exec", command)
	if err != nil {
		return nil, err
	}
	return &handler{path: path, args: args, environ: programs.Environ(), setup: s}, nil
}

// Handle runs the program and returns an error unless it exits with 0. 65 is permanent, 69 and 75 say that what it depends on is
// unavailable. When ctx ends, the whole process group is asked to end with SIGTERM and killed after a grace period; then, and
// only then, Handle returns. What the program leaves running in its group is killed too, so that two runs never overlap.
func (h *handler) Handle(ctx context.Context, n notify.Notification) error {
	cmd := proc.Command(ctx, h.setup.Grace, h.path, h.args...)
	cmd.Env = append(h.environ[:len(h.environ):len(h.environ)],
		"PGLISTENER_CHANNEL="+n.Channel, "PGLISTENER_ID="+n.ID(), "PGLISTENER_PID="+strconv.Itoa(n.PID), "PGLISTENER_ATTEMPT="+strconv.Itoa(n.Attempt),
		"PGLISTENER_CREATED_AT="+proc.Stamp(n.CreatedAt), "PGLISTENER_RUN_AT="+proc.Stamp(n.RunAt))
	cmd.Stdin = strings.NewReader(n.Payload) // a program that does not read it is no error to os/exec
	stdout, stderr := &proc.Output{Log: h.setup.Log, Stream: "stdout"}, &proc.Output{Log: h.setup.Log, Stream: "stderr"}
	defer stdout.Flush()
	defer stderr.Flush()
	cmd.Stdout, cmd.Stderr = stdout, stderr

	err := cmd.Run()
	proc.KillGroup(cmd)
	switch {
	case errors.Is(err, exec.ErrWaitDelay):
		// It exited with 0, but a child of its own kept its output open.
		h.setup.Log.Warn("program left processes behind; they were killed", "program", h.path)
		return nil
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s: stopped: %w", h.path, context.Cause(ctx))
	}
	err = fmt.Errorf("%s: %w", h.path, err)
	switch cmd.ProcessState.ExitCode() { // of sysexits.h; -1 if it has not been started
	case 65: // EX_DATAERR: the payload is wrong and always will be
		return notify.Permanent(err)
	case 69, 75: // EX_UNAVAILABLE, EX_TEMPFAIL: what the program depends on is away
		return notify.Unavailable(err)
	}
	return err
}
