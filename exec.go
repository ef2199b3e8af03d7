package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// execHandler runs a program for each notification. There is
// no shell, and the payload goes to stdin only, so no payload can become a command.
type execHandler struct {
	path string
	args []string
	env  env
}

// newExec takes "PROGRAM [ARG...]", split on blanks.
func newExec(arg string, e env) (Handler, error) {
	words := strings.Fields(arg)
	if len(words) == 0 {
		return nil, errors.New("exec needs a program: exec:PROGRAM [ARG...]")
	}
	path, err := exec.LookPath(words[0])
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return nil, fmt.Errorf("program %q is not in PATH", words[0])
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("program %q does not exist", words[0])
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("program %q may not be executed; try chmod +x", words[0])
	case err != nil:
		return nil, fmt.Errorf("program %q: %w", words[0], err)
	}
	return &execHandler{path: path, args: words[1:], env: e}, nil
}

// Handle runs the program and returns an error unless it exits with 0. When ctx
// ends, the whole process group is asked to end with SIGTERM and killed after a
// grace period; then, and only then, Handle returns. What the program leaves
// running in its group is killed too, so that two runs never overlap.
func (p *execHandler) Handle(ctx context.Context, n Notification) error {
	cmd := exec.CommandContext(ctx, p.path, p.args...)
	cmd.Env = append(os.Environ(),
		"PGLISTENER_CHANNEL="+n.Channel,
		"PGLISTENER_ID="+n.ID(),
		"PGLISTENER_PID="+strconv.Itoa(n.PID),
		"PGLISTENER_ATTEMPT="+strconv.Itoa(n.Attempt),
	)
	cmd.Stdin = strings.NewReader(n.Payload) // a program that does not read it is no error to os/exec
	stdout := &lineLogger{log: p.env.log, stream: "stdout"}
	stderr := &lineLogger{log: p.env.log, stream: "stderr"}
	defer stdout.flush()
	defer stderr.flush()
	cmd.Stdout, cmd.Stderr = stdout, stderr
	ownGroup(cmd)
	cmd.Cancel = func() error { return terminateGroup(cmd.Process) }
	cmd.WaitDelay = p.env.cfg.killGrace()

	err := cmd.Run()
	if cmd.Process != nil {
		killGroup(cmd.Process)
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		// It exited with 0, but a child of its own kept its output open.
		p.env.log.Warn("program left processes behind; they were killed", "program", p.path)
		return nil
	}
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%s: stopped: %w", p.path, context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.path, err)
	}
	return nil
}

// killGrace is how long a program may take to end after SIGTERM. It fits into
// SHUTDOWN_TIMEOUT together with the work that is to be finished.
func (c *Config) killGrace() time.Duration { return min(2*time.Second, c.ShutdownTimeout/4) }

// maxLine is where a line of a program's output is cut: more would be held in memory.
const maxLine = 8 << 10

// lineLogger logs what is written to it, line by line. os/exec writes to it from one goroutine.
type lineLogger struct {
	log    *slog.Logger
	stream string
	line   []byte
	cut    bool // the line was longer than maxLine; the rest is skipped
}

func (l *lineLogger) Write(p []byte) (int, error) {
	written := len(p)
	for len(p) > 0 {
		part, rest, complete := bytes.Cut(p, []byte("\n"))
		room := maxLine - len(l.line)
		if len(part) > room {
			part, l.cut = part[:room], true
		}
		l.line = append(l.line, part...)
		if complete {
			l.end()
		}
		p = rest
	}
	return written, nil
}

// flush logs a last line that has no newline.
func (l *lineLogger) flush() {
	if len(l.line) > 0 {
		l.end()
	}
}

func (l *lineLogger) end() {
	attrs := []any{"stream", l.stream, "line", string(bytes.TrimSuffix(l.line, []byte("\r")))}
	if l.cut {
		attrs = append(attrs, "cut_at", maxLine)
	}
	l.log.Info("output", attrs...)
	l.line, l.cut = l.line[:0], false
}
