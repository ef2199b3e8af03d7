package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
)

const (
	patience = 100 * time.Millisecond // how long a line waits before the writer counts as stuck
	room     = 64 << 10               // bytes of ordinary lines kept while it is stuck
)

// Writer writes whole lines to an io.Writer that may block for ever, without ever blocking for long itself. All methods may be
// called from any goroutine.
//
// A write(2) that blocks cannot be cancelled: an inherited stderr has no deadlines, and O_NONBLOCK would change it for everybody
// who shares it. So the writes are made by one goroutine, to which a caller hands its line and then waits with a bound. That
// costs 2 to 3 µs a line: two switches, which the scheduler mostly makes on the same thread, a timer and a channel. Cheaper would
// be a caller that writes for itself, but then the first one that finds the pipe full is lost, and it may be the listener's loop.
type Writer struct {
	out    io.Writer             // out and torn are used only by run's goroutine
	torn   bool                  // the last write ended within a line
	report func(n uint64) []byte // makes the line that tells of n dropped ones
	ended  chan struct{}         // closed when run has returned
	more   sync.Cond             // a line was queued, or closed was set; its lock is mu

	mu      sync.Mutex // guards what follows; never held during a write to out
	queue   []*line    // in the order of writing
	size    int        // bytes of ordinary lines that are queued or being written
	stuck   bool       // an ordinary line has waited in vain, and some are still unwritten
	closed  bool
	gapped  bool   // the queue has a line with gap set
	dropped uint64 // ordinary lines lost so far
	told    uint64 // those of them that a report has told of
}

// line is one line on its way to out.
type line struct {
	bytes []byte     // its own: a caller that has given up takes back what it gave, while it is written
	sure  bool       // its caller waits however long it takes
	gap   bool       // stands where lines were dropped; its bytes are made when its turn comes
	told  uint64     // of a gap: how many it tells of
	done  chan error // has room for the one result
}

// Write writes p, which is one whole line. It returns when the line has been written, or after 100 ms at the latest. Once a line
// has waited that long in vain, out counts as stuck until all such lines have been written, and Write returns at once: it keeps
// 64 kB of lines, and drops and counts what comes after them. When out takes lines again, it gets the kept ones in order, one
// that says how many were dropped, and then what follows. A line for which out returns an error is dropped too. Write always
// returns len(p) and nil.
func (w *Writer) Write(p []byte) (int, error) {
	l := &line{bytes: bytes.Clone(p), done: make(chan error, 1)}
	w.mu.Lock()
	stuck := w.stuck
	if w.closed || stuck && (w.gapped || w.size+len(p) > room) {
		w.dropped++
		w.markGap(len(w.queue))
		w.mu.Unlock()
		return len(p), nil
	}
	w.size += len(p)
	w.queue = append(w.queue, l)
	w.mu.Unlock()
	w.more.Signal()
	if stuck {
		return len(p), nil
	}
	select {
	case <-l.done:
		return len(p), nil
	case <-time.After(patience):
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(l.done) == 0 { // finish sends it under the lock
		w.stuck = true
	}
	return len(p), nil
}

// WriteContext writes p, which is one whole line and is never dropped nor counted as dropped: it waits until p has been written,
// in its turn, or ctx ends. It returns nil only if p has been written whole, the error of out, os.ErrClosed after Close, or an
// error that wraps the cause of ctx. In the last case p is not written later, unless its write had begun; that one line may then
// appear, and appears twice when the caller tries again.
func (w *Writer) WriteContext(ctx context.Context, p []byte) error {
	if ctx.Err() != nil {
		return notWritten(ctx)
	}
	l := &line{bytes: bytes.Clone(p), sure: true, done: make(chan error, 1)}
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return os.ErrClosed
	}
	w.queue = append(w.queue, l)
	w.mu.Unlock()
	w.more.Signal()
	select {
	case err := <-l.done:
		return err
	case <-ctx.Done():
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(l.done) > 0 { // finish sends it under the lock
		return <-l.done
	}
	w.queue = slices.DeleteFunc(w.queue, func(q *line) bool { return q == l })
	return notWritten(ctx)
}

func notWritten(ctx context.Context) error {
	return fmt.Errorf("stderr takes no lines: %w", context.Cause(ctx))
}

// Stats implements notify.Meter.
func (w *Writer) Stats() []notify.Stat {
	w.mu.Lock()
	defer w.mu.Unlock()
	return []notify.Stat{{Name: "pglistener_log_lines_dropped_total", Kind: "counter", Help: "Log lines that were dropped because stderr did not take them.", Value: float64(w.dropped)}}
}

// Close writes what is queued, with the report of lines dropped, and ends the Writer's goroutine; later lines are dropped. It waits
// for d at most and then returns an error; the goroutine ends when out has taken or refused what is queued. It does not close out.
func (w *Writer) Close(d time.Duration) error {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.more.Signal()
	select {
	case <-w.ended:
		return nil
	case <-time.After(d):
		return errors.New("stderr takes no lines")
	}
}

// run writes the lines until Close. It is the Writer's goroutine.
func (w *Writer) run() {
	defer close(w.ended)
	for l := w.next(); l != nil; l = w.next() {
		w.finish(l, w.put(l.bytes))
	}
}

// next waits for the next line; it returns nil when the Writer is closed and empty.
func (w *Writer) next() *line {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) == 0 {
		if w.closed {
			return nil
		}
		w.more.Wait()
	}
	l := w.queue[0]
	w.queue = slices.Delete(w.queue, 0, 1)
	if l.gap {
		l.told, w.told, w.gapped = w.dropped-w.told, w.dropped, false
		l.bytes = w.report(l.told)
		w.size += len(l.bytes)
	}
	return l
}

// put makes the write that may block.
func (w *Writer) put(p []byte) error {
	if w.torn { // a full disk, say, has taken half of the last line
		p = append([]byte{'\n'}, p...)
	}
	n, err := w.out.Write(p)
	if n > 0 {
		w.torn = p[n-1] != '\n'
	}
	return err
}

// finish notes what became of a line and tells its caller.
func (w *Writer) finish(l *line, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !l.sure {
		w.size -= len(l.bytes)
	}
	switch {
	case err == nil && w.dropped > w.told: // out takes lines again after errors
		w.markGap(0)
	case err != nil && l.gap:
		w.told -= l.told
	case err != nil && !l.sure:
		w.dropped++
	}
	w.stuck = w.stuck && w.size > 0
	l.done <- err
}

// markGap queues the report of the lines dropped, unless it is queued. While out is stuck Write drops what comes after it, so
// that it tells of all of them. mu is held.
func (w *Writer) markGap(at int) {
	if !w.gapped {
		w.gapped = true
		w.queue = slices.Insert(w.queue, at, &line{gap: true, done: make(chan error, 1)})
	}
}
