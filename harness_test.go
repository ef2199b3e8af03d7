package main

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/logs"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/retry"
)

// Fast settings: what waits 10 s in production waits 1 s here.
const (
	testInterval = time.Second
	testTimeout  = time.Second
)

func TestMain(m *testing.M) {
	benchMain() // feature: outbox
	code := testkit.Main(m)
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// built is the program, once a test has needed it.
var built struct {
	once sync.Once
	dir  string
	out  []byte
	err  error
}

// program returns the path of the built program.
func program(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "pglistener"); built.err == nil {
			built.out, built.err = exec.Command("go", "build", "-o", filepath.Join(built.dir, "pglistener"), ".").CombinedOutput()
		}
	})
	if built.err != nil {
		t.Fatalf("build: %v\n%s", built.err, built.out)
	}
	return filepath.Join(built.dir, "pglistener")
}

// vars are environment variables; fast has those of every test.
type vars map[string]string

func fast(dsn, channels string, more ...vars) vars {
	v := vars{
		"DATABASE_URL":      dsn,
		"CHANNELS":          channels,
		"PING_INTERVAL":     testInterval.String(),
		"PING_TIMEOUT":      testTimeout.String(),
		"RECONNECT_MIN":     "20ms",
		"RECONNECT_MAX":     "200ms",
		"CATCH_UP_INTERVAL": "0",
		"SHUTDOWN_TIMEOUT":  "5s",
		"LOG_FORMAT":        "json",
		"LOG_LEVEL":         "debug",
	}
	for _, m := range more {
		maps.Copy(v, m)
	}
	return v
}

func (v vars) lookup(name string) (string, bool) {
	value, ok := v[name]
	return value, ok
}

// running is a Listener in this process.
type running struct {
	*testkit.Logs
	listener *Listener
	heard    chan notify.Notification // what the handler named test was given
	stop     func() (abandoned int)
}

// table adds to the handlers, or replaces some.
type table = map[string]newHandler

// with is a table in which name leads to h.
func with(name string, h notify.Handler) table {
	return table{name: func(string, Setup) (notify.Handler, error) { return h, nil }}
}

// start runs a Listener whose handlers may also be "test", which records into heard, and those of more, after
// the tweaks. It is stopped when the test ends.
func start(t *testing.T, v vars, more table, tweaks ...func(*Listener)) *running {
	t.Helper()
	r := &running{Logs: testkit.NewLogs(t), heard: make(chan notify.Notification, 100_000)}
	all := addHandlers(handlerTable())
	maps.Copy(all, more)
	maps.Copy(all, with("test", notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		r.heard <- n
		return nil
	})))
	r.listener = newTestListener(t, v, all, r.Logs)
	for _, tweak := range tweaks {
		tweak(r.listener)
	}
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan int, 1)
	go func() {
		abandoned, err := r.listener.Run(ctx)
		if err != nil {
			t.Errorf("Run: %v", err)
		}
		result <- abandoned
	}()
	var once sync.Once
	var abandoned int
	r.stop = func() int {
		t.Helper()
		once.Do(func() {
			cancel()
			select {
			case abandoned = <-result:
			case <-time.After(testkit.Patience):
				t.Error("the listener did not stop")
			}
		})
		return abandoned
	}
	t.Cleanup(func() { r.stop() })
	return r
}

// newTestListener makes a Listener as the program does, but for quicker retries.
func newTestListener(t testing.TB, v vars, handlers table, w io.Writer) *Listener {
	t.Helper()
	cfg, problems := loadConfig(v.lookup, handlers, modes())
	log := logs.New(cfg.Log, w)
	channels, wrong := makeChannels(cfg, handlers, modes(), log)
	if problems = append(problems, wrong...); len(problems) > 0 {
		t.Fatal(problems)
	}
	for i := range channels {
		channels[i].Queue.Retry = retry.Backoff{Min: 10 * time.Millisecond, Max: 50 * time.Millisecond}
	}
	return NewListener(cfg.dsn(), cfg.Listener, channels, log)
}

// readyz answers as /readyz does.
func (r *running) readyz() (code int, body string) { return answer(r.listener.Ready()) }

// livez answers as /livez does.
func (r *running) livez() (code int, body string) { return answer(r.listener.Alive()) }

func answer(err error) (code int, body string) {
	if err != nil {
		return http.StatusServiceUnavailable, err.Error()
	}
	return http.StatusOK, "ok"
}

// ready waits until the listener is.
func (r *running) ready(t *testing.T) {
	t.Helper()
	testkit.Eventually(t, "never ready", func() bool { return r.listener.Ready() == nil })
}

// stat returns a figure of the metrics, of a channel unless it is "".
func (r *running) stat(name, channel string) (value float64) {
	for _, s := range r.listener.Stats() {
		if s.Name == name && (channel == "" || slices.Equal(s.Labels[:2], []string{"channel", channel})) {
			value += s.Value
		}
	}
	return value
}

// listening waits until the listener has said so n times, reconnects included.
func (r *running) listening(t *testing.T) *running {
	t.Helper()
	r.Wait(t, "listening", 1)
	return r
}

// expect waits for the next notifications and compares their payloads.
func (r *running) expect(t *testing.T, payloads ...string) {
	t.Helper()
	for _, want := range payloads {
		select {
		case n := <-r.heard:
			if n.Payload != want {
				t.Fatalf("heard %.80q, want %.80q", n.Payload, want)
			}
		case <-time.After(testkit.Patience):
			t.Fatalf("did not hear %.80q", want)
		}
	}
}

// heardAgain sends payloads until one arrives, and returns when that was: what is sent in a gap is lost.
func (r *running) heardAgain(t *testing.T, db *sql.DB, channel string) time.Time {
	t.Helper()
	deadline := time.After(testkit.Patience)
	for i := 0; ; i++ {
		again := fmt.Sprintf("again %d", i)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, _ = db.ExecContext(ctx, "select pg_notify($1, $2)", channel, again) // the server may be down
		cancel()
		select {
		case n := <-r.heard:
			if !strings.HasPrefix(n.Payload, "again ") {
				continue
			}
			return time.Now()
		case <-time.After(20 * time.Millisecond):
		case <-deadline:
			t.Fatal("never heard again")
		}
	}
}

// extra skips what takes too long for make test; make test-extra runs it.
func extra(t *testing.T) {
	t.Helper()
	if os.Getenv("TEST_EXTRA") == "" {
		t.Skip("make test-extra runs it")
	}
	t.Parallel()
}
