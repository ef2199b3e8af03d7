//go:build unix

package pipe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/proc"
	"github.com/pglistener/pglistener/internal/retry"
)

const grace = 500 * time.Millisecond

// prelude begins each program of the tests.
const prelude = `
import json, os, signal, subprocess, sys, threading, time

def say(text):
    os.write(1, text.encode())

def answer(event, **more):
    say(json.dumps({"id": event["id"], **(more or {"ok": True})}) + "\n")

def note(name, text="x"):  # in a file of the test's directory
    with open(os.path.join(sys.argv[1], name), "a") as f:
        f.write(text + "\n")

def exists(name):
    return os.path.exists(os.path.join(sys.argv[1], name))

events = (json.loads(line) for line in sys.stdin)
`

// pipe is a handler of a test, with what belongs to it.
type pipe struct {
	*handler
	t    *testing.T
	lg   *testkit.Logs
	dir  string // of the program's notes
	stop func() // ends Run's stop
	quit func() // and its quit
	done chan struct{}
}

// make makes the handler of a program in Python.
func newPipe(t *testing.T, concurrency int, program string) *pipe {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "program.py")
	if err := os.WriteFile(path, []byte(prelude+program), 0o644); err != nil {
		t.Fatal(err)
	}
	p := &pipe{t: t, lg: testkit.NewLogs(t), dir: dir}
	h, err := New(testkit.Python(t)+" "+path+" "+dir, proc.Settings{}, concurrency, notify.Setup{
		Channel: "orders", Log: p.lg.Logger(), LogPayloads: true, Grace: grace,
	})
	if err != nil {
		t.Fatal(err)
	}
	p.handler = h.(*handler)
	p.backoff = retry.Backoff{Min: 10 * time.Millisecond, Max: 100 * time.Millisecond}
	return p
}

// start makes the handler of a program and runs it until the end of the test.
func start(t *testing.T, concurrency int, program string) *pipe {
	t.Helper()
	p := newPipe(t, concurrency, program)
	p.run()
	return p
}

func (p *pipe) run() {
	var stop, quit context.Context
	stop, p.stop = context.WithCancel(context.Background())
	quit, p.quit = context.WithCancel(context.Background())
	p.done = make(chan struct{})
	go func() {
		defer close(p.done)
		p.Run(stop, quit)
	}()
	p.t.Cleanup(func() {
		p.stop()
		p.quit()
		p.ended()
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.suspects) != 0 || len(p.items) != 0 || len(p.waiting) != 0 || p.kept != nil {
			p.t.Errorf("left: %d suspects, %d items, %d waiting, kept: %v", len(p.suspects), len(p.items), len(p.waiting), p.kept != nil)
		}
	})
}

// ended waits until Run has returned.
func (p *pipe) ended() {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(testkit.Patience):
		p.t.Fatal("Run does not return")
	}
}

// within is a context as a queue makes it.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, notify.ErrHandlerTimeout)
	t.Cleanup(cancel)
	return ctx
}

// event is one of the channel, whose payload is also its id.
func event(payload string) notify.Notification {
	return notify.Notification{Channel: "orders", Key: payload, Payload: payload, Attempt: 1}
}

// one handles one event, with plenty of time.
func (p *pipe) one(payload string) error {
	p.t.Helper()
	return p.Handle(within(p.t, testkit.Patience), event(payload))
}

// want handles one event, and it must succeed.
func (p *pipe) want(payload string) {
	p.t.Helper()
	if err := p.one(payload); err != nil {
		p.t.Errorf("%s: %v", payload, err)
	}
}

