//go:build unix

package pipe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/proc"
)

// A program that dies at its start says nothing of what waits for it.
func TestDiesAtStart(t *testing.T) {
	t.Parallel()
	p := newPipe(t, 10, `
note("started")
if not exists("mended"):
    sys.stderr.write("no database\n")
    sys.exit(3)
for event in events:
    answer(event)
`)
	p.backoff.Max = 10 * time.Second // no life is that long
	p.run()
	p.lg.Wait(t, "the program of the pipe is started again", 1)
	results := p.each(func(string) time.Duration { return 300 * time.Millisecond }, hundred()[:10]...)
	for payload, err := range results {
		if !notify.IsUnavailable(err) {
			t.Errorf("%s: %v", payload, err)
		}
	}
	p.lg.Wait(t, "output", 1)
	line := p.lg.Wait(t, "the program of the pipe is started again", 1)
	if line["why"] != `ended: exit status 3, and said "no database"` || line["level"] != "WARN" {
		t.Errorf("%v", line)
	}
	var err error
	testkit.Eventually(t, "ready although the program does not stay", func() bool { err = p.Ready(); return err != nil })
	if !strings.Contains(err.Error(), "does not stay: "+p.path) {
		t.Errorf("%v", err)
	}
	waits := make(chan error)
	go func() { waits <- p.one("waits") }()
	begun := len(p.notes("started"))
	testkit.Eventually(t, "it is not started again", func() bool { return len(p.notes("started")) > begun })
	if err := os.WriteFile(filepath.Join(p.dir, "mended"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := <-waits; err != nil {
		t.Errorf("what waited for the program: %v", err)
	}
	if !slices.ContainsFunc(p.lg.All("the program of the pipe is started again"), func(l testkit.Line) bool { return l["level"] == "ERROR" }) {
		t.Error("no ERROR although the program does not stay")
	}
	if err := p.Ready(); err != nil {
		t.Errorf("it has answered, and %v", err)
	}
}

// One that stays when it was mended is well before anything comes for it.
func TestReadyAgainWithoutAnyWork(t *testing.T) {
	t.Parallel()
	p := newPipe(t, 1, `
if not exists("mended"):
    sys.exit(3)
note("stays")
for event in events:
    answer(event)
`)
	p.backoff.Max = time.Hour // no life is that long
	p.run()
	testkit.Eventually(t, "ready although the program does not stay", func() bool { return p.Ready() != nil })
	if err := os.WriteFile(filepath.Join(p.dir, "mended"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, "it is not started again", func() bool { return p.notes("stays") != nil })
	if p.Ready() == nil {
		t.Error("ready although it may not stay")
	}
	p.mu.Lock()
	p.backoff.Max = time.Millisecond // it has been there for longer
	p.mu.Unlock()
	testkit.Eventually(t, "not ready although the program stays", func() bool { return p.Ready() == nil })
}

// TestHangsAtEveryStart: that it runs for long does not make of a program that answers nothing one that works.
func TestHangsAtEveryStart(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
for event in events:
    if exists("mended"):
        answer(event)
`)
	starts := func() uint64 { p.mu.Lock(); defer p.mu.Unlock(); return p.starts }
	for n := range uint64(hopeless) {
		if err := p.Ready(); err != nil {
			t.Fatalf("too soon: %v", err)
		}
		testkit.Eventually(t, "it is not started", func() bool { return starts() > n })
		_ = p.each(func(string) time.Duration { return 300 * time.Millisecond }, "x")
	}
	testkit.Eventually(t, "ready although nothing has ever been answered", func() bool { return p.Ready() != nil })
	waits := make(chan error)
	go func() { waits <- p.Handle(within(t, 2*time.Second), event("waits")) }()
	testkit.Eventually(t, "it is not started again", func() bool { return starts() > hopeless })
	for until := time.Now().Add(3 * p.backoff.Max); time.Now().Before(until); time.Sleep(time.Millisecond) {
		if p.Ready() == nil {
			t.Fatal("ready although it has not answered yet")
		}
	}
	if !slices.ContainsFunc(p.lg.All("the program of the pipe is started again"), func(l testkit.Line) bool { return l["level"] == "ERROR" }) {
		t.Error("no ERROR although nothing has ever been answered")
	}
	if err := os.WriteFile(filepath.Join(p.dir, "mended"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	<-waits
	p.want("mended")
	if err := p.Ready(); err != nil {
		t.Errorf("it has answered, and %v", err)
	}
}

// Starts in vain are spaced, and thinned in the log.
func TestDiesAtStartOftenIsSpaced(t *testing.T) {
	t.Parallel()
	p := newPipe(t, 1, "")
	p.path, p.args = "/bin/sh", []string{"-c", "exit 3"} // there are many starts, and it is quicker
	p.backoff.Max = time.Hour                            // no life is long
	p.run()
	p.lg.Wait(t, "the program of the pipe is started again", 4) // the 1st, 2nd, 4th and 8th
	for i, shortest := range []float64{5, 10, 40, 640} {
		if wait := p.lg.All("the program of the pipe is started again")[i]["again_in"].(float64) / 1e6; wait < shortest || wait > 2*shortest {
			t.Errorf("line %d: a pause of %v ms", i+1, wait)
		}
	}
	if p.restarts() < 7 {
		t.Errorf("%v restarts", p.restarts())
	}
}

// A program that cannot be started at all is tried again.
func TestCannotBeStarted(t *testing.T) {
	t.Parallel()
	p := newPipe(t, 1, `
for event in events:
    answer(event)
`)
	path := p.path
	p.path = filepath.Join(p.dir, "link")
	p.run()
	p.lg.Wait(t, "the program of the pipe is started again", 1)
	err := p.Handle(within(t, 300*time.Millisecond), event("a"))
	if !notify.IsUnavailable(err) || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%v", err)
	}
	if err := os.Symlink(path, p.path); err != nil {
		t.Fatal(err)
	}
	p.want("a")
}

// dies is a program that dies of one payload, however often it comes.
const dies = `
for event in events:
    note("seen", event["payload"])
    if event["payload"] in ("042", "077"):
        os._exit(1)
    answer(event)
`

func TestDiesWithAHundredInFlight(t *testing.T) {
	t.Parallel()
	p := start(t, 100, dies)
	results := p.each(ample, hundred()...)
	if got := failed(results); !slices.Equal(got, []string{"042", "077"}) {
		t.Errorf("failed: %v", got)
	}
	if err := results["042"]; err == nil || notify.IsUnavailable(err) || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("the guilty one: %v", err)
	}
	if p.restarts() > 4 {
		t.Errorf("%v restarts for two guilty ones", p.restarts())
	}
}

// The guilty one dies late, when all hundred have been read and none is answered: nothing but trying each alone can find it.
func TestDiesOfOneThatCannotBeSeen(t *testing.T) {
	t.Parallel()
	p := start(t, 100, `
held = []
for event in events:
    held.append(event)
    if not exists("died") and len(held) < 100:
        continue
    if [e for e in held if e["payload"] == "042"]:
        note("died", ",".join(e["payload"] for e in held))
        os._exit(1)
    for e in held:
        answer(e)
    held = []
`)
	if got := failed(p.each(ample, hundred()...)); !slices.Equal(got, []string{"042"}) {
		t.Errorf("failed: %v", got)
	}
	if died := p.notes("died"); len(died) != 2 || died[1] != "042" {
		t.Errorf("it died with %v", died)
	}
}

// Once the guilty one is found the others are sent together again.
func TestAcquittedOnesAreSentTogether(t *testing.T) {
	t.Parallel()
	p := start(t, 3, `
seen = []
for event in events:
    seen.append(event)
    if exists("died") and event["payload"] == "a" or len(seen) == 3:
        note("died")
        os._exit(1)
    if exists("died") and len(seen) == 2:
        for e in seen:
            answer(e)
`)
	if got := failed(p.each(ample, "a", "b", "c")); !slices.Equal(got, []string{"a"}) {
		t.Errorf("failed: %v", got)
	}
}

// A death that nobody in flight was the cause of charges nobody.
func TestKilledFromOutside(t *testing.T) {
	t.Parallel()
	p := start(t, 100, `
if exists("pid"):
    for event in events:
        answer(event)
note("pid", str(os.getpid()))
for event in events:
    note("seen")
`)
	go func() {
		testkit.Eventually(t, "it does not read", func() bool { return len(p.notes("seen")) == 100 })
		var pid int
		_, _ = fmt.Sscan(p.notes("pid")[0], &pid)
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}()
	if bad := failed(p.each(ample, hundred()...)); bad != nil {
		t.Errorf("failed: %v", bad)
	}
}

// What waits behind suspects is away, not bad, when its time is over; and so is a suspect that has not had its turn.
func TestSuspectsWithoutATurn(t *testing.T) {
	t.Parallel()
	p := start(t, 3, `
seen = 0
note("started")
for event in events:
    seen += 1
    if not exists("died") and seen == 3:
        note("died")
        os._exit(1)
    if exists("died") and event["payload"] == "first":
        note("alone")
        while not exists("go"):
            time.sleep(0.01)
        answer(event)
    elif exists("died"):
        answer(event)
`)
	testkit.Eventually(t, "it is not started", func() bool { return p.notes("started") != nil })
	results := make(chan map[string]error)
	go func() {
		results <- p.each(func(payload string) time.Duration {
			if payload == "short" {
				return 2 * time.Second
			}
			return testkit.Patience
		}, "first", "short", "third")
	}()
	testkit.Eventually(t, "the first suspect has no turn", func() bool { return p.notes("alone") != nil })
	if err := p.Handle(within(t, 300*time.Millisecond), event("behind")); !notify.IsUnavailable(err) {
		t.Errorf("behind suspects: %v", err)
	}
	testkit.Eventually(t, "short waits for ever", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.items["short"] == nil
	})
	if err := os.WriteFile(filepath.Join(p.dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	got := <-results
	if got["first"] != nil || got["third"] != nil || !notify.IsUnavailable(got["short"]) {
		t.Errorf("%v", got)
	}
}

// A program may end with 0 whenever it likes, say after so many events: nobody is charged, and it is started again at once.
func TestRetires(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 100} {
		p := start(t, concurrency, `
for number, event in enumerate(events):
    if number == 20:
        break
    answer(event)
`)
		if bad := failed(p.each(ample, hundred()...)); bad != nil {
			t.Errorf("CONCURRENCY=%d: failed: %v", concurrency, bad)
		}
		if line := p.lg.Wait(t, "the program of the pipe is started again", 1); line["level"] != "INFO" || line["again_in"].(float64) != 0 {
			t.Errorf("%v", line)
		}
	}
}

// What was in flight when a program ended comes before what has waited all the while.
func TestWhatWasInFlightComesFirst(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
for event in events:
    if event["payload"] == "a" and not exists("ended"):
        note("ended")
        while not exists("go"):
            time.sleep(0.01)
        break
    note("order", event["payload"])
    answer(event)
`)
	p.want("warm")
	go func() {
		testkit.Eventually(t, "not all wait", func() bool { return p.called() == 4 })
		_ = os.WriteFile(filepath.Join(p.dir, "go"), nil, 0o644)
	}()
	if bad := failed(p.each(ample, "a", "b", "c")); bad != nil {
		t.Errorf("failed: %v", bad)
	}
	if got := p.notes("order"); !slices.Equal(got, []string{"warm", "a", "b", "c"}) {
		t.Errorf("order: %v", got)
	}
}

// But what makes it end with 0 each time is found.
func TestEndsOfOneWithZero(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 100} {
		p := start(t, concurrency, strings.ReplaceAll(dies, "_exit(1)", "_exit(0)"))
		if got := failed(p.each(ample, hundred()...)); !slices.Equal(got, []string{"042", "077"}) {
			t.Errorf("CONCURRENCY=%d: failed: %v", concurrency, got)
		}
	}
}

// hangs is a program that never comes back from one payload.
const hangs = `
for event in events:
    note("seen", event["payload"])
    if event["payload"] == "042":
        time.sleep(1000)
    answer(event)
`

// One thing after the other, so that all behind the guilty one wait for it: only that one is charged.
func TestHangsOnOneOfAHundred(t *testing.T) {
	t.Parallel()
	p := start(t, 100, hangs)
	p.want("warm")
	results := p.each(func(payload string) time.Duration {
		if payload == "042" || payload == "043" { // both come to their limit at about the same time
			return time.Second
		}
		return testkit.Patience
	}, hundred()...)
	if got := charged(results); !slices.Equal(got, []string{"042"}) {
		t.Errorf("charged: %v", got)
	}
	if !errors.Is(results["042"], notify.ErrHandlerTimeout) {
		t.Errorf("%v", results["042"])
	}
	delete(results, "042")
	delete(results, "043")
	if bad := failed(results); bad != nil {
		t.Errorf("failed: %v", bad)
	}
	if line := p.lg.Wait(t, "the program of the pipe is started again", 1); !strings.Contains(line["why"].(string), "did not answer in time") || line["hint"] != nil {
		t.Errorf("%v", line)
	}
}

// The guilty one is what was sent first, not whose time is over first.
func TestHangsAndALaterOneIsOutOfTimeFirst(t *testing.T) {
	t.Parallel()
	p := start(t, 3, hangs)
	p.want("warm")
	results := p.each(func(payload string) time.Duration {
		if payload == "later" {
			return time.Second
		}
		return 1200 * time.Millisecond
	}, "042", "later")
	if err := results["042"]; err == nil || notify.IsUnavailable(err) {
		t.Errorf("the guilty one: %v", err)
	}
	if err := results["later"]; err != nil && !notify.IsUnavailable(err) {
		t.Errorf("the innocent one: %v", err)
	}
}

// A program that works on several at once goes on with the others until it is stopped, and they are sent again together.
func TestHangsOnOneThread(t *testing.T) {
	t.Parallel()
	p := start(t, 10, `
def work(event):
    note("begun", event["payload"])
    if event["payload"] == "hangs":
        time.sleep(1000)
    while not exists("go"):
        time.sleep(0.01)
    answer(event)
note("started")
for event in events:
    threading.Thread(target=work, args=(event,), daemon=True).start()
`)
	testkit.Eventually(t, "it is not started", func() bool { return p.notes("started") != nil })
	results := make(chan map[string]error)
	go func() {
		results <- p.each(func(payload string) time.Duration {
			if payload == "hangs" {
				return time.Second
			}
			return testkit.Patience
		}, "hangs", "a", "b", "c")
	}()
	testkit.Eventually(t, "the others are not sent again together", func() bool { return len(p.notes("begun")) == 7 })
	if err := os.WriteFile(filepath.Join(p.dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	got := <-results
	if !errors.Is(got["hangs"], notify.ErrHandlerTimeout) || notify.IsUnavailable(got["hangs"]) || len(failed(got)) != 1 {
		t.Errorf("%v", got)
	}
}

// What has waited so long that it has too little time left is not sent: it would only stop the next program too.
func TestTooLittleTime(t *testing.T) {
	t.Parallel()
	p := start(t, 3, `
note("started")
for event in events:
    if event["payload"] in ("first", "second"):
        time.sleep(1000)
    answer(event)
`)
	testkit.Eventually(t, "it is not started", func() bool { return p.notes("started") != nil })
	results := p.each(func(payload string) time.Duration {
		return map[string]time.Duration{"first": 2 * time.Second, "second": 3 * time.Second, "third": testkit.Patience}[payload]
	}, "first", "second", "third")
	if !slices.Equal(charged(results), []string{"first"}) || !slices.Equal(failed(results), []string{"first", "second"}) {
		t.Errorf("%v", results)
	}
	if err := results["second"]; !strings.Contains(err.Error(), "half of its time") || !strings.Contains(err.Error(), "did not answer in time") {
		t.Errorf("%v", err)
	}
	if p.restarts() != 1 {
		t.Errorf("%v restarts", p.restarts())
	}
}

// An answer that comes while the program is being stopped counts.
func TestAnswersWhenItIsStopped(t *testing.T) {
	t.Parallel()
	p := newPipe(t, 1, `
def finish(*_):
    answer(event)
    sys.exit(0)
signal.signal(signal.SIGTERM, finish)
note("started")
for event in events:
    time.sleep(1000)
`)
	p.setup.Grace = testkit.Patience / 2
	p.run()
	testkit.Eventually(t, "it is not started", func() bool { return p.notes("started") != nil })
	if err := p.Handle(within(t, time.Second), event("a")); err != nil {
		t.Error(err)
	}
}

// A cancelled context, as at the end of the process, ends the call, and the program with it.
func TestCancelled(t *testing.T) {
	t.Parallel()
	p := start(t, 1, hangs)
	ctx, cancel := context.WithCancelCause(t.Context())
	errs := make(chan error, 2)
	go func() { errs <- p.Handle(ctx, event("042")) }()
	testkit.Eventually(t, "it is not sent", func() bool { return p.notes("seen") != nil })
	go func() { errs <- p.Handle(ctx, event("waits")) }()
	testkit.Eventually(t, "it does not wait", func() bool { return p.called() == 2 })
	cancel(notify.ErrShutdownTimeout)
	for range 2 {
		if err := <-errs; err == nil || notify.IsUnavailable(err) {
			t.Errorf("%v", err)
		}
	}
	if err := p.Handle(ctx, event("late")); !errors.Is(err, notify.ErrShutdownTimeout) || p.called() != 2 {
		t.Errorf("%v", err)
	}
}

// Lines that are no answers are counted, told of, and otherwise without effect.
func TestNoAnswers(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ say, problem string }{
		"answers twice":         {`answer(event); answer(event)`, "an id that is not in flight"},
		"answers an unknown":    {`answer({"id": "other"}); answer(event)`, "an id that is not in flight"},
		"an id of another kind": {`say('{"id":7,"ok":true}\n'); answer(event)`, "not JSON, or of other types"},
		"no id":                 {`say('{"ok":true}\n'); answer(event)`, "without an id"},
		"logs to stdout":        {`say("handling " + event["id"] + "\n"); answer(event)`, "not JSON"},
		"an empty line":         {`say("\n"); answer(event)`, "not JSON"},
		"echoes":                {`say(json.dumps(event) + "\n"); answer(event)`, "neither ok nor an error"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, 10, "for event in events: "+c.say)
			for _, payload := range hundred() {
				p.want(payload)
			}
			testkit.Eventually(t, "not all are counted", func() bool { return p.notUnderstood() == 100 })
			line := p.lg.Wait(t, "a line of the program is no answer", 1)
			if problem := line["problem"].(string); !strings.HasPrefix(problem, c.problem) || line["level"] != "WARN" || line["line"] == nil {
				t.Errorf("%v", line)
			}
			if hint, _ := line["hint"].(string); !strings.Contains(hint, "stderr") {
				t.Errorf("no hint: %v", line)
			}
			lines := p.lg.All("a line of the program is no answer")
			if len(lines) > 8 || len(lines) > 1 && lines[1]["hint"] != nil {
				t.Errorf("%d lines for 100 of the program", len(lines))
			}
			if p.restarts() != 0 {
				t.Errorf("%v restarts", p.restarts())
			}
		})
	}
}

