// Package pipe is the handler pipe:PROGRAM [ARG...]: it starts a program once, writes it a line of JSON for each notification, and
// reads its answers, a line of JSON each, in any order.
package pipe

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/proc"
	"github.com/pglistener/pglistener/internal/retry"
)

// handler gives the notifications of a channel to a program, which it keeps running.
type handler struct {
	path        string
	args        []string
	environ     []string
	concurrency int
	setup       notify.Setup
	backoff     retry.Backoff  // between starts that come to nothing: no answer, and a short life or one that hung
	idle        chan struct{}  // capacity 1: see settle
	noise       retry.Failures // lines that are no answers; owned by the one goroutine that reads

	mu       sync.Mutex       // guards what follows
	items    map[string]*item // one for each call of Handle that waits, by id
	waiting  []*item          // those that are not in flight, in the order of their calls
	suspects map[*item]bool   // those in flight, and not alone, when a program died; while there are any, one at a time is in flight
	calls    uint64           // of Handle, ever
	program  *program         // nil while none runs
	began    time.Time        // when it was started
	down     string           // why the last one ended; only keep changes it
	hung     bool             // that was because it did not answer
	kept     chan struct{}    // closed when keep returns; nil while it does not run
	failed   int              // starts in a row that came to nothing
	ended    bool             // by Run: a program is only started for what still comes, and runs no longer than that

	starts, answers, notUnderstood uint64 // since the start
}

// item is a notification that waits for an answer.
type item struct {
	n       notify.Notification
	id      string
	sendBy  time.Time  // later it has too little time left
	result  chan error // capacity 1; what Handle returns, once the item has left handler.items
	program *program   // to which it was sent; nil while it waits
	offset  int64      // where its line begins in all that was written to the program
	late    error      // what Handle returns, unless it was to blame, when its context has ended while it was in flight
}

// New makes the handler of a command, a program and its arguments, of which at most concurrency notifications are in flight. Run starts the
// program, or the first call of Handle. It has Setup.Grace to end once its stdin is closed, and as long after SIGTERM.
func New(command string, programs proc.Settings, concurrency int, s notify.Setup) (notify.Handler, error) {
	path, args, err := proc.Program("pipe", command)
	if err != nil {
		return nil, err
	}
	return &handler{
		path: path, args: args, concurrency: max(1, concurrency), setup: s, idle: make(chan struct{}, 1),
		items: map[string]*item{}, suspects: map[*item]bool{},
		environ: append(programs.Environ(), "PGLISTENER_CHANNEL="+s.Channel), // never empty, which os/exec takes for all of ours
		backoff: retry.Backoff{Min: 100 * time.Millisecond, Max: 10 * time.Second},
	}, nil
}

// Handle sends n to the program and returns its answer. When the program dies, n is sent again to the next one, unless n was to
// blame.
//
// When ctx ends while n is in flight, the program is stopped, and Handle returns once it has ended, after Setup.Grace at the
// latest, so that n is never handled twice at once; the others that were in flight are sent again. But nothing is sent that has
// less than half of its time left, for each that is cut short stops the program for all: when n has waited that long for a program
// that runs, or for its turn after one has died, Handle returns that the program is unavailable.
func (h *handler) Handle(ctx context.Context, n notify.Notification) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	it := &item{n: n, id: strings.ToValidUTF8(n.ID(), "\ufffd"), result: make(chan error, 1)}
	if deadline, ok := ctx.Deadline(); ok {
		it.sendBy = deadline.Add(-time.Until(deadline) / 2)
	}
	h.mu.Lock()
	if h.items[it.id] != nil { // both would be answered in the same words
		h.mu.Unlock()
		return notify.RetryAfter(fmt.Errorf("%s: %s is in flight already", h.path, it.id), time.Second)
	}
	h.calls++
	h.items[it.id] = it
	h.waiting = append(h.waiting, it)
	kept, last := h.keepRunning(), h.ended
	h.send()
	h.mu.Unlock()
	var err error
	select {
	case err = <-it.result:
	case <-ctx.Done():
		err = h.expire(ctx, it)
	}
	if last { // nobody else would wait until the program has ended
		select {
		case <-kept:
		case <-ctx.Done():
		}
	}
	return err
}