// each handles events at once, begun in this order. It returns what became of them.
func (p *pipe) each(limit func(payload string) time.Duration, payloads ...string) map[string]error {
	p.t.Helper()
	results := map[string]error{}
	var mu sync.Mutex
	var all sync.WaitGroup
	for i, payload := range payloads {
		ctx := within(p.t, limit(payload))
		before := p.called()
		all.Go(func() {
			err := p.Handle(ctx, event(payload))
			mu.Lock()
			defer mu.Unlock()
			results[payload] = err
		})
		testkit.Eventually(p.t, fmt.Sprintf("call %d does not begin", i), func() bool { return p.called() > before })
	}
	all.Wait()
	return results
}

func (p *pipe) called() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls
}

// ample is so much that half of it, within which all must be sent, is enough on a busy machine for those behind many others.
func ample(string) time.Duration { return 3 * testkit.Patience }

// notes are the lines that the program has noted.
func (p *pipe) notes(name string) []string {
	data, _ := os.ReadFile(filepath.Join(p.dir, name))
	if len(data) == 0 || data[len(data)-1] != '\n' {
		return nil // not yet written
	}
	return strings.Fields(string(data))
}

// stat is a figure.
func (p *pipe) stat(name string) float64 {
	p.t.Helper()
	for _, s := range p.Stats() {
		if s.Name == name {
			return s.Value
		}
	}
	p.t.Fatalf("no figure %s", name)
	return 0
}

func (p *pipe) notUnderstood() float64 { return p.stat("pglistener_pipe_not_understood_total") }

func (p *pipe) restarts() float64 { return p.stat("pglistener_pipe_restarts_total") }

// hundred are payloads 000 to 099.
func hundred() (all []string) {
	for i := range 100 {
		all = append(all, fmt.Sprintf("%03d", i))
	}
	return all
}

// charged are those that failed for a reason of their own.
func charged(results map[string]error) (all []string) {
	for payload, err := range results {
		if err != nil && !notify.IsUnavailable(err) {
			all = append(all, payload)
		}
	}
	slices.Sort(all)
	return all
}

// failed are those that failed at all.
func failed(results map[string]error) (all []string) {
	for payload, err := range results {
		if err != nil {
			all = append(all, payload)
		}
	}
	slices.Sort(all)
	return all
}

