package queue

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/memory"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/retry"
)

// testQueue is a queue on its own: what it does needs no server.
type testQueue struct {
	*Queue
	*testkit.Logs
	cancel context.CancelCauseFunc
}

func newTestQueue(t *testing.T, h notify.Handler, o Options) testQueue {
	t.Helper()
	if o.Size == 0 {
		o.Size = 1000
	}
	if o.Attempts == 0 {
		o.Attempts = 3
	}
	if o.Concurrency == 0 {
		o.Concurrency = 1
	}
	if o.Timeout == 0 {
		o.Timeout = testkit.Patience
	}
	o.Retry = retry.Backoff{Min: time.Millisecond, Max: 5 * time.Millisecond}
	quit, cancel := context.WithCancelCause(context.Background())
	t.Cleanup(func() { cancel(nil) })
	lg := testkit.NewLogs(t)
	return testQueue{New(quit, testkit.ChannelName(t), h, o, lg.Logger().With("channel", testkit.ChannelName(t))), lg, cancel}
}

// finish waits until nothing waits and nothing runs.
func (w testQueue) finish(t *testing.T) {
	t.Helper()
	select {
	case <-w.Drained():
	case <-time.After(testkit.Patience):
		t.Fatal("the queue did not finish")
	}
}

func (w testQueue) give(t *testing.T, payloads ...string) {
	t.Helper()
	for _, p := range payloads {
		if !w.Offer(notify.Notification{Channel: w.channel, Payload: p, PID: 1}) {
			t.Fatalf("%q was refused", p)
		}
	}
}

func TestFailedHandlerIsRetried(t *testing.T) {
	t.Parallel()
	var seen []string
	w := newTestQueue(t, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		seen = append(seen, fmt.Sprintf("%s%d", n.Payload, n.Attempt))
		if n.Payload == "a" && n.Attempt < 3 {
			return errors.New("not yet")
		}
		return nil
	}), Options{})
	w.give(t, "a", "b")
	w.finish(t)
	if got := strings.Join(seen, " "); got != "a1 a2 a3 b1" {
		t.Errorf("handled %s", got)
	}
	if n := len(w.All("handler failed")); n != 2 {
		t.Errorf("%d failures in the log", n)
	}
	if n := len(w.All("gave up")); n != 0 {
		t.Errorf("gave up %d times", n)
	}
}

// A receiver that drops repeats by id must see a repeat for what it is, and no other run for one.
func TestIDsAreOfOneRun(t *testing.T) {
	t.Parallel()
	var ids []string
	ran := make(chan struct{}, 1)
	w := newTestQueue(t, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		ids = append(ids, n.ID())
		if n.Attempt == 1 {
			return notify.RetryAfter(errors.New("not yet"), time.Hour) // which is not waited for
		}
		ran <- struct{}{}
		return nil
	}), Options{Doorbell: true})
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
	w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error { return errors.New("never") }), Options{})
	w.give(t, "precious")
	w.finish(t)
	line := w.Wait(t, "gave up", 1)
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
	w := newTestQueue(t, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		if n.Attempt == 1 {
			panic("boom")
		}
		handled.Add(1)
		return nil
	}), Options{})
	w.give(t, "a", "b")
	w.finish(t)
	if handled.Load() != 2 {
		t.Errorf("%d handled", handled.Load())
	}
	if line := w.Wait(t, "handler panicked", 1); !strings.Contains(line["stack"].(string), "queue_test.go") {
		t.Errorf("the stack does not show where: %v", line)
	}
}

func TestHandlerTimeout(t *testing.T) {
	t.Parallel()
	const limit = 100 * time.Millisecond
	var attempts, quick atomic.Int64
	w := newTestQueue(t, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		if n.Payload == "quick" {
			quick.Add(1)
			return ctx.Err()
		}
		began := time.Now()
		attempts.Add(1)
		<-ctx.Done()
		if took := time.Since(began); took < limit*4/5 { // the call may have begun a moment before
			t.Errorf("ended after %v, before its limit", took)
		}
		return ctx.Err()
	}), Options{Limits: call.Limits{Timeout: limit}})
	w.give(t, "quick", "hang", "quick", "hang", "quick")
	w.finish(t)
	if attempts.Load() != 6 || quick.Load() != 3 {
		t.Errorf("%d attempts to hang, %d quick ones", attempts.Load(), quick.Load())
	}
	if n := len(w.All("gave up")); n != 2 {
		t.Errorf("gave up %d times", n)
	}
}

