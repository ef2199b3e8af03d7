package pipe

import (
	"context"
	"log/slog"
	"time"

	"github.com/pglistener/pglistener/internal/proc"
	"github.com/pglistener/pglistener/internal/retry"
)

// quiet is how long nothing must have been in flight for Run to believe, after stop, that all is done.
const quiet = 100 * time.Millisecond

// Run implements notify.Runner: it starts the program, and closes its stdin when stop has ended and nothing has come for a moment.
// What comes later still starts the program once more, for as long as it takes.
func (h *handler) Run(stop, quit context.Context) {
	h.mu.Lock()
	kept := h.keepRunning()
	h.mu.Unlock()
	defer context.AfterFunc(quit, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.program != nil {
			h.program.stop()
		}
	})()
	<-stop.Done()
	for idle, calls := false, uint64(0); !idle && retry.Sleep(quit, quiet); {
		h.mu.Lock()
		idle, calls = len(h.items) == 0 && h.calls == calls, h.calls
		h.mu.Unlock()
	}
	h.mu.Lock()
	h.ended = true
	h.settle()
	h.mu.Unlock()
	<-kept // which does not take long once quit has ended, and all calls of Handle with it
}

// keepRunning has keep run. It returns the channel that is closed when keep returns. h.mu is held.
func (h *handler) keepRunning() <-chan struct{} {
	if h.kept == nil {
		h.kept = make(chan struct{})
		go h.keep(h.kept)
	}
	return h.kept
}

// settle ends what is not needed any more, once Run has ended: it closes the program's stdin, or ends the pause before the next
// start. h.mu is held.
func (h *handler) settle() {
	if !h.ended || len(h.items) > 0 || h.kept == nil {
		return
	}
	retry.Nudge(h.idle)
	if p := h.program; p != nil && !p.shut {
		p.closed, p.shut = true, true
		_ = p.stdin.Close()
		time.AfterFunc(h.setup.Grace, p.stop)
	}
}

// hopeless is how many starts in a row come to nothing until somebody has to look.
const hopeless = 4

// keep starts the program whenever it has ended, for as long as it is needed, and closes done.
func (h *handler) keep(done chan struct{}) {
	defer close(done)
	var failures retry.Failures
	for h.needed() {
		began := time.Now()
		stderr := &proc.Output{Log: h.setup.Log, Stream: "stderr"}
		p, err := h.launch(h.read, stderr)
		if err == nil {
			h.mu.Lock()
			h.program, h.starts, h.began = p, h.starts+1, began
			p.background.Go(func() { h.write(p) })
			h.send()
			h.settle()
			h.mu.Unlock()
			p.wait(h.setup.Grace)
			stderr.Flush()
			h.bury(p, stderr.Last)
		} else {
			h.mu.Lock()
			h.down = "cannot be started: " + err.Error()
			h.mu.Unlock()
		}
		if p != nil && p.shut {
			continue
		}
		h.mu.Lock()
		if h.failed++; p != nil && (p.answers > 0 || p.hung == nil && time.Since(began) > h.backoff.Max) {
			h.failed = 0
		}
		wait, kind := h.backoff.After(h.failed), h.down
		h.mu.Unlock()
		if p != nil {
			kind = p.ending() // without what it said, which may be new each time
		}
		if _, shouldLog := failures.Count(kind); shouldLog {
			h.report(p, wait)
		}
		select {
		case <-h.idle:
		case <-time.After(wait):
		}
	}
}

// needed says whether a program is to run. If not, keep ends.
func (h *handler) needed() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended && len(h.items) == 0 {
		h.kept = nil
		return false
	}
	return true
}

// report logs why the program is started again; p is nil if it was not even started.
func (h *handler) report(p *program, wait time.Duration) {
	h.mu.Lock()
	mute, starts, level := h.answers+h.notUnderstood == 0, h.starts, slog.LevelWarn
	if h.failed >= hopeless {
		level = slog.LevelError
	}
	h.mu.Unlock()
	attrs := []any{"program", h.path, "why", h.down, "starts", starts, "again_in", wait.Round(time.Millisecond)}
	switch {
	case p == nil:
	case p.retired():
		level = slog.LevelInfo
	case p.hung != nil && mute && p.consumed > 0:
		attrs = append(attrs, "hint", "nothing has ever been answered: a program whose stdout is a pipe must flush it after each answer, with print(..., flush=True) in Python or fflush(stdout) in C; console.log of Node does so")
	case p.hung != nil && p.consumed == 0:
		attrs = append(attrs, "hint", "it has not read from its stdin")
	}
	h.setup.Log.Log(context.Background(), level, "the program of the pipe is started again", attrs...)
}
