package pipe

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/proc"
)

// program is a process that runs, or has run.
type program struct {
	cmd  *exec.Cmd
	stop context.CancelFunc // begins to end it, as proc.Command says

	stdin, stdout, stderr *os.File       // our ends
	theirStdin            *os.File       // theirs, to find what it has not read
	exited                chan struct{}  // closed when the process has ended
	wake                  chan struct{}  // capacity 1: something is to be written
	background            sync.WaitGroup // the goroutines that read and write

	// These are owned by the handler's mutex.
	out     []byte  // not yet written
	queued  int64   // bytes given to out, ever
	sent    []*item // not answered, in the order in which they were sent
	answers uint64  // understood
	closed  bool    // nothing more is sent to it
	shut    bool    // its stdin was closed because it is no longer needed
	hung    error   // why it was stopped: what ended the context of an item in flight
	culprit *item   // of what was in flight then, what was sent first

	// These are written by the goroutines in background, and read when those have ended.
	written int64 // bytes
	deaf    bool  // it was stopped because it had closed its stdout

	consumed int64 // of the written bytes, those that it has read; known when it has ended
}

// launch starts the program. What it writes to stderr goes to stderr. Call wait next.
func (h *handler) launch(read func(*program), stderr io.Writer) (*program, error) {
	ctx, stop := context.WithCancel(context.Background())
	p := &program{stop: stop, exited: make(chan struct{}), wake: make(chan struct{}, 1)}
	p.cmd = proc.Command(ctx, h.setup.Grace, h.path, h.args...)
	p.cmd.Env = h.environ
	// os/exec's own pipes would have Wait wait for whoever has inherited them.
	var theirs [2]*os.File
	var errs [3]error
	p.theirStdin, p.stdin, errs[0] = os.Pipe()
	p.stdout, theirs[0], errs[1] = os.Pipe()
	p.stderr, theirs[1], errs[2] = os.Pipe()
	err := errors.Join(errs[:]...)
	if err == nil {
		p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = p.theirStdin, theirs[0], theirs[1]
		err = p.cmd.Start()
	}
	_, _ = theirs[0].Close(), theirs[1].Close() // of a nil File it is an error, and no more
	if err != nil {
		stop()
		p.close()
		return nil, err
	}
	p.background.Go(func() { read(p) })
	p.background.Go(func() { _, _ = io.Copy(stderr, p.stderr) })
	return p, nil
}

func (p *program) close() {
	for _, f := range []*os.File{p.stdin, p.theirStdin, p.stdout, p.stderr} {
		_ = f.Close()
	}
}

// wait waits until the program has ended, and ends what it has left behind. Afterwards all that it has written has been read.
func (p *program) wait(grace time.Duration) {
	_ = p.cmd.Wait() // ProcessState says more
	close(p.exited)
	proc.KillGroup(p.cmd)
	p.stop()
	_ = p.stdin.Close() // ends a write to a full pipe
	// What has left the group may hold the pipes open.
	_ = p.stdout.SetReadDeadline(time.Now().Add(grace))
	_ = p.stderr.SetReadDeadline(time.Now().Add(grace))
	p.background.Wait()
	unread, _ := io.Copy(io.Discard, p.theirStdin)
	p.consumed = p.written - unread
	p.close()
}

// ending is how the program has ended, for an error.
func (p *program) ending() string {
	switch {
	case p.hung != nil:
		return "was stopped because it did not answer in time"
	case p.deaf:
		return "was stopped because it had closed its stdout"
	}
	return "ended: " + p.cmd.ProcessState.String()
}

// retired says whether the program has ended by itself and in good order.
func (p *program) retired() bool {
	return p.answers > 0 && p.hung == nil && !p.deaf && p.cmd.ProcessState.Success()
}

// mostQueued is about how many bytes are held for a program: what waits beyond that is no line yet.
const mostQueued = 1 << 20

// write writes what has gathered since it has written last, until the program has ended.
func (h *handler) write(p *program) {
	for {
		select {
		case <-p.wake:
		case <-p.exited:
			return
		}
		h.mu.Lock()
		out := p.out
		p.out = nil
		h.send() // there is room again
		h.mu.Unlock()
		n, err := p.stdin.Write(out)
		p.written += int64(n)
		if err != nil {
			return
		}
	}
}
