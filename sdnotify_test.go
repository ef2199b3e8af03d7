// feature: sdnotify execcmd

package main

import (
	"crypto/rand"
	"io"
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
				_ = sock.SetReadDeadline(time.Now().Add(stopBound))
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

// TestSystemdUnit has systemd itself read the two units, and rate them.
func TestSystemdUnit(t *testing.T) {
	t.Parallel()
	one := testkit.ReadFile(t, "deploy/pglistener.service")
	many := testkit.ReadFile(t, "deploy/pglistener@.service")
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		testkit.Skip(t, "systemd-analyze is missing")
	}
	for name, text := range map[string]string{"pglistener.service": one, "pglistener@orders.service": many,
		"pglistener-secret.service": strings.NewReplacer("#Load", "Load", "#Env", "Env").Replace(one)} {
		unit := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(unit, []byte(strings.Replace(text, "/usr/local/bin/pglistener", program(t), 1)), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(analyze, "verify", unit).CombinedOutput(); err != nil || strings.Contains(string(out), unit+":") {
			t.Errorf("%s: verify: %v\n%s", name, err, out)
		}
		out, err := exec.Command(analyze, "security", "--offline=true", "--threshold=20", unit).CombinedOutput() // in tenths
		if err != nil {
			t.Errorf("%s: its exposure is more than 2.0 of 10: %v\n%s", name, err, out)
		}
		for _, want := range []string{"StateDirectory=pglistener", "RestartPreventExitStatus=2\n", "GOTRACEBACK=crash\n", "LoadCredential=database_url:/"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s lacks %s", name, want)
			}
		}
		if strings.Contains(text, "\nMemoryDenyWriteExecute=yes") {
			t.Errorf("%s: node and Java cannot run under MemoryDenyWriteExecute", name)
		}
	}
	// The template is the unit with an instance's name in it.
	if got := strings.NewReplacer("pglistener@orders", "pglistener", "pglistener@", "pglistener", " for %i", "", "pglistener/%i.env", "pglistener.env", "/%i.", "/", "/%i", "").Replace(many); got != one {
		t.Errorf("pglistener@.service differs from pglistener.service in more than the name of its instance:\n%s", got)
	}
}

// TestCrashIsNoMistakeInTheSettings: the unit does not restart after exit code 2, which is Go's own for a crash too, unless
// GOTRACEBACK says crash, as the unit does.
func TestCrashIsNoMistakeInTheSettings(t *testing.T) {
	t.Parallel()
	for traceback, want := range map[string]string{"": "exit status 2", "crash": "signal: aborted"} {
		cmd := exec.Command(program(t))
		cmd.Dir = t.TempDir() // where a core file would go
		cmd.Env = append(os.Environ(), "DATABASE_URL=postgres://127.0.0.1:1/x", "CHANNELS=orders", "GOTRACEBACK="+traceback)
		log, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer time.AfterFunc(stopBound, func() { cmd.Process.Kill() }).Stop()
		if _, err := log.Read(make([]byte, 1)); err != nil { // it runs
			t.Fatal(err)
		}
		cmd.Process.Signal(syscall.SIGQUIT)
		io.Copy(io.Discard, log)
		if err := cmd.Wait(); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("GOTRACEBACK=%s: a crash ends with %v, want %s", traceback, err, want)
		}
	}
}
