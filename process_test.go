package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// process is the built program, running.
type process struct {
	*logs
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
	p := &process{logs: newLogs(t), cmd: exec.Command(program), exited: make(chan error, 1)}
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
	p.cmd.Stdout, p.cmd.Stderr = p.logs, p.logs
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
	case <-time.After(bound + patience):
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
	channel := channelName(t)
	p := runProgram(t, fast(sharedDSN, channel))
	p.wait(t, "listening", 1)
	const total = 2000
	if _, err := sharedDB.Exec("select pg_notify($1, i::text) from generate_series(1, $2) i", channel, total); err != nil {
		t.Fatal(err)
	}
	// Everything is at the server now, little of it here.
	p.signal(t, syscall.SIGTERM)
	p.exit(t, exitOK, stopBound)
	lines := p.all("notification")
	if len(lines) != total {
		t.Fatalf("%d of %d notifications were handled", len(lines), total)
	}
	for i, line := range lines {
		if line["payload"] != fmt.Sprint(i+1) {
			t.Fatalf("number %d is %v", i+1, line["payload"])
		}
	}
	p.wait(t, "stopped", 1)
}

func TestStopWhileSilent(t *testing.T) {
	t.Parallel()
	dsn, proxy := proxied(t, sharedDSN)
	p := runProgram(t, fast(dsn, channelName(t)))
	p.wait(t, "listening", 1)
	proxy.Silence()
	p.signal(t, syscall.SIGTERM)
	p.exit(t, exitOK, testTimeout+2*time.Second)
	p.wait(t, "could not take leave", 1)
}

func TestStopWhileServerIsDown(t *testing.T) {
	t.Parallel()
	dsn, proxy := proxied(t, sharedDSN)
	proxy.Close()
	p := runProgram(t, fast(dsn, channelName(t), vars{"RECONNECT_MIN": "1h", "RECONNECT_MAX": "1h"}))
	p.wait(t, "connection attempt failed", 1)
	p.signal(t, syscall.SIGTERM)
	p.exit(t, exitOK, 2*time.Second) // does not sleep through the backoff
}

func TestStopWhileConnectHangs(t *testing.T) {
	t.Parallel()
	dsn, proxy := proxied(t, sharedDSN)
	proxy.Mute(true)
	p := runProgram(t, fast(dsn, channelName(t), vars{"PING_TIMEOUT": "1h"}))
	eventually(t, "it did not connect", func() bool { return proxy.Dialed() > 0 })
	p.signal(t, syscall.SIGTERM)
	p.exit(t, exitOK, 2*time.Second)
}

// slowScript handles each notification in the given time and writes its payload to a file.
func slowScript(t *testing.T, seconds string) (path, out string) {
	t.Helper()
	dir := t.TempDir()
	path, out = filepath.Join(dir, "slow"), filepath.Join(dir, "out")
	text := fmt.Sprintf("#!/bin/sh\nread -r payload\nsleep %s\necho \"$payload\" >> %s\n", seconds, out)
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path, out
}

func TestStopWhileQueueIsFull(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	path, out := slowScript(t, "0.05")
	p := runProgram(t, fast(sharedDSN, channel+"=exec:"+path, vars{"QUEUE_SIZE": "3", "SHUTDOWN_TIMEOUT": "60s"}))
	p.wait(t, "listening", 1)
	const total = 100 // more than the queue and lib/pq's buffers hold
	if _, err := sharedDB.Exec("select pg_notify($1, i || E'\\n') from generate_series(1, $2) i", channel, total); err != nil {
		t.Fatal(err)
	}
	p.wait(t, "queue full", 1)
	p.signal(t, syscall.SIGTERM)
	p.exit(t, exitOK, 60*time.Second)
	data, _ := os.ReadFile(out)
	if n := strings.Count(string(data), "\n"); n != total {
		t.Errorf("%d of %d were handled", n, total)
	}
}

