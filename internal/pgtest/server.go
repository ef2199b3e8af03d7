//go:build unix

// Package pgtest starts throwaway PostgreSQL servers and puts a faulty network
// in front of them. The tests and the demo use it; the listener does not.
package pgtest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ErrNotFound means that no PostgreSQL server programs are on this machine.
var ErrNotFound = errors.New("no PostgreSQL server found (initdb, postgres); " +
	"Debian: apt-get install postgresql; macOS: brew install postgresql; " +
	"or docker compose -f docker-compose.test.yml up -d --wait, and set TEST_DATABASE_URL")

// ErrNoBouncer means that there is no PgBouncer on this machine.
var ErrNoBouncer = errors.New("no PgBouncer found; Debian: apt-get install pgbouncer; macOS: brew install pgbouncer")

// Database is the database and User the superuser that every server has.
const (
	Database = "postgres"
	User     = "postgres"
)

// commandTimeout bounds each run of initdb, pg_ctl and cp.
const commandTimeout = time.Minute

// binVar is the environment variable that names the directory of the programs to use;
// versions.sh has directories for it.
const binVar = "PGTEST_BIN"

// binDir is the variable's value when the process began: tests remove the variables that
// begin with PG, and the servers they start after that must be of the same version.
var binDir = os.Getenv(binVar)

// Server is a PostgreSQL server in a directory of its own.
// Its methods must not be called from two goroutines at once.
type Server struct {
	Port int    // on 127.0.0.1
	Dir  string // data directory; the unix socket lies beside it

	bin  string
	root string // everything of this server; removed by Close
}

// Bin returns the directory of the server's programs: PGTEST_BIN, as the process was
// started with it; else where PATH says; else the newest version in the places where
// packages put them. It returns ErrNotFound where there is none, and an error where
// PGTEST_BIN is set and is not the absolute path of a directory with initdb.
func Bin() (string, error) {
	if binDir != "" {
		if !filepath.IsAbs(binDir) {
			return "", fmt.Errorf("%s: %q is not an absolute path", binVar, binDir)
		}
		if _, err := exec.LookPath(filepath.Join(binDir, "initdb")); err != nil {
			return "", fmt.Errorf("%s: %w", binVar, err)
		}
		return filepath.Clean(binDir), nil
	}
	if p, err := exec.LookPath("initdb"); err == nil {
		// A link in PATH may stand alone; what is needed lies beside its target.
		if p, err = filepath.EvalSymlinks(p); err == nil {
			return filepath.Dir(p), nil
		}
	}
	var found []string
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin/initdb",
		"/usr/pgsql-*/bin/initdb",
		"/opt/homebrew/opt/postgresql@*/bin/initdb",
		"/usr/local/opt/postgresql@*/bin/initdb",
		"/usr/local/pgsql/bin/initdb",
		"/Applications/Postgres.app/Contents/Versions/*/bin/initdb",
	} {
		matches, _ := filepath.Glob(pattern)
		found = append(found, matches...)
	}
	if len(found) == 0 {
		return "", ErrNotFound
	}
	newest := slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) })
	return filepath.Dir(newest), nil
}

// version returns the first number in a path, the major version in all of Bin's patterns.
func version(path string) int {
	digits := strings.FieldsFunc(path, func(r rune) bool { return r < '0' || r > '9' })
	if len(digits) == 0 {
		return 0
	}
	n, _ := strconv.Atoi(digits[0])
	return n
}

