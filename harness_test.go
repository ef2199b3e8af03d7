package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/benchside"
	"github.com/pglistener/pglistener/internal/pgtest"
)

// patience is how long a test waits for what should come at once. Bounds that a test
// is about are checked apart from it.
const patience = 20 * time.Second

// Fast settings: what waits 10 s in production waits 1 s here.
const (
	testInterval = time.Second
	testTimeout  = time.Second
)

// shared is the server of all tests that neither stop nor freeze it, and program
// the built binary. Both are made by TestMain.
var (
	sharedDSN    string
	sharedServer *pgtest.Server // nil when TEST_DATABASE_URL names the server
	sharedDB     *sql.DB
	program      string
)

func TestMain(m *testing.M) {
	if task, ok := benchside.FromEnv(); ok {
		benchSide(task)
	}
	code, err := setUpAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func setUpAndRun(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "pglistener")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "pglistener")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build: %w\n%s", err, out)
	}
	if sharedDSN = os.Getenv("TEST_DATABASE_URL"); sharedDSN == "" {
		sharedServer, err = pgtest.Start("max_connections = 200")
		if err != nil {
			return 0, err
		}
		defer sharedServer.Close()
		sharedDSN = sharedServer.DSN()
	}
	// What the tests say is what holds, not what the developer's shell says.
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "PG") {
			os.Unsetenv(name)
		}
	}
	sharedDB, err = sql.Open("postgres", sharedDSN)
	if err != nil {
		return 0, errors.New("TEST_DATABASE_URL is not a connection string")
	}
	defer sharedDB.Close()
	if err := sharedDB.Ping(); err != nil {
		return 0, fmt.Errorf("test server: %w", err)
	}
	return m.Run(), nil
}

// skip skips a test for a stated reason, except in CI, where a gap is a failure.
func skip(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("skipped under CI: %s", reason)
	}
	t.Skip(reason)
}

// ownServer starts a server for a test that stops, freezes or reconfigures it.
func ownServer(t *testing.T, settings ...string) *pgtest.Server {
	t.Helper()
	if os.Getenv("TEST_DATABASE_URL") != "" {
		skip(t, "needs a server of its own to stop, freeze or configure; TEST_DATABASE_URL is set")
	}
	s, err := pgtest.Start(settings...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("server log:\n%s", s.Log())
		}
	})
	return s
}

// standbyOf makes a hot standby of a server.
func standbyOf(t *testing.T, primary *pgtest.Server) *pgtest.Server {
	t.Helper()
	standby, err := primary.Standby()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(standby.Close)
	return standby
}