func TestLateIsNotFailed(t *testing.T) {
	t.Parallel()
	w := newTestQueue(t, notify.HandlerFunc(func(ctx context.Context, _ notify.Notification) error {
		<-ctx.Done() // and then it succeeds all the same
		return nil
	}), Options{Limits: call.Limits{Timeout: 50 * time.Millisecond}})
	w.give(t, "x")
	w.finish(t)
	if w.counts.done != 1 {
		t.Errorf("%d handled", w.counts.done)
	}
}

func TestConcurrency(t *testing.T) {
	t.Parallel()
	const at, total = 4, 100
	var now, most atomic.Int64
	all := make(chan struct{})
	w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error {
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
	}), Options{Limits: call.Limits{Concurrency: at}})
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
	w := newTestQueue(t, h, Options{Settings: Settings{Size: 10, Overflow: "drop"}})
	for range 100 {
		w.give(t, "x")
	}
	w.Wait(t, "queue full", 1)
	close(gate)
	line := w.Wait(t, "queue drained", 1)
	w.finish(t)
	handled := c.handled.Load()
	if handled < 10 || handled > 11 || line["dropped"] != float64(100-handled) {
		t.Errorf("handled %d, and the log says %v dropped", handled, line["dropped"])
	}
	if c.caughtUp.Load() != 1 {
		t.Errorf("caught up %d times after the overflow", c.caughtUp.Load())
	}
	if len(w.All("queue full")) != 1 || len(w.All("queue drained")) != 1 {
		t.Error("one overflow is to be told once")
	}
}

// gated is a counter whose Handle waits for a gate.
type gated struct {
	*counter
	gate chan struct{}
}

func (g *gated) Handle(ctx context.Context, n notify.Notification) error {
	<-g.gate
	return g.counter.Handle(ctx, n)
}

func TestAbandonedIsCountedAndLogged(t *testing.T) {
	t.Parallel()
	began := make(chan struct{}, 1)
	w := newTestQueue(t, notify.HandlerFunc(func(ctx context.Context, _ notify.Notification) error {
		began <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	}), Options{})
	w.give(t, "one", "two", "three")
	<-began
	w.cancel(notify.ErrShutdownTimeout)
	w.finish(t)
	w.give(t, "late")
	if n := w.AbandonRest(); n != 4 {
		t.Errorf("%d abandoned, want 4", n)
	}
	var payloads []string
	for _, line := range w.All("abandoned") {
		payloads = append(payloads, line["payload"].(string))
		if line["error"] != notify.ErrShutdownTimeout.Error() {
			t.Errorf("cause: %v", line["error"])
		}
	}
	if got := strings.Join(payloads, " "); got != "one late two three" { // one was under way, late came after the end
		t.Errorf("traces of %s", got)
	}
}

// TestOneThatIgnoresItsContextIsCounted: what still runs at the end was not handled to its end either.
func TestOneThatIgnoresItsContextIsCounted(t *testing.T) {
	t.Parallel()
	began, gate := make(chan struct{}), make(chan struct{})
	w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error {
		began <- struct{}{}
		<-gate
		return nil
	}), Options{Limits: call.Limits{Concurrency: 2}})
	w.give(t, "one", "two", "three")
	<-began
	<-began
	drained := w.Drained()
	w.cancel(notify.ErrShutdownTimeout)
	if n := w.AbandonRest(); n != 3 { // two run, one waits
		t.Errorf("%d abandoned, want 3", n)
	}
	if line := w.Wait(t, "handler is still running at the end", 1); line["running"] != 2.0 {
		t.Errorf("the log says %v", line)
	}
	close(gate)
	<-drained
}