// cat is no worker: its echo is no answer.
func TestCat(t *testing.T) {
	t.Parallel()
	lg := testkit.NewLogs(t)
	h, err := New("cat", proc.Settings{}, 1, notify.Setup{Log: lg.Logger(), Grace: grace})
	if err != nil {
		t.Fatal(err)
	}
	p := &pipe{handler: h.(*handler), t: t, lg: lg}
	p.run()
	if err := p.Handle(within(t, time.Second), event("a")); !errors.Is(err, notify.ErrHandlerTimeout) || notify.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	if p.notUnderstood() != 1 {
		t.Errorf("%v lines not understood", p.notUnderstood())
	}
	if line := lg.Wait(t, "a line of the program is no answer", 1); !strings.Contains(line["problem"].(string), "echo") || line["line"] != nil {
		t.Errorf("%v", line)
	}
	if line := lg.Wait(t, "the program of the pipe is started again", 1); line["hint"] != nil {
		t.Errorf("the hint is about flushing: %v", line)
	}
}

func TestDoesNotFlush(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
out = open(1, "w")  # as print writes, unless PYTHONUNBUFFERED is set
note("started")
for event in events:
    out.write(json.dumps({"id": event["id"], "ok": True}) + "\n")
`)
	testkit.Eventually(t, "it is not started", func() bool { return p.notes("started") != nil })
	if err := p.Handle(within(t, time.Second), event("a")); !errors.Is(err, notify.ErrHandlerTimeout) || notify.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	if line := p.lg.Wait(t, "the program of the pipe is started again", 1); !strings.Contains(fmt.Sprint(line["hint"]), "flush=True") {
		t.Errorf("no hint: %v", line)
	}
}

func TestAnswersHalfALineAndStalls(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
for event in events:
    if event["payload"] == "stalls":
        say('{"id":"stalls","o')
        time.sleep(1000)
    answer(event)
`)
	p.want("a")
	if err := p.Handle(within(t, time.Second), event("stalls")); !errors.Is(err, notify.ErrHandlerTimeout) || notify.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	p.want("b")
	if p.notUnderstood() != 1 {
		t.Errorf("%v lines not understood", p.notUnderstood())
	}
}

