// feature: sdnotify execcmd

package main

import (
	"crypto/rand"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

func TestSystemd(t *testing.T) {
	t.Parallel()
	for name, path := range map[string]string{
		"path":     filepath.Join(t.TempDir(), "notify"),
		"abstract": "@pglistener-test-" + rand.Text(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if name == "abstract" {
				if _, err := os.Stat("/proc/net/unix"); err != nil {
					testkit.Skip(t, "needs abstract sockets")
				}
			}
			sock, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer sock.Close()
			var said []string
			until := func(what string) {
				t.Helper()
				buf := make([]byte, 4096)
				_ = sock.SetReadDeadline(time.Now().Add(testkit.Patience))
				for {
					n, err := sock.Read(buf)
					if err != nil {
						t.Fatalf("never told %q: %v; told %q", what, err, said)
					}
					for line := range strings.Lines(string(buf[:n])) {
						line = strings.TrimSpace(line)
						said = append(said, line)
						if strings.HasPrefix(line, what) {
							return
						}
					}
				}
			}
			channel := testkit.ChannelName(t)
			dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
			slow, _ := slowScript(t, "2")
			p := runProgram(t, probing(dsn, channel+"=exec:"+slow, vars{"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "400000"}))
			until("READY=1")
			until("STATUS=listening")
			for range 5 {
				until("WATCHDOG=1")
			}
			proxy.Refuse(true)
			proxy.Reset()
			until("STATUS=not ready: ")
			proxy.Refuse(false)
			until("STATUS=listening")
			// systemd must not be fed by a process that does nothing else.
			p.signal(t, syscall.SIGSTOP)
			said = nil
			_ = sock.SetReadDeadline(time.Now().Add(time.Second))
			for buf := make([]byte, 4096); ; { // what was on its way
				if _, err := sock.Read(buf); err != nil {
					break
				}
			}
			p.signal(t, syscall.SIGCONT)
			until("WATCHDOG=1")
			// Nor must it be killed while a handler finishes.
			testkit.Send(t, channel, "x\n")
			p.Wait(t, "delivery proven", 2)
			p.signal(t, syscall.SIGTERM)
			until("STOPPING=1")
			for range 5 {
				until("WATCHDOG=1")
			}
			p.exit(t, cli.OK, stopBound)
		})
	}
}

// TestSystemdUnit has systemd itself read the unit, and rate it.
func TestSystemdUnit(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		testkit.Skip(t, "systemd-analyze is missing")
	}
	unit := filepath.Join(t.TempDir(), "pglistener.service")
	text := strings.Replace(testkit.ReadFile(t, "deploy/pglistener.service"), "/usr/local/bin/pglistener", program(t), 1)
	if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(analyze, "verify", unit).CombinedOutput(); err != nil {
		t.Errorf("verify: %v\n%s", err, out)
	}
	out, err := exec.Command(analyze, "security", "--offline=true", "--threshold=20", unit).CombinedOutput() // in tenths
	if err != nil {
		t.Errorf("its exposure is more than 2.0 of 10: %v\n%s", err, out)
	}
}