func TestFifo(t *testing.T) {
	var q fifo
	next, want := 0, 0
	for round := range 200 {
		for range round % 37 {
			q.push(notify.Notification{PID: next})
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

	for range 5000 {
		q.push(notify.Notification{})
	}
	for range 5000 {
		q.pop()
	}
	if len(q.ring) > 1024 {
		t.Errorf("after a burst the empty ring still has %d places", len(q.ring))
	}
	q.push(notify.Notification{PID: 1})
	if got := q.pop().PID; got != 1 {
		t.Errorf("popped %d after a burst", got)
	}
}

// counter is a handler that counts its calls; it can catch up.
type counter struct{ handled, caughtUp atomic.Int64 }

func (c *counter) Handle(context.Context, notify.Notification) error { c.handled.Add(1); return nil }
func (c *counter) CatchUp(context.Context) error                     { c.caughtUp.Add(1); return nil }

var errAway = notify.Unavailable(errors.New("connection refused"))

// A doorbell whose receiver is away spends no attempts, says so in a few lines, and runs once when it is back.
func TestDoorbellPausesWhileItsReceiverIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		back := time.Now().Add(10 * time.Minute)
		var calls, done []time.Time
		w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error {
			calls = append(calls, time.Now())
			if time.Now().Before(back) {
				return errAway
			}
			done = append(done, time.Now())
			return nil
		}), Options{Doorbell: true, Limits: call.Limits{LateAfter: time.Hour}})
		w.give(t, "", "", "")
		time.Sleep(30 * time.Second)
		if w.Ready() != nil {
			t.Errorf("not ready after half a minute: %v", w.Ready())
		}
		time.Sleep(time.Minute)
		if err := w.Ready(); err == nil || !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), "paused") {
			t.Errorf("ready although paused for longer than a minute: %v", err)
		}
		if paused := stat(w, "pglistener_channel_paused", ""); paused != 1 {
			t.Errorf("the metric says %v", paused)
		}
		for range 50 {
			w.give(t, "") // rings that wait are one
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if len(done) != 2 || done[0].Sub(back) > time.Minute {
			t.Errorf("ran at %v after it was back at %v", done, back)
		}
		for i := 3; i < len(calls)-len(done); i++ {
			if pause := calls[i].Sub(calls[i-1]); pause < time.Second || pause > time.Minute {
				t.Errorf("try %d after %v", i, pause)
			}
		}
		if len(w.All("gave up")) > 0 || len(w.All("channel resumed")) != 1 {
			t.Errorf("gave up %d times, resumed %d times", len(w.All("gave up")), len(w.All("channel resumed")))
		}
		if lines := len(w.All("")); lines > 12 {
			t.Errorf("%d log lines for %d tries", lines, len(calls))
		}
		if w.Ready() != nil || stat(w, "pglistener_channel_paused", "") != 0 {
			t.Errorf("still paused: %v", w.Ready())
		}
	})
}

// TestPausedDoorbellWaitsAsLongAsItsReceiverAsks: and for a minute at most, which is how long its own pauses grow.
func TestPausedDoorbellWaitsAsLongAsItsReceiverAsks(t *testing.T) {
	for asked, want := range map[time.Duration]time.Duration{20 * time.Second: 20 * time.Second, time.Hour: time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			var calls []time.Time
			w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error {
				calls = append(calls, time.Now())
				if len(calls) == 5 {
					return nil
				}
				return notify.RetryAfter(errAway, asked)
			}), Options{Doorbell: true})
			w.give(t, "")
			time.Sleep(10 * time.Minute)
			w.finish(t)
			if len(calls) != 5 {
				t.Fatalf("%d calls", len(calls))
			}
			for i := 3; i < len(calls); i++ { // the third has paused it
				if pause := calls[i].Sub(calls[i-1]); pause != want {
					t.Errorf("asked to wait for %v, and call %d came after %v", asked, i+1, pause)
				}
			}
		})
	}
}

// TestPausedDoorbellBlamesItsReceiverUntilThatAnswers: a receiver that accepts the call and is silent is as far away as before. One that
// answers, in whatever way, ends the pause; what fails then is the run's own.
func TestPausedDoorbellBlamesItsReceiverUntilThatAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		silent int   // calls that are not answered, after the third has paused the channel
		answer error // to all after those
		gaveUp int
	}{
		"silent for long":       {silent: 10},
		"answers with an error": {silent: 2, answer: errors.New("no such table"), gaveUp: 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls := 0
				w := newTestQueue(t, notify.HandlerFunc(func(ctx context.Context, _ notify.Notification) error {
					switch calls++; {
					case calls <= 3:
						return errAway
					case calls <= 3+c.silent:
						<-ctx.Done()
						return context.Cause(ctx)
					}
					return c.answer
				}), Options{Doorbell: true, Limits: call.Limits{Timeout: 5 * time.Second, LateAfter: time.Hour}})
				w.give(t, "")
				time.Sleep(time.Hour)
				if n := len(w.All("gave up")); n != c.gaveUp {
					t.Errorf("gave up %d times, want %d, after %d calls", n, c.gaveUp, calls)
				}
				if n := len(w.All("channel resumed")); n != 1 || stat(w, "pglistener_channel_paused", "") != 0 {
					t.Errorf("resumed %d times; paused is %v", n, stat(w, "pglistener_channel_paused", ""))
				}
				if got := w.Ready(); got != nil && strings.Contains(got.Error(), "connection refused") {
					t.Errorf("an old cause: %v", got)
				}
			})
		})
	}
}

