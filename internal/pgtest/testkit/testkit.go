//go:build unix

// Package testkit is what the tests of all packages have in common: a shared
// server that starts with the first test that needs one, faults, waiting for
// events, and reading a program's log.
package testkit

import (
	"context"
	"database/sql"
	"errors"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/pgtest"
)

// Patience is how long a test waits for what should come at once. Bounds that a
// test is about are checked apart from it.
const Patience = 20 * time.Second

// shared is the server of all tests of a package that neither stop nor freeze it.
var shared struct {
	once   sync.Once
	server *pgtest.Server // nil when TEST_DATABASE_URL names the server
	dsn    string
	db     *sql.DB
	err    error
}

// Main is for TestMain: it runs the tests, ends the shared server if one was
// started, and returns the exit code.
func Main(m *testing.M) int {
	// What the tests say is what holds, not what the developer's shell says.
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "PG") && !strings.HasPrefix(name, "PGTEST") {
			os.Unsetenv(name)
		}
	}
	defer func() {
		if shared.db != nil {
			shared.db.Close()
		}
		if shared.server != nil {
			shared.server.Close()
		}
	}()
	return m.Run()
}

func share(t testing.TB) {
	t.Helper()
	shared.once.Do(func() {
		if shared.dsn = os.Getenv("TEST_DATABASE_URL"); shared.dsn == "" {
			if shared.server, shared.err = pgtest.Start("max_connections = 300"); shared.err != nil {
				return
			}
			shared.dsn = shared.server.DSN()
		}
		if shared.db, shared.err = sql.Open("postgres", shared.dsn); shared.err == nil {
			shared.err = shared.db.Ping()
		}
	})
	if shared.err != nil {
		t.Fatalf("test server: %v", shared.err)
	}
}

// DSN is the shared server's.
func DSN(t testing.TB) string {
	t.Helper()
	share(t)
	return shared.dsn
}

// DB is a pool of connections to the shared server.
func DB(t testing.TB) *sql.DB {
	t.Helper()
	share(t)
	return shared.db
}

// LocalServer is the shared server, for a test that needs more of it than a DSN.
// Where TEST_DATABASE_URL names another one the test is skipped.
func LocalServer(t *testing.T) *pgtest.Server {
	t.Helper()
	share(t)
	if shared.server == nil {
		Skip(t, "needs a local server; TEST_DATABASE_URL is set")
	}
	return shared.server
}

// Skip skips a test for a stated reason, except in CI, where a gap is a failure.
func Skip(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("skipped under CI: %s", reason)
	}
	t.Skip(reason)
}

// OwnServer starts a server for a test that stops, freezes or reconfigures it.
func OwnServer(t *testing.T, settings ...string) *pgtest.Server {
	t.Helper()
	if os.Getenv("TEST_DATABASE_URL") != "" {
		Skip(t, "needs a server of its own to stop, freeze or configure; TEST_DATABASE_URL is set")
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

// StandbyOf makes a hot standby of a server.
func StandbyOf(t *testing.T, primary *pgtest.Server) *pgtest.Server {
	t.Helper()
	standby, err := primary.Standby()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(standby.Close)
	return standby
}

// Open opens a database for a test's own statements.
func Open(t *testing.T, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// Proxied puts a proxy before the server of a DSN, and returns the DSN through it.
func Proxied(t *testing.T, dsn string) (string, *pgtest.Proxy) {
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

// Bouncer starts a PgBouncer before a server and returns the DSN through it.
func Bouncer(t *testing.T, s *pgtest.Server, mode string) string {
	t.Helper()
	b, err := s.Bouncer(mode)
	if errors.Is(err, pgtest.ErrNoBouncer) {
		Skip(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return pgtest.DSN(b.Addr)
}

// FreshAddress returns an address of the loopback interface that nobody listens on.
func FreshAddress(t *testing.T) string {
	t.Helper()
	port, err := pgtest.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}

// ChannelName is a channel of this test's own.
func ChannelName(t testing.TB) string {
	return strings.ToLower(strings.NewReplacer("/", "_", " ", "_").Replace(t.Name()))
}

// Send sends a payload through the shared server.
func Send(t testing.TB, channel, payload string) {
	t.Helper()
	SendOn(t, DB(t), channel, payload)
}

// SendOn sends a payload through a server.
func SendOn(t testing.TB, db *sql.DB, channel, payload string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	if _, err := db.ExecContext(ctx, "select pg_notify($1, $2)", channel, payload); err != nil {
		t.Fatalf("notify: %v", err)
	}
}

// Exec runs a statement.
func Exec(t testing.TB, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.ExecContext(t.Context(), query, args...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

// Backends returns the process ids of the sessions with an application_name.
func Backends(t *testing.T, db *sql.DB, application string) []int {
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

// WithParams adds parameters to a DSN that is a URL.
func WithParams(dsn string, keyValues ...string) string {
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

// WithUser is a DSN that is a URL, for another user.
func WithUser(dsn, user, password string) string {
	u, err := url.Parse(dsn)
	if err != nil {
		panic(err)
	}
	u.User = url.UserPassword(user, password)
	return u.String()
}

// Eventually waits until ok, for what has no event to wait for.
func Eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// Python is the interpreter itself: what is found in PATH may be a script that looks for it, which is slow.
func Python(t testing.TB) (path string) {
	t.Helper()
	if path = python(); path == "" {
		Skip(t, "needs python3")
	}
	return path
}

var python = sync.OnceValue(func() string {
	path, err := exec.Command("python3", "-c", "import sys; print(sys.executable)").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(path))
})

// Program writes the first program in a language that a document shows, exactly as it stands there, and returns its path.
func Program(t testing.TB, document, language string) (path string) {
	t.Helper()
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "```"+language+"\n")
	program, _, found := strings.Cut(rest, "```")
	path = filepath.Join(t.TempDir(), "program")
	if err := WriteProgram(path, program); err != nil || !found {
		t.Fatalf("%s: no program in %s: %v", document, language, err)
	}
	return path
}

// WriteProgram writes a file that is to be run. No program is started meanwhile: it would have the file open for a moment, and what
// is open for writing cannot be run.
func WriteProgram(path, text string) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, []byte(text), 0o755)
}

// ReadFile returns a file's text.
func ReadFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
