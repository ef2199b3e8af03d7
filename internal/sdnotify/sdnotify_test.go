//go:build unix

package sdnotify

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestWhatSystemdIsTold plays systemd, of which a datagram is a list of lines, and the watchdog that of one process.
func TestWhatSystemdIsTold(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "") // t.TempDir() may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "notify")
	sock, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
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