// Start makes a new server and starts it; settings are lines of postgresql.conf.
// It blocks until the server accepts connections. Call Close when done.
func Start(settings ...string) (*Server, error) {
	bin, err := Bin()
	if err != nil {
		return nil, err
	}
	s, err := newServer(bin)
	if err != nil {
		return nil, err
	}
	err = s.command("initdb", "-D", s.Dir, "-U", User, "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
	if err == nil {
		err = s.configure(append([]string{
			"fsync = off",
			"synchronous_commit = off",
			"max_connections = 50",
			"log_min_messages = warning",
		}, settings...)...)
	}
	if err == nil {
		err = s.Start()
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// newServer makes a server without files, to run with the programs in bin.
func newServer(bin string) (*Server, error) {
	root, err := os.MkdirTemp("", "pgtest")
	if err != nil {
		return nil, err
	}
	s := &Server{Dir: filepath.Join(root, "data"), bin: bin, root: root}
	if cred := s.credential(); cred != nil {
		if err := os.Chown(root, int(cred.Uid), int(cred.Gid)); err != nil {
			return nil, err
		}
	}
	s.Port, err = FreePort()
	return s, err
}

// configure adds where the server listens, and settings, to its configuration.
func (s *Server) configure(settings ...string) error {
	return s.Append("postgresql.conf", append([]string{
		"listen_addresses = '127.0.0.1'",
		fmt.Sprintf("port = %d", s.Port),
		fmt.Sprintf("unix_socket_directories = '%s'", s.root),
	}, settings...)...)
}

// Append adds lines to a file of the data directory, such as postgresql.conf.
func (s *Server) Append(name string, lines ...string) error {
	return s.WriteFile(name, os.O_APPEND, []byte(strings.Join(lines, "\n")+"\n"))
}

// WriteFile writes a file of the data directory, readable by the server's user only.
// The flag is os.O_APPEND or os.O_TRUNC.
func (s *Server) WriteFile(name string, flag int, data []byte) error {
	path := filepath.Join(s.Dir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|flag, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if cred := s.credential(); cred != nil {
		return os.Chown(path, int(cred.Uid), int(cred.Gid))
	}
	return nil
}

// Start starts a stopped server and waits until it accepts connections.
func (s *Server) Start() error {
	return s.command("pg_ctl", "start", "-w", "-s", "-D", s.Dir, "-l", filepath.Join(s.root, "log"))
}

// Stop stops the server, cutting every connection, and waits until it is down.
func (s *Server) Stop() error {
	return s.command("pg_ctl", "stop", "-w", "-s", "-m", "fast", "-D", s.Dir)
}

// Reload makes the server read its configuration again.
func (s *Server) Reload() error {
	return s.command("pg_ctl", "reload", "-s", "-D", s.Dir)
}

// Standby makes a hot standby of s from a copy of its data directory, with the settings
// of s, and starts it.
//
// It stops s while it copies, which cuts every connection to s, and starts it again: call
// it before anything is connected to s. It blocks until both servers accept connections.
// The standby then connects to s by itself, and is behind until it has. After an error
// there is no standby, and s runs again unless the error is that it did not stop or start.
func (s *Server) Standby() (*Server, error) {
	b, err := newServer(s.bin)
	if err != nil {
		return nil, err
	}
	if err = s.Stop(); err == nil {
		// By the server's user, who then owns the copy.
		err = errors.Join(s.run("cp", "-R", "-p", s.Dir, b.Dir), s.Start())
	}
	if err == nil {
		err = b.configure("hot_standby = on",
			fmt.Sprintf("primary_conninfo = 'host=127.0.0.1 port=%d user=%s sslmode=disable'", s.Port, User))
	}
	if err == nil {
		err = b.WriteFile("standby.signal", os.O_TRUNC, nil)
	}
	if err == nil {
		err = b.Start()
	}
	if err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// Promote ends recovery on a standby and waits until it is a primary.
func (s *Server) Promote() error {
	return s.command("pg_ctl", "promote", "-w", "-s", "-D", s.Dir)
}

// Signal sends sig to the postmaster.
func (s *Server) Signal(sig syscall.Signal) error {
	data, err := os.ReadFile(filepath.Join(s.Dir, "postmaster.pid"))
	if err != nil {
		return err
	}
	line, _, _ := bytes.Cut(data, []byte("\n"))
	pid, err := strconv.Atoi(string(line))
	if err != nil {
		return err
	}
	return syscall.Kill(pid, sig)
}

// Close stops the server, however it is, and removes its files.
func (s *Server) Close() {
	_ = s.Signal(syscall.SIGCONT)
	_ = s.command("pg_ctl", "stop", "-w", "-s", "-m", "immediate", "-D", s.Dir)
	_ = os.RemoveAll(s.root)
}

// DSN is the URL of the server, without TLS.
func (s *Server) DSN() string { return DSN(s.Addr()) }

// Addr is the server's host:port.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Port)) }

// SocketDir is the directory of the server's unix socket.
func (s *Server) SocketDir() string { return s.root }

// DSN is the URL of a server of this package that is reached at addr.
func DSN(addr string) string {
	return fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable", User, addr, Database)
}

// Bouncer is a PgBouncer.
type Bouncer struct {
	Addr string // host:port
	cmd  *exec.Cmd
	dir  string
}

// Bouncer starts a PgBouncer before the server with a pool mode: session,
// transaction or statement. It returns ErrNoBouncer where there is none.
func (s *Server) Bouncer(mode string) (*Bouncer, error) {
	path, err := exec.LookPath("pgbouncer")
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/pgbouncer"); err != nil {
			return nil, ErrNoBouncer
		}
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	b := &Bouncer{Addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), dir: filepath.Join(s.root, "bouncer"+strconv.Itoa(port))}
	ini := fmt.Sprintf("[databases]\n* = host=127.0.0.1 port=%d user=%s\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = %d\n"+
		"unix_socket_dir =\nauth_type = any\npool_mode = %s\n", s.Port, User, port, mode)
	config := filepath.Join(b.dir, "pgbouncer.ini")
	if err := os.Mkdir(b.dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(config, []byte(ini), 0o644); err != nil {
		return nil, err
	}
	b.cmd = exec.Command(path, "-q", config)
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: s.credential()}
	if err := b.cmd.Start(); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(commandTimeout); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", b.Addr)
		if err == nil {
			c.Close()
			return b, nil
		}
		if time.Now().After(deadline) {
			b.Close()
			return nil, fmt.Errorf("pgbouncer: %w", err)
		}
	}
}

// Close ends the PgBouncer.
func (b *Bouncer) Close() {
	_ = b.cmd.Process.Kill()
	_ = b.cmd.Wait()
}

// Log returns what the server has logged.
func (s *Server) Log() string {
	data, _ := os.ReadFile(filepath.Join(s.root, "log"))
	return string(data)
}

// FreePort returns a TCP port of the loopback interface that was free just now. It is none that the kernel gives to those
// that ask for any, so that a server that has been stopped finds it free when it starts again.
func FreePort() (port int, err error) {
	for range 100 {
		port = 10000 + rand.IntN(22000) // Linux gives 32768 and above
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return port, l.Close()
		}
	}
	return 0, err
}

// command runs one of PostgreSQL's programs; see run.
func (s *Server) command(name string, args ...string) error {
	return s.run(filepath.Join(s.bin, name), args...)
}

// run runs a program, as the server's user, with a time limit.
func (s *Server) run(program string, args ...string) error {
	cmd := exec.Command(program, args...)
	cmd.Dir = s.root
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PGPASSWORD=", "PGHOST=", "PGDATABASE=")
	// A group of its own: Ctrl-C in a terminal must end the listener, not the server under it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: s.credential()}
	// A file, not a pipe: the postmaster inherits it, and a pipe would be waited for.
	out, err := os.CreateTemp("", "pgtest-out")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return err
	}
	kill := time.AfterFunc(commandTimeout, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	if err := cmd.Wait(); err != nil {
		text, _ := os.ReadFile(out.Name())
		return fmt.Errorf("%s: %w: %s%s", filepath.Base(program), err, bytes.TrimSpace(text), tail(s.Log()))
	}
	return nil
}

func tail(log string) string {
	if log == "" {
		return ""
	}
	return "\nserver log: " + log[max(0, len(log)-2000):]
}

// credential is the user to run the server as: PostgreSQL refuses to run as root.
func (s *Server) credential() *syscall.Credential {
	if os.Geteuid() != 0 {
		return nil
	}
	return unprivileged()
}