// alive says whether a process with this pid is there and not a zombie.
func alive(pid string) bool {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func needsProc(t *testing.T) {
	t.Helper()
	if runtime.GOOS != "linux" {
		testkit.Skip(t, "needs /proc to see processes")
	}
}

// What a notification carries arrives, and nothing of it in the arguments or the environment.
func TestEventArrives(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
for event in events:
    note("argv", "|".join(sys.argv[2:]) + os.environ["PGLISTENER_CHANNEL"])
    with open(os.path.join(sys.argv[1], "event"), "w") as f:
        json.dump(event, f)
    answer(event)
`)
	at := time.Date(2026, 1, 2, 3, 4, 5, 678_000_000, time.FixedZone("", 3600))
	err := p.Handle(within(t, testkit.Patience), notify.Notification{
		Key: "a-b", Channel: "or\"ders", Payload: "x; $(exit 9)\n`y`\t\u2028\u0085ü\xff\\\"", Attempt: 3, CreatedAt: at, RunAt: at.Add(time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"id": "a-b", "channel": "or\"ders", "payload": "x; $(exit 9)\n` + "`y`" + `\t\u2028\u0085\u00fc\ufffd\\\"", "attempt": 3, "created_at": "2026-01-02T02:04:05.678Z", "run_at": "2026-01-02T03:04:05.678Z"}`
	if got := testkit.ReadFile(t, filepath.Join(p.dir, "event")); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := p.notes("argv"); !slices.Equal(got, []string{"orders"}) {
		t.Errorf("arguments and PGLISTENER_CHANNEL: %q", got)
	}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
for event in events:
    say(event["payload"].replace("ID", event["id"]) + "\n")
`)
	type verdict struct {
		ok, permanent, unavailable bool
		after                      time.Duration
		text                       string
	}
	for line, want := range map[string]verdict{
		`{"id":"ID","ok":true}`:                                       {ok: true},
		` { "id" : "ID" , "ok" : true } `:                             {ok: true},
		`{"ok":true,"id":"ID"}`:                                       {ok: true},
		`{"id":"ID","ok":true,"error":null,"took":7}`:                 {ok: true},
		`{"id":"ID","ok":false}`:                                      {text: "not why"},
		`{"id":"ID","error":""}`:                                      {text: "not why"},
		`{"id":"ID","ok":true,"error":"but no"}`:                      {text: "but no"},
		`{"id":"ID","error":"bad \u00fc"}`:                            {text: "bad ü"},
		`{"id":"ID","error":"no","permanent":true}`:                   {text: "no", permanent: true},
		`{"id":"ID","error":"no","unavailable":true}`:                 {text: "no", unavailable: true},
		`{"id":"ID","error":"no","retry_after":1.5}`:                  {text: "no", after: 1500 * time.Millisecond},
		`{"id":"ID","error":"no","retry_after":1e300}`:                {text: "no", after: 24 * time.Hour},
		`{"id":"ID","error":"no","retry_after":-5}`:                   {text: "no"},
		`{"id":"ID","error":"` + strings.Repeat("é", 70_000) + `"}`:   {text: "éé"},
		`{"id":"ID","error":"a","unavailable":true,"retry_after":60}`: {text: "a", unavailable: true, after: time.Minute},
	} {
		err := p.Handle(within(t, testkit.Patience), notify.Notification{Key: "k", Payload: line})
		got := verdict{ok: err == nil, permanent: notify.IsPermanent(err), unavailable: notify.IsUnavailable(err), after: notify.RetryDelay(err), text: want.text}
		if got != want || err != nil && (!strings.Contains(err.Error(), want.text) || len(err.Error()) > 2200) {
			t.Errorf("%.80s: %+v, %.300v", line, got, err)
		}
	}
	if p.notUnderstood() != 0 || p.restarts() != 0 {
		t.Errorf("%v lines not understood, %v restarts", p.notUnderstood(), p.restarts())
	}
}

// With LOG_PAYLOADS=false neither an error nor the log quotes the program.
func TestSecretAnswers(t *testing.T) {
	t.Parallel()
	p := newPipe(t, 1, `
for event in events:
    if event["payload"] == "dies":
        sys.stderr.write("swordfish\n")
        sys.exit(1)
    say("hunter2\n")
    answer(event, error="hunter2", permanent=True)
`)
	p.setup.LogPayloads = false
	p.run()
	if err := p.one("a"); !notify.IsPermanent(err) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("%v", err)
	}
	p.lg.Wait(t, "a line of the program is no answer", 1)
	if strings.Contains(p.lg.String(), "hunter2") {
		t.Error("the log quotes the program")
	}
	if err := p.one("dies"); err == nil || strings.Contains(err.Error(), "swordfish") {
		t.Errorf("%v", err)
	}
}

// The order is that of the calls with CONCURRENCY=1, also over the death of a program.
func TestOrderIsKept(t *testing.T) {
	t.Parallel()
	p := start(t, 1, `
for event in events:
    if event["payload"] == "050" and not exists("died"):
        note("died")
        os._exit(1)
    note("order", event["payload"])
    answer(event)
`)
	for _, payload := range hundred() {
		err := p.one(payload)
		if payload == "050" {
			if err == nil || notify.IsUnavailable(err) {
				t.Errorf("it was alone when the program died, and got %v", err)
			}
			err = p.one(payload)
		}
		if err != nil {
			t.Fatalf("%s: %v", payload, err)
		}
	}
	if got := p.notes("order"); !slices.Equal(got, hundred()) {
		t.Errorf("%v", got)
	}
}

// As many as CONCURRENCY are in flight, and answers may come in any order.
func TestAnswersInAnyOrder(t *testing.T) {
	t.Parallel()
	p := start(t, 4, `
held = []
for event in events:
    held.append(event)
    if len(held) == 4:
        for e in reversed(held):
            answer(e)
        held = []
`)
	if bad := failed(p.each(ample, hundred()...)); bad != nil {
		t.Errorf("failed: %v", bad)
	}
}

// Never more than CONCURRENCY are in flight, whoever calls.
func TestConcurrencyIsKept(t *testing.T) {
	t.Parallel()
	p := start(t, 4, `
lock, held = threading.Lock(), 0
def work(event):
    global held
    with lock:
        held += 1
        note("held", str(held))
    time.sleep(0.01)
    with lock:
        held -= 1
    answer(event)
for event in events:
    threading.Thread(target=work, args=(event,)).start()
`)
	if bad := failed(p.each(ample, hundred()...)); bad != nil {
		t.Errorf("failed: %v", bad)
	}
	for _, held := range p.notes("held") {
		if held > "4" || len(held) > 1 {
			t.Errorf("%s were in flight", held)
		}
	}
}

// The same id cannot be in flight twice: the answers could not be told apart.
func TestSameIDTwice(t *testing.T) {
	t.Parallel()
	p := start(t, 2, `
for event in events:
    note("seen")
    while not exists("go"):
        time.sleep(0.01)
    answer(event)
`)
	first := make(chan error)
	go func() { first <- p.Handle(within(t, testkit.Patience), event("a")) }()
	testkit.Eventually(t, "it is not sent", func() bool { return p.notes("seen") != nil })
	if err := p.one("a"); err == nil || !strings.Contains(err.Error(), "in flight already") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(filepath.Join(p.dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
	p.want("a") // afterwards it can
}

// The programs of docs/handlers.md, exactly as they stand there.
func TestExamplePrograms(t *testing.T) {
	t.Parallel()
	for language, interpreter := range map[string]string{"python": "python3", "javascript": "node", "shell": "sh"} {
		t.Run(language, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath(interpreter); err != nil {
				testkit.Skip(t, "needs "+interpreter)
			}
			path := testkit.Program(t, "../../docs/handlers.md", language)
			if lines := strings.Count(testkit.ReadFile(t, path), "\n"); lines > 13 {
				t.Errorf("%d lines are no ten", lines)
			}
			journal := filepath.Join(t.TempDir(), "journal")
			lg := testkit.NewLogs(t)
			made, err := New(path+" "+journal, proc.Settings{}, 10, notify.Setup{Log: lg.Logger(), LogPayloads: true, Grace: grace})
			if err != nil {
				t.Fatal(err)
			}
			p := &pipe{handler: made.(*handler), t: t, lg: lg}
			if text, err := p.check(t.Context(), time.Millisecond, testkit.Patience); err != nil || !strings.Contains(text, "ends when its stdin does") {
				t.Errorf("check: %s, %v", text, err)
			}
			p.run()
			payloads := append(hundred(), "a b 'c' $(d)", "ü\u2028€", `{id:1,payload:2}`)
			if bad := failed(p.each(ample, payloads...)); bad != nil {
				t.Errorf("failed: %v", bad)
			}
			p.stop()
			p.ended()
			got := strings.Split(strings.TrimSuffix(testkit.ReadFile(t, journal), "\n"), "\n")
			want := slices.Clone(payloads)
			if language == "shell" { // it has no library
				want[101] = `ü\u2028€`
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("journal: %q", got)
			}
			if p.notUnderstood() != 0 || p.restarts() != 0 || len(lg.All("")) != 0 {
				t.Errorf("%v lines not understood, %v restarts", p.notUnderstood(), p.restarts())
			}
			// What cannot be done is an answer too. A directory cannot be appended to, whoever runs this.
			if language == "python" {
				return // it opens the file once
			}
			if err := errors.Join(os.Remove(journal), os.Mkdir(journal, 0o755)); err != nil {
				t.Fatal(err)
			}
			if err := p.one("again"); err == nil || notify.IsUnavailable(err) || notify.IsPermanent(err) || strings.Contains(err.Error(), "no answer") {
				t.Errorf("%v", err)
			}
		})
	}
}

// What the listener alone needs is not handed to programs, not even when nothing else is.
func TestInheritsNoSecrets(t *testing.T) {
	t.Setenv("WEBHOOK_SECRET", "hunter2")
	t.Setenv("APP_KEY", "7")
	for pass, want := range map[string]string{"": "APP_KEY PGLISTENER_CHANNEL", "OTHER": "PGLISTENER_CHANNEL"} {
		env, err := exec.LookPath("env")
		if err != nil {
			t.Fatal(err)
		}
		lg := testkit.NewLogs(t)
		h, err := New("sh -c '"+env+" >&2; cat >/dev/null'", proc.Settings{Pass: pass}, 1, notify.Setup{Channel: "orders", Log: lg.Logger(), Grace: grace})
		if err != nil {
			t.Fatal(err)
		}
		p := &pipe{handler: h.(*handler), t: t, lg: lg}
		p.run()
		lg.Wait(t, "output", 1)
		p.stop()
		p.ended()
		var names []string
		for _, line := range lg.All("output") {
			name, _, _ := strings.Cut(line["line"].(string), "=")
			if slices.Contains([]string{"WEBHOOK_SECRET", "APP_KEY", "PGLISTENER_CHANNEL"}, name) {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != want {
			t.Errorf("ENV_PASS=%s: %s, want %s", pass, got, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	for command, want := range map[string]string{
		"": "needs a program", "cat | wc": "no shell", "cat 2>/dev/null": "no shell", "no-such-program": "not in PATH", "/no/such": "does not exist",
	} {
		if _, err := New(command, proc.Settings{}, 1, notify.Setup{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", command, err)
		}
	}
	if _, err := New(`cat ""`, proc.Settings{}, 1, notify.Setup{}); err != nil {
		t.Errorf("an empty argument: %v", err)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ program, text, failure string }{
		"good":              {program: "for event in events: pass", text: "ends when its stdin does"},
		"slow":              {program: "time.sleep(0.5)\nfor event in events: pass", text: "ends when its stdin does"},
		"does not end":      {program: "time.sleep(1000)", text: "was stopped because it did not end"},
		"ignores SIGTERM":   {program: "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1000)", text: "was stopped because it did not end"},
		"ends at once":      {program: "", failure: "ended at once"},
		"fails at once":     {program: "import no_such_module", failure: "exit status 1: Traceback (most recent call last): File"},
		"fails after while": {program: "time.sleep(0.5)\nimport no_such_module", failure: "No module named 'no_such_module'"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPipe(t, 1, "note('pid', str(os.getpid()))\n"+c.program)
			open, closed := 300*time.Millisecond, testkit.Patience // however slow this machine is
			switch {
			case strings.HasSuffix(name, "at once"):
				open = testkit.Patience
			case strings.Contains(c.text, "stopped"):
				closed = 2 * time.Second
			}
			text, err := p.check(within(t, 3*testkit.Patience), open, closed)
			if c.failure == "" && (err != nil || !strings.Contains(text, c.text)) || c.failure != "" && (err == nil || !strings.Contains(err.Error(), c.failure)) {
				t.Errorf("%s, %v", text, err)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("more than a line: %q", err)
			}
			for _, pid := range p.notes("pid") {
				if runtime.GOOS == "linux" && alive(pid) {
					t.Error("it still runs")
				}
			}
		})
	}
	t.Run("cannot be started", func(t *testing.T) {
		t.Parallel()
		p := newPipe(t, 1, "")
		p.path = filepath.Join(p.dir, "gone")
		if _, err := p.Check(t.Context()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v", err)
		}
	})
	t.Run("no time", func(t *testing.T) {
		t.Parallel()
		p := newPipe(t, 1, "time.sleep(1000)")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := p.Check(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	})
}
