// feature: health execcmd

package main

import (
	"bufio"
	"fmt"
	"net/http"
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

// A log that nobody reads stops nothing: with stderr a full pipe, handlers run on, health answers, SIGTERM is
// obeyed with the right exit code, and when the pipe is read again a line says how many were dropped.
func TestLogThatNobodyReadsStopsNothing(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dir := t.TempDir()
	script, out := filepath.Join(dir, "script"), filepath.Join(dir, "out")
	// Each run writes a line, and more to its own stderr than the pipe holds.
	text := "#!/bin/sh\nread -r payload\nhead -c 20000 /dev/zero | tr '\\0' x | fold -w 1000 >&2\necho >&2\necho \"$payload\" >> " + out + "\n"
	if err := testkit.WriteProgram(script, text); err != nil {
		t.Fatal(err)
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	addr := testkit.FreshAddress(t)
	cmd := exec.Command(program(t))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range fast(testkit.DSN(t), channel+"=exec:"+script, vars{"HTTP_ADDR": addr, "PROBE_INTERVAL": "1s"}) {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stderr = write // an inherited pipe, and nobody reads it
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	ask := func(path string) (int, string) {
		c := http.Client{Timeout: 2 * time.Second}
		res, err := c.Get("http://" + addr + path)
		if err != nil {
			return 0, err.Error()
		}
		defer res.Body.Close()
		body, _ := bufio.NewReader(res.Body).ReadString(0)
		return res.StatusCode, body
	}
	testkit.Eventually(t, "never ready", func() bool { code, _ := ask("/readyz"); return code == http.StatusOK })
	const total = 30 // 600 kB of log lines
	for i := range total {
		testkit.Send(t, channel, fmt.Sprintf("%d\n", i))
	}
	handled := func() int {
		data, _ := os.ReadFile(out)
		return strings.Count(string(data), "\n")
	}
	testkit.Eventually(t, "handlers wait for somebody to read the log", func() bool { return handled() == total })
	if code, body := ask("/readyz"); code != http.StatusOK {
		t.Errorf("/readyz: %d %s", code, body)
	}
	_, metrics := ask("/metrics")
	if !strings.Contains(metrics, "pglistener_log_lines_dropped_total ") || strings.Contains(metrics, "pglistener_log_lines_dropped_total 0\n") {
		t.Error("the metric does not count the dropped lines")
	}
	// It flows again: what was kept comes, and how many were not.
	lines := make(chan string, 10_000)
	stopReading := make(chan struct{})
	go func() {
		defer close(lines)
		scanner := bufio.NewScanner(read)
		scanner.Buffer(nil, 1<<20)
		for scanner.Scan() {
			lines <- scanner.Text()
			select {
			case <-stopReading:
				return
			default:
			}
		}
	}()
	deadline := time.After(testkit.Patience)
	for told := false; !told; {
		select {
		case line := <-lines:
			told = strings.Contains(line, "log lines were dropped") && strings.Contains(line, `"dropped":`)
		case <-deadline:
			t.Fatal("nobody says how many lines were dropped")
		}
	}
	close(stopReading)
	// Nobody reads once more, and now it is to stop.
	for i := range total {
		testkit.Send(t, channel, fmt.Sprintf("again %d\n", i))
	}
	testkit.Eventually(t, "handlers wait for somebody to read the log", func() bool { return handled() == 2*total })
	began := time.Now()
	_ = cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-exited:
	case <-time.After(stopBound + testkit.Patience):
		t.Fatal("SIGTERM is not obeyed")
	}
	if took := time.Since(began); took > stopBound || cmd.ProcessState.ExitCode() != cli.OK {
		t.Errorf("ended after %v with %v", took, cmd.ProcessState)
	}
}

// The log handler's lines are its work: it waits for the reader, and loses none.
func TestLogHandlerLosesNothing(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	cmd := exec.Command(program(t))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range fast(testkit.DSN(t), channel, vars{"HANDLER_TIMEOUT": "60s", "SHUTDOWN_TIMEOUT": "60s", "PROBE_INTERVAL": "0"}) {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stderr = write
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	scanner := bufio.NewScanner(read)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() && !strings.Contains(scanner.Text(), `"msg":"listening"`) {
	}
	const total = 500
	padding := strings.Repeat("x", 1000) // 500 kB in all, the pipe holds 64
	for i := range total {
		testkit.Send(t, channel, fmt.Sprintf("number-%d-%s", i, padding))
	}
	seen := 0
	for seen < total && scanner.Scan() {
		if strings.Contains(scanner.Text(), fmt.Sprintf("number-%d-", seen)) {
			seen++
		}
	}
	if seen != total {
		t.Errorf("%d of %d lines, in order", seen, total)
	}
}
