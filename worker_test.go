package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// testWorker is a worker on its own: what it does needs no server.
type testWorker struct {
	*worker
	*logs
	quit context.CancelCauseFunc
}

func newTestWorker(t *testing.T, h Handler, doorbell bool, l limits) testWorker {
	t.Helper()
	if l.queue == 0 {
		l.queue = 1000
	}
	if l.attempts == 0 {
		l.attempts = 3
	}
	if l.concurrency == 0 {
		l.concurrency = 1
	}
	if l.timeout == 0 {
		l.timeout = patience
	}
	l.retry = backoff{min: time.Millisecond, max: 5 * time.Millisecond}
	quit, cancel := context.WithCancelCause(context.Background())
	t.Cleanup(func() { cancel(nil) })
	lg := newLogs(t)
	return testWorker{newWorker(quit, channelName(t), h, doorbell, l, testConfig(t, nil).logger(lg)), lg, cancel}
}

// testConfig is a valid configuration.
func testConfig(t *testing.T, more vars) *Config {
	t.Helper()
	cfg, problems := loadConfig(fast("postgres://localhost/x", "a", more).lookup, allHandlers())
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return cfg
}

// finish waits until nothing waits and nothing runs.
func (w testWorker) finish(t *testing.T) {
	t.Helper()
	select {
	case <-w.drained():
	case <-time.After(patience):
		t.Fatal("the worker did not finish")
	}
}

func (w testWorker) give(t *testing.T, payloads ...string) {
	t.Helper()
	for _, p := range payloads {
		if !w.offer(Notification{Channel: w.channel, Payload: p, PID: 1}) {
			t.Fatalf("%q was refused", p)
		}
	}
}

func TestFailedHandlerIsRetried(t *testing.T) {
	t.Parallel()
	var seen []string
	w := newTestWorker(t, HandlerFunc(func(_ context.Context, n Notification) error {
		seen = append(seen, fmt.Sprintf("%s%d", n.Payload, n.Attempt))
		if n.Payload == "a" && n.Attempt < 3 {
			return errors.New("not yet")
		}
		return nil
	}), false, limits{})
	w.give(t, "a", "b")
	w.finish(t)
	if got := strings.Join(seen, " "); got != "a1 a2 a3 b1" {
		t.Errorf("handled %s", got)
	}
	if n := len(w.all("handler failed")); n != 2 {
		t.Errorf("%d failures in the log", n)
	}
	if n := len(w.all("gave up")); n != 0 {
		t.Errorf("gave up %d times", n)
	}
}

// A receiver that drops repeats by id must see a repeat for what it is, and no other run for one.
func TestIDsAreOfOneRun(t *testing.T) {
	t.Parallel()
	var ids []string
	ran := make(chan struct{}, 1)
	w := newTestWorker(t, HandlerFunc(func(_ context.Context, n Notification) error {
		ids = append(ids, n.ID())
		if n.Attempt == 1 {
			return RetryAfter(errors.New("not yet"), time.Hour) // which is not waited for
		}
		ran <- struct{}{}
		return nil
	}), true, limits{})
	for range 2 {
		w.give(t, "")
		<-ran
	}
	w.finish(t)
	if len(ids) != 4 || ids[0] != ids[1] || ids[1] == ids[2] || ids[2] != ids[3] {
		t.Errorf("ids %v", ids)
	}
}

func TestGivingUpLeavesATrace(t *testing.T) {
	t.Parallel()
	w := newTestWorker(t, HandlerFunc(func(context.Context, Notification) error { return errors.New("never") }), false, limits{})
	w.give(t, "precious")
	w.finish(t)
	line := w.wait(t, "gave up", 1)
	for attr, want := range map[string]any{
		"level": "ERROR", "channel": w.channel, "payload": "precious", "error": "never", "attempts": 3.0,
	} {
		if line[attr] != want {
			t.Errorf("%s is %v, want %v", attr, line[attr], want)
		}
	}
}

func TestPanicIsSurvived(t *testing.T) {
	t.Parallel()
	var handled atomic.Int64
	w := newTestWorker(t, HandlerFunc(func(_ context.Context, n Notification) error {
		if n.Attempt == 1 {
			panic("boom")
		}
		handled.Add(1)
		return nil
	}), false, limits{})
	w.give(t, "a", "b")
	w.finish(t)
	if handled.Load() != 2 {
		t.Errorf("%d handled", handled.Load())
	}
	if line := w.wait(t, "handler panicked", 1); !strings.Contains(line["stack"].(string), "worker_test.go") {
		t.Errorf("the stack does not show where: %v", line)
	}
}

