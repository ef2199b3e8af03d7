package main

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// process is the built program, running.
type process struct {
	*testkit.Logs
	cmd    *exec.Cmd
	exited chan error
}

// runProgram starts the built program with just these variables. It is killed when the test ends.
func runProgram(t *testing.T, v vars) *process {
	t.Helper()
	return runProgramIn(t, "", v)
}

// runProgramIn is runProgram in a directory.
func runProgramIn(t *testing.T, dir string, v vars) *process {
	t.Helper()
	p := &process{Logs: testkit.NewLogs(t), cmd: exec.Command(program(t)), exited: make(chan error, 1)}
	p.cmd.Dir = dir
	p.cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range v {
		p.cmd.Env = append(p.cmd.Env, name+"="+value)
	}
	return p.start(t)
}

// start starts what has been set up.
func (p *process) start(t *testing.T) *process {
	t.Helper()
	p.cmd.Stdout, p.cmd.Stderr = p.Logs, p.Logs
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.exited <- p.cmd.Wait() }()
	t.Cleanup(func() { _ = p.cmd.Process.Kill() })
	return p
}

func (p *process) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// exit waits for the end and checks the exit code and that it came within a bound.
func (p *process) exit(t *testing.T, code int, bound time.Duration) {
	t.Helper()
	began := time.Now()
	select {
	case <-p.exited:
	case <-time.After(bound + testkit.Patience):
		t.Fatal("the program did not end")
	}
	if took := time.Since(began); took > bound {
		t.Errorf("it took %v to end, more than %v", took, bound)
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("exit code %d, want %d", got, code)
	}
}

// The bound on SIGTERM: SHUTDOWN_TIMEOUT of fast, and a little for a loaded machine.
const stopBound = 5*time.Second + 2*time.Second

func TestStopWhileConnected(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	p := runProgram(t, fast(testkit.DSN(t), channel))
	p.Wait(t, "listening", 1)
	const total = 2000
	if _, err := testkit.DB(t).Exec("select pg_notify($1, i::text) from generate_series(1, $2) i", channel, total); err != nil {
		t.Fatal(err)
	}
	// Everything is at the server now, little of it here.
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	lines := p.All("notification")
	if len(lines) != total {
		t.Fatalf("%d of %d notifications were handled", len(lines), total)
	}
	for i, line := range lines {
		if line["payload"] != fmt.Sprint(i+1) {
			t.Fatalf("number %d is %v", i+1, line["payload"])
		}
	}
	p.Wait(t, "stopped", 1)
}

func TestStopWhileSilent(t *testing.T) {
	t.Parallel()
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	p := runProgram(t, fast(dsn, testkit.ChannelName(t)))
	p.Wait(t, "listening", 1)
	proxy.Silence()
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, testTimeout+2*time.Second)
	p.Wait(t, "could not UNLISTEN cleanly", 1)
}

func TestStopWhileServerIsDown(t *testing.T) {
	t.Parallel()
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	proxy.Close()
	p := runProgram(t, fast(dsn, testkit.ChannelName(t), vars{"RECONNECT_MIN": "1h", "RECONNECT_MAX": "1h"}))
	p.Wait(t, "connection attempt failed", 1)
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, 2*time.Second) // does not sleep through the backoff
}

func TestStopWhileConnectHangs(t *testing.T) {
	t.Parallel()
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	proxy.Mute(true)
	p := runProgram(t, fast(dsn, testkit.ChannelName(t), vars{"PING_TIMEOUT": "1h"}))
	testkit.Eventually(t, "it did not connect", func() bool { return proxy.Dialed() > 0 })
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, 2*time.Second)
}

func TestFullQueueBlocks(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	gate := make(chan struct{})
	var slow counter
	r := start(t, fast(testkit.DSN(t), channel+"=slow,"+channel+"2=test", vars{"QUEUE_SIZE": "10"}), table{
		"slow": func(string, Setup) (notify.Handler, error) { return &gated{counter: &slow, gate: gate}, nil },
	}).listening(t)
	const total = 1000
	if _, err := testkit.DB(t).Exec("select pg_notify($1, i::text) from generate_series(1, $2) i", channel, total); err != nil {
		t.Fatal(err)
	}
	testkit.Send(t, channel+"2", "behind")
	r.Wait(t, "queue full", 1)
	// Reading has stopped for longer than a silent connection would be borne: no false loss.
	time.Sleep(testInterval + 2*testTimeout)
	if lines := append(r.All("disconnected"), r.All("ping failed")...); len(lines) > 0 {
		t.Errorf("a false loss: %v", lines)
	}
	close(gate)
	r.expect(t, "behind") // the other channel is served again
	testkit.Eventually(t, "not all were handled", func() bool { return slow.handled.Load() == total })
	r.Wait(t, "queue drained", 1)
	if n := len(r.All("queue full")); n != 1 {
		t.Errorf("one overflow was told %d times", n)
	}
	testkit.Send(t, channel+"2", "after")
	r.expect(t, "after")
}

func TestFullQueueDrops(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	gate := make(chan struct{})
	var slow counter
	r := start(t, fast(testkit.DSN(t), channel+"=slow,"+channel+"2=test", vars{"QUEUE_SIZE": "10", "OVERFLOW": "drop"}), table{
		"slow": func(string, Setup) (notify.Handler, error) { return &gated{counter: &slow, gate: gate}, nil },
	}).listening(t)
	testkit.Eventually(t, "no catch-up at the start", func() bool { return slow.caughtUp.Load() == 1 })
	const total = 1000
	if _, err := testkit.DB(t).Exec("select pg_notify($1, i::text) from generate_series(1, $2) i", channel, total); err != nil {
		t.Fatal(err)
	}
	testkit.Send(t, channel+"2", "meanwhile")
	r.expect(t, "meanwhile") // the other channel does not wait
	close(gate)
	line := r.Wait(t, "queue drained", 1)
	testkit.Eventually(t, "no catch-up after the overflow", func() bool { return slow.caughtUp.Load() == 2 })
	if sum := slow.handled.Load() + int64(line["dropped"].(float64)); sum != total {
		t.Errorf("%d handled and %v dropped of %d", slow.handled.Load(), line["dropped"], total)
	}
}