// testDB opens a database for a test's own statements.
func testDB(t *testing.T, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// proxied puts a proxy before the server of a DSN, and returns the DSN through it.
func proxied(t *testing.T, dsn string) (string, *pgtest.Proxy) {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil || u.Port() == "" {
		t.Fatal("the test server's DSN must be a URL with a port")
	}
	p, err := pgtest.NewProxy(u.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	u.Host = p.Addr()
	return u.String(), p
}

// channelName is a channel of this test's own.
func channelName(t *testing.T) string {
	return strings.ToLower(strings.NewReplacer("/", "_", " ", "_").Replace(t.Name()))
}

// notify sends a payload through the shared server.
func notify(t *testing.T, channel, payload string) {
	t.Helper()
	notifyOn(t, sharedDB, channel, payload)
}

func notifyOn(t *testing.T, db *sql.DB, channel, payload string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := db.ExecContext(ctx, "select pg_notify($1, $2)", channel, payload); err != nil {
		t.Fatalf("notify: %v", err)
	}
}

// execSQL runs a statement, retrying while the server is coming up.
func execSQL(t *testing.T, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.ExecContext(t.Context(), query, args...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

// backends returns the process ids of the sessions with an application_name.
func backends(t *testing.T, db *sql.DB, application string) []int {
	t.Helper()
	var pids pq.Int64Array
	err := db.QueryRowContext(t.Context(),
		"select coalesce(array_agg(pid), '{}') from pg_stat_activity where application_name = $1", application).Scan(&pids)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]int, len(pids))
	for i, pid := range pids {
		out[i] = int(pid)
	}
	return out
}

// withParams adds parameters to a DSN that is a URL.
func withParams(dsn string, keyValues ...string) string {
	u, err := url.Parse(dsn)
	if err != nil {
		panic(err)
	}
	q := u.Query()
	for i := 0; i < len(keyValues); i += 2 {
		q.Set(keyValues[i], keyValues[i+1])
	}
	u.RawQuery = q.Encode()
	return u.String()
}

// withUser is a DSN that is a URL, for another user.
func withUser(dsn, user, password string) string {
	u, err := url.Parse(dsn)
	if err != nil {
		panic(err)
	}
	u.User = url.UserPassword(user, password)
	return u.String()
}

// logs collects a program's JSON log, and lets a test wait for a line of it.
type logs struct {
	mu      sync.Mutex
	partial []byte
	text    bytes.Buffer
	lines   []logLine
	changed chan struct{}
}

type logLine map[string]any

func newLogs(t *testing.T) *logs {
	l := &logs{changed: make(chan struct{})}
	t.Cleanup(func() {
		if t.Failed() {
			l.mu.Lock()
			defer l.mu.Unlock()
			text := l.text.String()
			t.Logf("log:\n%s", text[max(0, len(text)-20_000):])
		}
	})
	return l
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	l.partial = append(l.partial, p...)
	for {
		line, rest, ok := bytes.Cut(l.partial, []byte("\n"))
		if !ok {
			break
		}
		var parsed logLine
		if json.Unmarshal(line, &parsed) != nil {
			parsed = logLine{"msg": string(line)} // what is said before the log is set up
		}
		l.lines = append(l.lines, parsed)
		l.partial = rest
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return len(p), nil
}

// all returns the lines so far whose message begins with msg.
func (l *logs) all(msg string) []logLine {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.matching(msg)
}

func (l *logs) matching(msg string) []logLine {
	var out []logLine
	for _, line := range l.lines {
		if strings.HasPrefix(line["msg"].(string), msg) {
			out = append(out, line)
		}
	}
	return out
}

// wait waits for the nth line, counted from 1, whose message begins with msg.
func (l *logs) wait(t *testing.T, msg string, n int) logLine {
	t.Helper()
	deadline := time.After(patience)
	for {
		l.mu.Lock()
		found, changed := l.matching(msg), l.changed
		l.mu.Unlock()
		if len(found) >= n {
			return found[n-1]
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("no %q in the log %d times, only %d", msg, n, len(found))
		}
	}
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
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
	*logs
	listener *Listener
	heard    chan Notification // what the handler named test was given
	stop     func() (abandoned int)
}

// start runs a Listener whose handlers may also be "test", which records into heard,
// and those of table, after the tweaks. It is stopped when the test ends.
func start(t *testing.T, v vars, table map[string]newHandler, tweaks ...func(*Listener)) *running {
	t.Helper()
	r := &running{logs: newLogs(t), heard: make(chan Notification, 100_000)}
	all := allHandlers()
	maps.Copy(all, table)
	all["test"] = func(string, env) (Handler, error) {
		return HandlerFunc(func(_ context.Context, n Notification) error {
			r.heard <- n
			return nil
		}), nil
	}
	cfg, problems := loadConfig(v.lookup, all)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	log := cfg.logger(r.logs)
	l, err := NewListener(cfg, all, newSupervisor(vars{}.lookup, log), log)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range l.workers {
		w.limits.retry = backoff{min: 10 * time.Millisecond, max: 50 * time.Millisecond}
	}
	for _, tweak := range tweaks {
		tweak(l)
	}
	r.listener = l
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan int, 1)
	go func() {
		abandoned, err := l.Run(ctx)
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
			case <-time.After(patience):
				t.Error("the listener did not stop")
			}
		})
		return abandoned
	}
	t.Cleanup(func() { r.stop() })
	return r
}

// listening waits until the listener has said so n times, reconnects included.
func (r *running) listening(t *testing.T) *running {
	t.Helper()
	r.wait(t, "listening", 1)
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
		case <-time.After(patience):
			t.Fatalf("did not hear %.80q", want)
		}
	}
}

// heardAgain sends payloads until one arrives, and returns when that was: what is sent in a gap is lost.
func (r *running) heardAgain(t *testing.T, db *sql.DB, channel string) time.Time {
	t.Helper()
	deadline := time.After(patience)
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