// A stop does not wait for a receiver that is away: the doorbell runs at the next start.
func TestPausedDoorbellDoesNotHoldUpTheStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error { return errAway }), Options{Doorbell: true})
		w.give(t, "")
		time.Sleep(3 * time.Minute)
		began := time.Now()
		<-w.Drained()
		if time.Since(began) > time.Second {
			t.Errorf("stopped after %v", time.Since(began))
		}
		w.cancel(nil)
		if n := w.AbandonRest(); n != 0 {
			t.Errorf("%d abandoned", n)
		}
	})
}

// What a plain channel holds ages, and a queue that waits would stop the others: it keeps its attempts.
func TestPlainChannelDoesNotPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error { return errAway }), Options{})
		for range 100 {
			w.give(t, "x")
		}
		w.finish(t)
		if w.counts.failed != 100 || w.calls.Failed != 300 || stat(w, "pglistener_channel_paused", "") != 0 {
			t.Errorf("%+v, %d calls failed", w.counts, w.calls.Failed)
		}
		if n := len(w.All("handler failed")); n != 8 { // of 200: the 1st, 2nd, 4th, ... 128th
			t.Errorf("%d lines for 200 failures that are alike", n)
		}
		if n := len(w.All("gave up")); n != 100 {
			t.Errorf("%d traces of what was given up, want 100", n)
		}
	})
}

// TestPlainChannelWaitsAsLongAsItsReceiverAsks: but never for longer than between any two attempts, as all behind it waits too.
func TestPlainChannelWaitsAsLongAsItsReceiverAsks(t *testing.T) {
	for asked, want := range map[time.Duration]time.Duration{4 * time.Millisecond: 4 * time.Millisecond, time.Hour: 5 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			var calls []time.Time
			w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error {
				calls = append(calls, time.Now())
				return notify.RetryAfter(errors.New("busy"), asked)
			}), Options{})
			w.give(t, "x")
			time.Sleep(2 * time.Hour)
			w.finish(t)
			if len(calls) != 3 || calls[1].Sub(calls[0]) != want || calls[2].Sub(calls[1]) != want {
				t.Errorf("asked to wait for %v, called at %v", asked, calls)
			}
		})
	}
}

func TestNotReadyWhileNothingSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fails atomic.Bool
		fails.Store(true)
		w := newTestQueue(t, notify.HandlerFunc(func(ctx context.Context, _ notify.Notification) error {
			time.Sleep(10 * time.Second)
			if fails.Load() {
				return errors.New("no")
			}
			return nil
		}), Options{Limits: call.Limits{Timeout: time.Minute, LateAfter: 5 * time.Minute}})
		for range 100 {
			w.give(t, "x")
		}
		time.Sleep(5*time.Minute - time.Second)
		if err := w.Ready(); err != nil {
			t.Errorf("not ready too soon: %v", err)
		}
		time.Sleep(2 * time.Second)
		if err := w.Ready(); err == nil || !strings.Contains(err.Error(), "has not succeeded for 5m") {
			t.Errorf("nothing has succeeded, and Ready says %v", err)
		}
		fails.Store(false)
		time.Sleep(15 * time.Second)
		if err := w.Ready(); err != nil { // a backlog that moves is no alarm
			t.Errorf("it moves again: %v", err)
		}
		w.cancel(nil)
		time.Sleep(time.Minute) // the last call ends
	})
}