// The last line may lack its newline.
func TestLastLineWithoutNewline(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
for event in events:
    say(json.dumps({"id": event["id"], "ok": True}))
    break
`)
	p.want("a")
	p.want("b")
}

// It is not parallel, so that what it allocates is its own.
func TestPrintsWithoutANewline(t *testing.T) {
	p := start(t, 1, `
for event in events:
    if event["payload"] == "long":
        for _ in range(100):
            say("x" * 1000000)
        say("\n")
    answer(event)
`)
	p.want("a")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	p.want("long")
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 10<<20 {
		t.Errorf("100 MB were read with %d bytes", grown)
	}
	if line := p.lg.Wait(t, "a line of the program is no answer", 1); line["problem"] != "too long" || len(line["line"].(string)) > 200 {
		t.Errorf("%v", line)
	}
	p.want("b")
	if p.restarts() != 0 {
		t.Errorf("%v restarts", p.restarts())
	}
}

// It closes stdout and runs on: nobody can hear it, so it is stopped. What it was given is sent to the next.
func TestClosesStdout(t *testing.T) {
	t.Parallel()
	p := start(t, 3, `
note("started")
for event in events:
    if event["payload"] == "b" and not exists("closed"):
        note("closed")
        os.close(1)
        time.sleep(1000)
    answer(event)
`)
	p.want("a")
	if bad := failed(p.each(ample, "c", "d")); bad != nil {
		t.Errorf("failed: %v", bad)
	}
	if err := p.one("b"); err == nil || notify.IsUnavailable(err) || !strings.Contains(err.Error(), "closed its stdout") {
		t.Errorf("%v", err)
	}
	p.want("b")
	if got := p.notes("started"); len(got) != 2 {
		t.Errorf("it was started %d times", len(got))
	}
}

// A program that never reads: neither does a call wait longer than its time, nor is anything charged, nor does another channel see
// anything of it.
func TestIgnoresStdin(t *testing.T) {
	t.Parallel()
	p := start(t, 8, `
note("started")
time.sleep(1000)
`)
	other := start(t, 8, `
for event in events:
    answer(event)
`)
	testkit.Eventually(t, "it is not started", func() bool { return p.notes("started") != nil })
	results := make(chan error)
	began := time.Now()
	for i := range 8 {
		go func() {
			results <- p.Handle(within(t, time.Second), notify.Notification{Key: fmt.Sprint(i), Payload: strings.Repeat("x", 1<<20)})
		}()
	}
	for _, payload := range hundred() {
		other.want(payload)
	}
	for range 8 {
		if err := <-results; !notify.IsUnavailable(err) {
			t.Errorf("%v", err)
		}
	}
	if took := time.Since(began); took > testkit.Patience {
		t.Errorf("took %v", took)
	}
	if line := p.lg.Wait(t, "the program of the pipe is started again", 1); !strings.Contains(fmt.Sprint(line["hint"]), "not read") {
		t.Errorf("no hint: %v", line)
	}
}

// Much is in flight and nobody reads: it is not held twice, as it was given and as it is to be written. Not parallel, for it counts
// what is allocated.
func TestMemoryIsBounded(t *testing.T) {
	p := start(t, 1000, `
note("started")
while not exists("go"):
    time.sleep(0.01)
for event in events:
    answer(event)
`)
	testkit.Eventually(t, "it is not started", func() bool { return p.notes("started") != nil })
	payload := strings.Repeat("x", 1<<20) // one for all
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	const calls = 300
	results := make(chan error)
	for i := range calls {
		go func() {
			results <- p.Handle(within(t, 10*testkit.Patience), notify.Notification{Key: fmt.Sprint(i), Payload: payload})
		}()
	}
	testkit.Eventually(t, "not all are called", func() bool { return p.called() == calls })
	if grown := int64(heap() - before); grown > 24<<20 {
		t.Errorf("%d calls with 1 MB each take %d bytes more", calls, grown)
	}
	if err := os.WriteFile(filepath.Join(p.dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for range calls {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// The program is stopped with its children, whatever it does about SIGTERM.
func TestIsStoppedWithItsChildren(t *testing.T) {
	t.Parallel()
	needsProc(t)
	for name, program := range map[string]string{
		"obedient":        `pass`,
		"forks children":  `note("pid", str(subprocess.Popen(["sleep", "1000"]).pid))`,
		"ignores SIGTERM": `signal.signal(signal.SIGTERM, signal.SIG_IGN); note("pid", str(subprocess.Popen(["sleep", "1000"]).pid))`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, 1, program+`
note("pid", str(os.getpid()))
for event in events:
    while event["payload"] == "hangs":
        time.sleep(1000)
    answer(event)
`)
			p.want("a")
			pids := p.notes("pid")
			if err := p.Handle(within(t, time.Second), event("hangs")); !errors.Is(err, notify.ErrHandlerTimeout) || notify.IsUnavailable(err) {
				t.Errorf("%v", err)
			}
			if alive(pids[len(pids)-1]) {
				t.Error("Handle has returned, and the program still runs")
			}
			for _, pid := range pids {
				testkit.Eventually(t, "process "+pid+" is still there", func() bool { return !alive(pid) })
			}
			p.want("b")
		})
	}
}

// A program that dies and leaves a child behind, which holds its stdout and stderr open: the child is killed, and nothing waits for
// it.
func TestLeavesAChildBehind(t *testing.T) {
	t.Parallel()
	needsProc(t)
	p := start(t, 1, `
for event in events:
    if event["payload"] == "dies":
        note("pid", str(subprocess.Popen(["sleep", "1000"]).pid))
        os._exit(1)
    answer(event)
`)
	p.want("a")
	if err := p.one("dies"); err == nil {
		t.Error("no error")
	}
	p.want("b")
	pid := p.notes("pid")[0]
	testkit.Eventually(t, "the child still runs", func() bool { return !alive(pid) })
}

// A child that has left the group holds stdout and stderr open and cannot be killed; it is not waited for.
func TestAChildLeavesTheGroup(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
for event in events:
    if event["payload"] == "dies":
        note("pid", str(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid))
        os._exit(1)
    answer(event)
`)
	p.want("a")
	if err := p.one("dies"); err == nil {
		t.Error("no error")
	}
	p.want("b")
	var pid int
	_, _ = fmt.Sscan(p.notes("pid")[0], &pid)
	_ = syscall.Kill(pid, syscall.SIGKILL)
}