func TestHandlerTimeout(t *testing.T) {
	t.Parallel()
	const limit = 50 * time.Millisecond
	var attempts, quick atomic.Int64
	w := newTestWorker(t, HandlerFunc(func(ctx context.Context, n Notification) error {
		if n.Payload == "quick" {
			quick.Add(1)
			return ctx.Err()
		}
		began := time.Now()
		attempts.Add(1)
		<-ctx.Done()
		if took := time.Since(began); took < limit {
			t.Errorf("ended after %v, before its limit", took)
		}
		return ctx.Err()
	}), false, limits{timeout: limit})
	w.give(t, "quick", "hang", "quick", "hang", "quick")
	w.finish(t)
	if attempts.Load() != 6 || quick.Load() != 3 {
		t.Errorf("%d attempts to hang, %d quick ones", attempts.Load(), quick.Load())
	}
	if n := len(w.all("gave up")); n != 2 {
		t.Errorf("gave up %d times", n)
	}
}

func TestHandlerThatIgnoresItsContextIsTold(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	w := newTestWorker(t, HandlerFunc(func(context.Context, Notification) error {
		<-release
		return nil
	}), false, limits{timeout: 50 * time.Millisecond})
	w.give(t, "x")
	w.wait(t, "handler runs on after its time limit", 1)
	close(release)
	w.finish(t)
	_, c := w.stats()
	if c.handled != 1 {
		t.Errorf("%d handled: late is not failed", c.handled)
	}
}

func TestConcurrency(t *testing.T) {
	t.Parallel()
	const at, total = 4, 100
	var now, most atomic.Int64
	all := make(chan struct{})
	w := newTestWorker(t, HandlerFunc(func(context.Context, Notification) error {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		if n == at {
			select {
			case <-all:
			default:
				close(all)
			}
		}
		<-all // nobody leaves before so many are inside
		return nil
	}), false, limits{concurrency: at})
	for range total {
		w.give(t, "")
	}
	w.finish(t)
	if most.Load() != at {
		t.Errorf("%d at once, want %d", most.Load(), at)
	}
}

func TestOverflowDropCatchesUp(t *testing.T) {
	t.Parallel()
	c := &counter{}
	gate := make(chan struct{})
	h := &gated{counter: c, gate: gate}
	w := newTestWorker(t, h, false, limits{queue: 10, drop: true})
	for range 100 {
		w.give(t, "x")
	}
	w.wait(t, "queue full", 1)
	close(gate)
	line := w.wait(t, "queue drained", 1)
	w.finish(t)
	handled := c.handled.Load()
	if handled < 10 || handled > 11 || line["dropped"] != float64(100-handled) {
		t.Errorf("handled %d, and the log says %v dropped", handled, line["dropped"])
	}
	if c.caughtUp.Load() != 1 {
		t.Errorf("caught up %d times after the overflow", c.caughtUp.Load())
	}
	if len(w.all("queue full")) != 1 || len(w.all("queue drained")) != 1 {
		t.Error("one overflow is to be told once")
	}
}

// gated is a counter whose Handle waits for a gate.
type gated struct {
	*counter
	gate chan struct{}
}

func (g *gated) Handle(ctx context.Context, n Notification) error {
	<-g.gate
	return g.counter.Handle(ctx, n)
}

func TestAbandonedIsCountedAndLogged(t *testing.T) {
	t.Parallel()
	began := make(chan struct{}, 1)
	w := newTestWorker(t, HandlerFunc(func(ctx context.Context, _ Notification) error {
		began <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	}), false, limits{})
	w.give(t, "one", "two", "three")
	<-began
	w.quit(errShutdownTimeout)
	w.finish(t)
	w.give(t, "late")
	if n := w.abandonRest(); n != 4 {
		t.Errorf("%d abandoned, want 4", n)
	}
	var payloads []string
	for _, line := range w.all("abandoned") {
		payloads = append(payloads, line["payload"].(string))
		if line["error"] != errShutdownTimeout.Error() {
			t.Errorf("cause: %v", line["error"])
		}
	}
	if got := strings.Join(payloads, " "); got != "one late two three" { // one was under way, late came after the end
		t.Errorf("traces of %s", got)
	}
}

// script writes an executable shell script and returns an exec handler for it.
func script(t *testing.T, lines string) (Handler, *logs) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+lines+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(t, vars{"SHUTDOWN_TIMEOUT": "2s"}) // a grace period of 0.5 s
	lg := newLogs(t)
	h, err := newExec(path+" arg1  arg2", env{log: cfg.logger(lg), cfg: cfg})
	if err != nil {
		t.Fatal(err)
	}
	return h, lg
}