// expire returns what Handle does when ctx has ended. It stops a program that has not answered in time: to blame is what that was
// given first of all that it has not answered, for it may not have come to the rest.
func (h *handler) expire(ctx context.Context, it *item) error {
	h.mu.Lock()
	cause, p := context.Cause(ctx), it.program
	err := h.notSent(cause)
	if p != nil {
		err = fmt.Errorf("%s: no answer: %w", h.path, cause)
	}
	if ctx.Err() == context.DeadlineExceeded { // otherwise the process ends, which says nothing of the program
		err = notify.Unavailable(err)
	}
	switch {
	case h.items[it.id] != it: // it was answered just now
	case p == nil:
		h.finish(it, err)
	default:
		it.late = err
		if p.hung == nil {
			p.hung, p.culprit, p.closed = cause, p.sent[0], true
			p.stop()
		}
	}
	h.mu.Unlock()
	return <-it.result // bury writes it at the latest
}

// notSent is the error of an item that was not in flight when its time was over. h.mu is held.
func (h *handler) notSent(cause error) error {
	if h.down == "" {
		return fmt.Errorf("%s: not sent: %w", h.path, cause)
	}
	return fmt.Errorf("%s: not sent: %w; the program %s", h.path, cause, h.down)
}

// send sends what waits, as far as it may be in flight and few bytes wait to be written. h.mu is held.
func (h *handler) send() {
	for p := h.program; p != nil && !p.closed && len(h.waiting) > 0 && len(p.out) < mostQueued; {
		if n := len(p.sent); n >= h.concurrency || n > 0 && len(h.suspects) > 0 {
			return
		}
		it := h.waiting[0]
		if !it.sendBy.IsZero() && time.Now().After(it.sendBy) {
			h.finish(it, notify.Unavailable(h.notSent(errors.New("half of its time has passed")))) // and goes on to send
			continue
		}
		h.waiting[0] = nil // release it
		h.waiting = h.waiting[1:]
		p.sent = append(p.sent, it)
		it.program, it.offset = p, p.queued
		before := len(p.out)
		p.out = appendRequest(p.out, it.id, &it.n)
		p.queued += int64(len(p.out) - before)
		retry.Nudge(p.wake)
	}
}

// finish has Handle return err for an item. h.mu is held.
func (h *handler) finish(it *item, err error) {
	delete(h.items, it.id)
	delete(h.suspects, it)
	from := &h.waiting
	if it.program != nil {
		from = &it.program.sent
	}
	*from = slices.DeleteFunc(*from, func(other *item) bool { return other == it })
	it.result <- err
	h.send()
	h.settle()
}

// bury says what becomes of the items that a program has not answered, now that it has ended; last is the last line of its stderr. When one of several was to blame for
// its end, they become suspects, to be sent one at a time. What the program has not even begun to read is never to blame.
func (h *handler) bury(p *program, last string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.program, h.hung, h.down = nil, p.hung != nil, p.ending(); last != "" && h.setup.LogPayloads {
		h.down += ", and said " + strconv.Quote(strings.ToValidUTF8(notify.Cut(last, 200), "?"))
	}
	n := 0
	for n < len(p.sent) && p.sent[n].offset < p.consumed {
		n++
	}
	seen, culprit := p.sent[:n], (*item)(nil)
	switch {
	case p.hung != nil && slices.Contains(seen, p.culprit):
		culprit = p.culprit
	case p.hung != nil, p.retired(): // it may end itself at any time, and has made progress
	case n == 1:
		culprit = seen[0]
	default:
		for _, it := range seen {
			h.suspects[it] = true
		}
	}
	if culprit != nil { // the others are acquitted
		clear(h.suspects)
	}
	var again []*item
	for _, it := range slices.Clone(p.sent) {
		switch {
		case it == culprit:
			h.finish(it, fmt.Errorf("%s: no answer: %w", h.path, cmp.Or(p.hung, errors.New("the program "+h.down))))
		case it.late != nil:
			h.finish(it, it.late)
		default:
			it.program = nil
			again = append(again, it)
		}
	}
	h.waiting = append(again, h.waiting...)
}

// Ready implements notify.Readier.
func (h *handler) Ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.failed < hopeless || h.program != nil && !h.hung && time.Since(h.began) > h.backoff.Max {
		return nil
	}
	return fmt.Errorf("its program does not stay: %s %s", h.path, h.down)
}

// Stats implements notify.Meter.
func (h *handler) Stats() []notify.Stat {
	h.mu.Lock()
	defer h.mu.Unlock()
	return []notify.Stat{
		{Name: "pglistener_pipe_restarts_total", Kind: "counter", Help: "Starts of the program of a pipe after the first.", Value: float64(max(h.starts, 1) - 1)},
		{Name: "pglistener_pipe_not_understood_total", Kind: "counter", Help: "Lines on the stdout of a pipe's program that were no answers.", Value: float64(h.notUnderstood)},
	}
}