// TestGivenUpRunIsStillToBeDone: a doorbell whose last run was given up has left its work undone, and is not ready again because
// nothing runs, nor because it was rung again in vain. A notification of a plain channel that was given up is another matter: nothing
// can be done for it any more. Nor is a ring of a doorbell whose schedule is a row of the outbox, which does its work without the queue.
func TestGivenUpRunIsStillToBeDone(t *testing.T) {
	for name, c := range map[string]struct {
		options Options
		undone  bool
	}{
		"doorbell":           {Options{Doorbell: true}, true},
		"scheduled":          {Options{Doorbell: true, Rung: true, Times: &everyFive{}}, true},
		"scheduled by a row": {Options{Doorbell: true, Rung: true}, false},
		"plain":              {Options{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var works atomic.Bool
				c.options.Limits = call.Limits{LateAfter: 5 * time.Minute, Timeout: time.Minute}
				w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error {
					if works.Load() {
						return nil
					}
					return notify.Permanent(errors.New("no"))
				}), c.options)
				for i := range 2 {
					w.give(t, "x")
					time.Sleep(4 * time.Minute)
					w.Wait(t, "gave up", i+1)
				}
				if err := w.Ready(); c.undone != (err != nil && strings.Contains(err.Error(), "has not succeeded for 8m")) {
					t.Errorf("Ready says %v", err)
				}
				works.Store(true)
				w.give(t, "x")
				time.Sleep(10 * time.Minute)
				if err := w.Ready(); err != nil {
					t.Errorf("its work is done, and Ready says %v", err)
				}
				w.give(t, "x")
				w.finish(t)
			})
		})
	}
}

// stat is a figure of a queue, with a result if that is not "".
func stat(w testQueue, name, result string) (value float64) {
	for _, s := range w.Stats() {
		if s.Name == name && (result == "" || slices.Contains(s.Labels, result)) {
			value += s.Value
		}
	}
	return value
}

// TestSweepsAreNotInStep: channels, and the replicas of a service, start at the same moment.
func TestSweepsAreNotInStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		swept := make(chan time.Duration, 20)
		for range cap(swept) {
			var once sync.Once
			w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error {
				once.Do(func() { swept <- time.Since(began) })
				return nil
			}), Options{Doorbell: true, Settings: Settings{CatchUpInterval: time.Minute}})
			w.Start()
			t.Cleanup(func() { w.finish(t) })
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(swept) != cap(swept) {
			t.Fatalf("%d of %d have looked for work within their interval", len(swept), cap(swept))
		}
		apart := map[time.Duration]bool{}
		for range cap(swept) {
			at := <-swept
			if apart[at] = true; at < 48*time.Second {
				t.Errorf("one looked for work after %v", at)
			}
		}
		if len(apart) < cap(swept)/2 {
			t.Errorf("%d channels looked for work at %d moments", cap(swept), len(apart))
		}
	})
}

// everyFive is due every five minutes.
type everyFive struct{ next time.Time }

func (e *everyFive) Wait() time.Duration { return time.Until(e.next) }

func (e *everyFive) Due() (time.Time, bool) {
	nominal := e.next
	e.next = nominal.Add(5 * time.Minute)
	return nominal, true
}

// A doorbell with times of its own runs then and when rung, and neither at starts and gaps nor at sweeps.
func TestDoorbellRingsAtItsTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var runs []notify.Notification
		var at []time.Duration
		w := newTestQueue(t, notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
			runs, at = append(runs, n), append(at, time.Since(began))
			return nil
		}), Options{Doorbell: true, Rung: true, Settings: Settings{CatchUpInterval: time.Second},
			Times: &everyFive{time.Now().Add(5 * time.Minute)}})
		w.Start()
		w.CatchUp() // as at the start and after a gap
		time.Sleep(12 * time.Minute)
		w.give(t, "")
		time.Sleep(5 * time.Minute)
		w.finish(t)
		if len(at) != 4 || at[0] != 5*time.Minute || at[1] != 10*time.Minute || at[2] != 12*time.Minute || at[3] != 15*time.Minute {
			t.Errorf("ran at %v", at)
		}
		if !runs[0].RunAt.Equal(began.Add(5*time.Minute)) || !runs[2].RunAt.IsZero() {
			t.Errorf("told %v and %v", runs[0].RunAt, runs[2].RunAt)
		}
	})
}