func TestExec(t *testing.T) {
	t.Parallel()
	h, lg := script(t, `echo "$#" "$1" "$2" "$PGLISTENER_CHANNEL" "$PGLISTENER_PID" "$PGLISTENER_ATTEMPT"
cat >&2
printf 'no newline'`)
	payload := "line one; $(exit 9)\n`line` \"two\""
	if err := h.Handle(t.Context(), Notification{Channel: "a b", Payload: payload, PID: 7, Attempt: 2}); err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	for _, line := range lg.all("output") {
		stream := line["stream"].(string)
		got[stream] = append(got[stream], line["line"].(string))
	}
	if s := strings.Join(got["stdout"], "|"); s != "2 arg1 arg2 a b 7 2|no newline" {
		t.Errorf("stdout: %s", s)
	}
	if s := strings.Join(got["stderr"], "\n"); s != payload {
		t.Errorf("stdin came back as %q", s)
	}
}

func TestExecFailures(t *testing.T) {
	t.Parallel()
	h, _ := script(t, "exit 3")
	if err := h.Handle(t.Context(), Notification{}); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("exit 3: %v", err)
	}
	h, _ = script(t, "exec true") // does not read its stdin
	if err := h.Handle(t.Context(), Notification{Payload: strings.Repeat("x", 1<<20)}); err != nil {
		t.Errorf("unread stdin: %v", err)
	}
}

func TestExecCutsLongLines(t *testing.T) {
	t.Parallel()
	h, lg := script(t, `head -c 10000000 /dev/zero | tr '\0' x; echo; echo short`)
	if err := h.Handle(t.Context(), Notification{}); err != nil {
		t.Fatal(err)
	}
	lines := lg.all("output")
	if len(lines) != 2 || len(lines[0]["line"].(string)) != maxLine || lines[0]["cut_at"] == nil || lines[1]["line"] != "short" {
		t.Errorf("%d lines", len(lines))
	}
}

// alive says whether a process with this pid is there and not a zombie.
func alive(pid string) bool {
	stat, err := os.ReadFile("/proc/" + strings.TrimSpace(pid) + "/stat")
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func TestExecIsStoppedWithItsChildren(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/stat"); err != nil {
		skip(t, "needs /proc to see processes")
	}
	for name, body := range map[string]string{
		"obedient":        `sleep 1000`,
		"ignores SIGTERM": `trap '' TERM; sleep 1000 & echo $! >> "$1"; while :; do sleep 1000; done`,
		"forks children":  `sleep 1000 & echo $! >> "$1"; sleep 1000 & echo $! >> "$1"; wait`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			pids := filepath.Join(dir, "pids")
			path := filepath.Join(dir, "script")
			if err := os.WriteFile(path, []byte("#!/bin/sh\necho $$ > \"$1\"\n"+body+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			cfg := testConfig(t, vars{"SHUTDOWN_TIMEOUT": "2s"})
			h, err := newExec(path+" "+pids, env{log: cfg.logger(newLogs(t)), cfg: cfg})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, errHandlerTimeout)
			defer cancel()
			began := time.Now()
			err = h.Handle(ctx, Notification{})
			if !errors.Is(err, errHandlerTimeout) {
				t.Errorf("error: %v", err)
			}
			if took := time.Since(began); took > 300*time.Millisecond+cfg.killGrace()+5*time.Second {
				t.Errorf("took %v", took)
			}
			data, err := os.ReadFile(pids)
			if err != nil {
				t.Fatal(err)
			}
			for _, pid := range strings.Fields(string(data)) {
				eventually(t, "process "+pid+" is still there", func() bool { return !alive(pid) })
			}
		})
	}
}

func TestExecKillsWhatItLeavesBehind(t *testing.T) {
	t.Parallel()
	h, lg := script(t, `sleep 1000 & echo $!`)
	if err := h.Handle(t.Context(), Notification{}); err != nil {
		t.Errorf("a program that exits with 0 has not failed: %v", err)
	}
	pid := lg.wait(t, "output", 1)["line"].(string)
	eventually(t, "the child still runs", func() bool { return !alive(pid) })
	lg.wait(t, "program left processes behind", 1)
}

func TestFifo(t *testing.T) {
	var q fifo
	next, want := 0, 0
	for round := range 200 {
		for range round % 37 {
			q.push(Notification{PID: next})
			next++
		}
		for range min(round%23, q.len()) {
			if got := q.pop().PID; got != want {
				t.Fatalf("popped %d, want %d", got, want)
			}
			want++
		}
	}
	for q.len() > 0 {
		if got := q.pop().PID; got != want {
			t.Fatalf("popped %d, want %d", got, want)
		}
		want++
	}
	if next != want {
		t.Fatalf("pushed %d, popped %d", next, want)
	}
}

func TestBackoff(t *testing.T) {
	b := backoff{min: 100 * time.Millisecond, max: 2 * time.Second}
	if b.after(0) != 0 {
		t.Error("a wait after no failure")
	}
	for n := 1; n < 100; n++ {
		full := b.max
		if n < 6 {
			full = min(full, b.min<<(n-1))
		}
		for range 100 {
			if d := b.after(n); d < full/2 || d > full {
				t.Fatalf("after %d failures: %v, want between %v and %v", n, d, full/2, full)
			}
		}
	}
}