// At the end the program's stdin is closed once all is answered, and it may finish.
func TestStop(t *testing.T) {
	t.Parallel()
	p := start(t, 2, `
for event in events:
    note("begun")
    while event["payload"] == "slow" and not exists("go"):
        time.sleep(0.01)
    answer(event)
time.sleep(0.1)
note("finished")
`)
	slow := make(chan error)
	go func() { slow <- p.Handle(within(t, testkit.Patience), event("slow")) }()
	testkit.Eventually(t, "it is not sent", func() bool { return p.notes("begun") != nil })
	p.stop()
	select {
	case <-p.done:
		t.Error("Run has returned while something is in flight")
	case <-time.After(2 * quiet):
	}
	if err := os.WriteFile(filepath.Join(p.dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := <-slow; err != nil {
		t.Error(err)
	}
	p.ended()
	if p.notes("finished") == nil {
		t.Error("the program has not finished")
	}
	// A retry may come yet. It starts the program once more, and waits for its end.
	p.want("late")
	if got := p.notes("finished"); len(got) != 2 {
		t.Errorf("the program has finished %d times", len(got))
	}
	if got := p.lg.All("the program of the pipe"); got != nil {
		t.Errorf("%v", got)
	}
}

// What is drained after the stop is drained by one program, not by a new one for each.
func TestStopWhileMuchWaits(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
for event in events:
    time.sleep(0.01)
    answer(event)
`)
	p.want("first")
	p.stop()
	slow := 0 // how often Run, which looks every 100 ms, may have found that nothing comes any more
	before := time.Now()
	for _, payload := range hundred() {
		if time.Since(before) > 80*time.Millisecond {
			slow++
		}
		before = time.Now()
		p.want(payload)
	}
	p.ended()
	if p.restarts() > float64(slow) {
		t.Errorf("%v restarts, and %d times nothing came for a while", p.restarts(), slow)
	}
}

// A program that ignores the end of its stdin is stopped.
func TestStopOfOneThatRunsOn(t *testing.T) {
	t.Parallel()
	needsProc(t)
	p := start(t, 1, `
signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("pid", str(os.getpid()))
for event in events:
    answer(event)
while True:
    time.sleep(1000)
`)
	p.want("a")
	began := time.Now()
	p.stop()
	p.ended()
	if alive(p.notes("pid")[0]) {
		t.Error("it still runs")
	}
	if took := time.Since(began); took > testkit.Patience {
		t.Errorf("took %v", took)
	}
}

// When quit ends, Run does not wait for the program to finish.
func TestQuit(t *testing.T) {
	t.Parallel()
	p := newPipe(t, 1, `
note("pid", str(os.getpid()))
for event in events:
    answer(event)
note("eof")
time.sleep(1000)
`)
	p.setup.Grace = testkit.Patience / 2
	p.run()
	p.want("a")
	p.stop()
	testkit.Eventually(t, "its stdin is not closed", func() bool { return p.notes("eof") != nil })
	began := time.Now()
	p.quit()
	p.ended()
	if took := time.Since(began); took > testkit.Patience/4 {
		t.Errorf("took %v", took)
	}
}

// Run ends also while the program cannot be started.
func TestStopOfOneThatDiesAtStart(t *testing.T) {
	t.Parallel()
	p := newPipe(t, 1, `sys.exit(3)`)
	p.backoff.Min, p.backoff.Max = time.Hour, time.Hour
	p.run()
	p.lg.Wait(t, "the program of the pipe is started again", 1)
	err := p.Handle(within(t, 300*time.Millisecond), event("a"))
	if !notify.IsUnavailable(err) || !errors.Is(err, notify.ErrHandlerTimeout) || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("%v", err)
	}
	p.stop()
	p.ended()
}

// Without Run, as inside another handler that does not know of it, the first call starts the program.
func TestWithoutRun(t *testing.T) {
	t.Parallel()
	p := newPipe(t, 2, `
for event in events:
    answer(event)
`)
	p.want("a")
	p.want("b")
	p.run()
	p.want("c")
	if p.restarts() != 0 {
		t.Errorf("%v restarts", p.restarts())
	}
}

// A program that ends after it has had nothing to do for long is started again at once.
func TestEndsWhenIdle(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `time.sleep(0.2)`)
	for n := range 2 {
		if line := p.lg.Wait(t, "the program of the pipe is started again", n+1); line["again_in"].(float64) != 0 {
			t.Errorf("%v", line)
		}
	}
}