func TestStopWhileHandlerIsStuck(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	path, _ := slowScript(t, "1000")
	p := runProgram(t, fast(sharedDSN, channel+"=exec:"+path, vars{"QUEUE_SIZE": "2"}))
	p.wait(t, "listening", 1)
	for i := range 10 {
		notify(t, channel, fmt.Sprint(i))
	}
	p.wait(t, "queue full", 1)
	p.signal(t, syscall.SIGTERM)
	p.exit(t, exitFailed, stopBound)
	// One runs, two are queued, one is held, and lib/pq has the rest.
	line := p.wait(t, "stopped", 1)
	traces := p.all("abandoned")
	if n, ok := line["abandoned"].(float64); !ok || int(n) != len(traces) || n != 10 {
		t.Errorf("%v abandoned, %d traces, want 10", line["abandoned"], len(traces))
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	path, _ := slowScript(t, "1000")
	p := runProgram(t, fast(sharedDSN, channel+"=exec:"+path, vars{"SHUTDOWN_TIMEOUT": "1h"}))
	p.wait(t, "listening", 1)
	notify(t, channel, "x")
	p.signal(t, syscall.SIGTERM)
	p.wait(t, "shutting down", 1)
	eventually(t, "the second signal was not obeyed", func() bool {
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // until the handler of the first has been taken away
		select {
		case <-p.exited:
			return true
		default:
			return false
		}
	})
	if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() {
		t.Errorf("ended with %v", p.cmd.ProcessState)
	}
}

func TestFullQueueBlocks(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	gate := make(chan struct{})
	var slow counter
	r := start(t, fast(sharedDSN, channel+"=slow,"+channel+"2=test", vars{"QUEUE_SIZE": "10"}), map[string]newHandler{
		"slow": func(string, env) (Handler, error) { return &gated{counter: &slow, gate: gate}, nil },
	}).listening(t)
	const total = 1000
	if _, err := sharedDB.Exec("select pg_notify($1, i::text) from generate_series(1, $2) i", channel, total); err != nil {
		t.Fatal(err)
	}
	notify(t, channel+"2", "behind")
	r.wait(t, "queue full", 1)
	// Reading has stopped for longer than a silent connection would be borne: no false loss.
	time.Sleep(testInterval + 2*testTimeout)
	if lines := append(r.all("disconnected"), r.all("ping failed")...); len(lines) > 0 {
		t.Errorf("a false loss: %v", lines)
	}
	close(gate)
	r.expect(t, "behind") // the other channel is served again
	eventually(t, "not all were handled", func() bool { return slow.handled.Load() == total })
	r.wait(t, "queue drained", 1)
	if n := len(r.all("queue full")); n != 1 {
		t.Errorf("one overflow was told %d times", n)
	}
	notify(t, channel+"2", "after")
	r.expect(t, "after")
}

func TestFullQueueDrops(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	gate := make(chan struct{})
	var slow counter
	r := start(t, fast(sharedDSN, channel+"=slow,"+channel+"2=test", vars{"QUEUE_SIZE": "10", "OVERFLOW": "drop"}), map[string]newHandler{
		"slow": func(string, env) (Handler, error) { return &gated{counter: &slow, gate: gate}, nil },
	}).listening(t)
	eventually(t, "no catch-up at the start", func() bool { return slow.caughtUp.Load() == 1 })
	const total = 1000
	if _, err := sharedDB.Exec("select pg_notify($1, i::text) from generate_series(1, $2) i", channel, total); err != nil {
		t.Fatal(err)
	}
	notify(t, channel+"2", "meanwhile")
	r.expect(t, "meanwhile") // the other channel does not wait
	close(gate)
	line := r.wait(t, "queue drained", 1)
	eventually(t, "no catch-up after the overflow", func() bool { return slow.caughtUp.Load() == 2 })
	if sum := slow.handled.Load() + int64(line["dropped"].(float64)); sum != total {
		t.Errorf("%d handled and %v dropped of %d", slow.handled.Load(), line["dropped"], total)
	}
}