// TestQueuesShareMemory: together queues hold no more than their memory, each is sure of its share, and room comes back as the
// queue empties.
func TestQueuesShareMemory(t *testing.T) {
	t.Parallel()
	payload := strings.Repeat("x", 1000-256) // which counts as 1000
	b := memory.New(40_000, 2)
	gate, begun := make(chan struct{}), make(chan struct{}, 100)
	wait := notify.HandlerFunc(func(context.Context, notify.Notification) error {
		begun <- struct{}{}
		<-gate
		return nil
	})
	greedy := newTestQueue(t, wait, Options{Memory: b})
	modest := newTestQueue(t, wait, Options{Memory: b})
	fill := func(w testQueue) (n int) {
		w.give(t, payload) // one runs, and the rest waits
		<-begun
		for n < 900 && w.Offer(notify.Notification{Payload: payload}) {
			n++
		}
		return n
	}
	if n := fill(greedy); n != 30 {
		t.Errorf("one queue took %d of 40, with a share of 10", n)
	}
	if n := fill(modest); n != 10 {
		t.Errorf("the other took %d, with a share of 10", n)
	}
	if greedy.Offer(notify.Notification{Payload: payload}) {
		t.Error("a queue that has taken all it can takes more")
	}
	line := greedy.Wait(t, "queue full", 1)
	if bytes, _ := line["bytes"].(float64); bytes != 30_000 {
		t.Errorf("the log says %v", line)
	}
	close(gate)
	select {
	case <-greedy.Room():
	case <-time.After(testkit.Patience):
		t.Fatal("there is no room although the queue has emptied")
	}
	greedy.finish(t)
	modest.finish(t)
	if !b.Fits(0, 30_000) {
		t.Error("when all was handled, not all memory is free")
	}
}

// TestLargeNotificationPassesASmallShare: what is larger than the whole share is handled one at a time.
func TestLargeNotificationPassesASmallShare(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error { <-gate; return nil }), Options{Memory: memory.New(100, 10)})
	large := notify.Notification{Payload: strings.Repeat("x", 8000)}
	taken := 0
	for taken < 5 && w.Offer(large) {
		taken++
	}
	if taken < 1 || taken > 2 { // one that runs, and one that waits
		t.Errorf("%d were taken", taken)
	}
	close(gate)
	w.finish(t)
}

// crowded is a budget that is used up by others; an empty queue may hold a notification all the same.
type crowded struct{}

func (crowded) Fits(int64, int64) bool { return false }

func (crowded) Changed(int64, int64) {}

func TestEmptyQueueHasRoomWhateverOthersHold(t *testing.T) {
	t.Parallel()
	step := make(chan struct{})
	w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error { <-step; return nil }), Options{Memory: crowded{}})
	for range 2 { // one runs, one waits
		testkit.Eventually(t, "not taken", func() bool { return w.Offer(notify.Notification{}) })
	}
	if w.Offer(notify.Notification{}) {
		t.Fatal("a third is taken although nothing fits")
	}
	step <- struct{}{} // the second runs, and nothing waits
	select {
	case <-w.Room():
	case <-time.After(testkit.Patience):
		t.Error("nobody is told that it is empty, and reading has stopped for good")
	}
	close(step)
	w.finish(t)
}

// TestRingIsLeftWithoutTraceByNone: a doorbell that does not run at starts would never make up for a ring.
func TestRingIsLeftWithoutTraceByNone(t *testing.T) {
	t.Parallel()
	for name, result := range map[string]error{"its receiver is away": notify.Unavailable(errors.New("away")), "it runs": context.Canceled} {
		for _, rung := range []bool{true, false} {
			gate, calls := make(chan struct{}), make(chan struct{}, 10)
			w := newTestQueue(t, notify.HandlerFunc(func(context.Context, notify.Notification) error {
				calls <- struct{}{}
				<-gate
				return result
			}), Options{Doorbell: true, Rung: rung, Settings: Settings{Attempts: 10}})
			w.Offer(notify.Notification{})
			<-calls
			want := 0
			if name == "it runs" {
				w.Offer(notify.Notification{}) // waits
				w.cancel(notify.ErrShutdownTimeout)
				want = 1 // the one that is cut short, whatever the doorbell
			} else {
				for range 2 { // that it pauses
					gate <- struct{}{}
					<-calls
				}
			}
			drained := w.Drained()
			close(gate)
			<-drained
			w.cancel(notify.ErrShutdownTimeout)
			if rung {
				want++
			}
			if n := w.AbandonRest(); n != want || len(w.All("abandoned")) != want {
				t.Errorf("%s, rung %v: %d abandoned, want %d: %v", name, rung, n, want, w.All("abandoned"))
			}
		}
	}
}
