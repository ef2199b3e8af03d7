//go:build unix

package sdnotify

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// playSystemd makes the socket that systemd would read.
func playSystemd(t *testing.T) (path string, sock *net.UnixConn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "") // t.TempDir() may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "notify")
	if sock, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sock.Close() })
	return path, sock
}

// TestWhatSystemdIsTold plays systemd, of which a datagram is a list of lines, and the watchdog that of one process.
func TestWhatSystemdIsTold(t *testing.T) {
	t.Parallel()
	path, sock := playSystemd(t)
	ours, others := strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getppid())
	for _, c := range []struct {
		pid   string
		every time.Duration
		want  string
	}{
		{"", time.Second, "WATCHDOG=1\n"}, {ours, time.Second, "WATCHDOG=1\n"},
		// Of the process that has started this one, say: it is not for us to say that it is well.
		{others, time.Minute, ""},
	} {
		lookup := func(name string) (string, bool) {
			value, ok := map[string]string{"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": c.pid}[name]
			return value, ok
		}
		every, beat := Start(time.Minute, lookup, slog.New(slog.DiscardHandler))
		if every != c.every {
			t.Errorf("WATCHDOG_PID=%s: every %v, want %v", c.pid, every, c.every)
		}
		beat(true, false, errors.New("a server's message\nMAINPID=1"))
		buf := make([]byte, 4096)
		_ = sock.SetReadDeadline(time.Now().Add(testkit.Patience))
		n, err := sock.Read(buf)
		if want := c.want + "READY=1\nSTATUS=not ready: a server's message; MAINPID=1\n"; err != nil || string(buf[:n]) != want {
			t.Errorf("WATCHDOG_PID=%s: %q %v, want %q", c.pid, buf[:n], err, want)
		}
	}
}

// TestSystemdHearsOfWhatItMissed: it passes over a message of more than 4,096 bytes, and takes none while it is busy.
func TestSystemdHearsOfWhatItMissed(t *testing.T) {
	t.Parallel()
	path, sock := playSystemd(t)
	lg := testkit.NewLogs(t)
	_, beat := Start(time.Minute, func(name string) (string, bool) {
		value, ok := map[string]string{"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "2000000"}[name]
		return value, ok
	}, lg.Logger())
	buf := make([]byte, 1<<20)
	read := func() string {
		n, err := sock.Read(buf)
		if err != nil {
			return ""
		}
		return string(buf[:n])
	}
	_ = sock.SetReadDeadline(time.Now().Add(testkit.Patience))
	beat(false, false, errors.New("it is away: "+strings.Repeat("ü", 5000)))
	if said := read(); len(said) > 4096 || !strings.Contains(said, "STATUS=not ready: it is away: ü") || !utf8.ValidString(said) {
		t.Errorf("%d bytes: %q", len(said), said)
	}
	for i := 0; len(lg.All("systemd does not take messages")) == 0; i++ { // it is busy
		if beat(false, false, nil); i > 100000 {
			t.Fatal("its queue is never full")
		}
	}
	beat(true, false, nil)
	_ = sock.SetReadDeadline(time.Now().Add(100 * time.Millisecond)) // it goes on; all is there already
	for said := read(); said != ""; said = read() {
		if strings.Contains(said, "READY=1") {
			t.Fatal("there was room in its queue")
		}
	}
	_ = sock.SetReadDeadline(time.Now().Add(testkit.Patience))
	beat(true, false, nil)
	if said, want := read(), "WATCHDOG=1\nREADY=1\nSTATUS=listening\n"; said != want {
		t.Errorf("%q, want %q", said, want)
	}
}
