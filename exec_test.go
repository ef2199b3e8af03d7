// feature: execcmd

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// slowScript handles each notification in the given time and writes its payload to a file.
func slowScript(t *testing.T, seconds string) (path, out string) {
	t.Helper()
	dir := t.TempDir()
	path, out = filepath.Join(dir, "slow"), filepath.Join(dir, "out")
	text := fmt.Sprintf("#!/bin/sh\nread -r payload\nsleep %s\necho \"$payload\" >> %s\n", seconds, out)
	if err := testkit.WriteProgram(path, text); err != nil {
		t.Fatal(err)
	}
	return path, out
}

func TestStopWhileQueueIsFull(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	path, out := slowScript(t, "0.05")
	p := runProgram(t, fast(testkit.DSN(t), channel+"=exec:"+path, vars{"QUEUE_SIZE": "3", "SHUTDOWN_TIMEOUT": "60s"}))
	p.Wait(t, "listening", 1)
	const total = 100 // more than the queue and lib/pq's buffers hold
	if _, err := testkit.DB(t).Exec("select pg_notify($1, i || E'\\n') from generate_series(1, $2) i", channel, total); err != nil {
		t.Fatal(err)
	}
	p.Wait(t, "queue full", 1)
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, 60*time.Second)
	data, _ := os.ReadFile(out)
	if n := strings.Count(string(data), "\n"); n != total {
		t.Errorf("%d of %d were handled", n, total)
	}
}

// TestProgramsDieOfABrokenPipe: as under cron. A signal that is ignored stays so in every program, and no shell can undo it.
func TestProgramsDieOfABrokenPipe(t *testing.T) {
	t.Parallel()
	channel, path := testkit.ChannelName(t), filepath.Join(t.TempDir(), "script")
	if err := testkit.WriteProgram(path, "#!/bin/sh\n(yes; echo \"yes ended with $?\" >&2) | head -n 1 >/dev/null\n"); err != nil {
		t.Fatal(err)
	}
	p := runProgram(t, fast(testkit.DSN(t), channel+"=exec:"+path))
	p.Wait(t, "listening", 1)
	testkit.Send(t, channel, "")
	if line := p.Wait(t, "output", 1); line["line"] != "yes ended with 141" { // 128 and SIGPIPE
		t.Errorf("%v", line)
	}
}

func TestStopWhileHandlerIsStuck(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	path, _ := slowScript(t, "1000")
	p := runProgram(t, fast(testkit.DSN(t), channel+"=exec:"+path, vars{"QUEUE_SIZE": "2"}))
	p.Wait(t, "listening", 1)
	for i := range 10 {
		testkit.Send(t, channel, fmt.Sprint(i))
	}
	p.Wait(t, "queue full", 1)
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.Failed, stopBound)
	// One runs, two are queued, one is held, and lib/pq has the rest.
	line := p.Wait(t, "stopped", 1)
	traces := p.All("abandoned")
	if n, ok := line["abandoned"].(float64); !ok || int(n) != len(traces) || n != 10 {
		t.Errorf("%v abandoned, %d traces, want 10", line["abandoned"], len(traces))
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	path, _ := slowScript(t, "1000")
	p := runProgram(t, fast(testkit.DSN(t), channel+"=exec:"+path, vars{"SHUTDOWN_TIMEOUT": "1h"}))
	p.Wait(t, "listening", 1)
	testkit.Send(t, channel, "x")
	p.signal(t, syscall.SIGTERM)
	p.Wait(t, "shutting down", 1)
	testkit.Eventually(t, "the second signal was not obeyed", func() bool {
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

// TestReadmePicture runs what the README shows at its top and compares, numbers aside.
func TestReadmePicture(t *testing.T) {
	t.Parallel()
	_, rest, _ := strings.Cut(testkit.ReadFile(t, "README.md"), "```console\n")
	picture, _, found := strings.Cut(rest, "```\n")
	if !found {
		t.Fatal("README has no picture")
	}
	dir := t.TempDir()
	drain := "#!/bin/sh\necho 3 jobs done\n"
	if err := testkit.WriteProgram(filepath.Join(dir, "drain"), drain); err != nil {
		t.Fatal(err)
	}
	// The picture's channels have plain names, which other tests must not use.
	dsn := testkit.WithParams(testkit.DSN(t), "application_name", testkit.ChannelName(t))
	p := runProgramIn(t, dir, vars{"CHANNELS": "orders,jobs=doorbell:exec:./drain", "DATABASE_URL": dsn})
	segment := func(what string, n int) string {
		t.Helper()
		testkit.Eventually(t, "no "+what, func() bool { return strings.Count(p.String(), what) >= n })
		return p.String()
	}
	segment("delivery proven", 1)
	first := segment("jobs done", 1)
	testkit.Exec(t, testkit.DB(t), `notify orders, '{"id": 1}'; notify jobs`)
	segment("payload=", 1)
	second := segment("jobs done", 2)
	for _, pid := range testkit.Backends(t, testkit.DB(t), testkit.ChannelName(t)) {
		testkit.Exec(t, testkit.DB(t), "select pg_terminate_backend($1)", pid)
	}
	segment("delivery proven", 2)
	third := segment("jobs done", 3)

	segments := strings.Split(picture, "\n-- ")
	for i, text := range []string{first, strings.TrimPrefix(second, first), strings.TrimPrefix(third, second)} {
		_, shown, _ := strings.Cut(segments[i], "\n") // after the command, or the remark
		if got, want := anonymous(text), anonymous(shown); !slices.Equal(got, want) {
			t.Errorf("part %d: it prints\n%s\nREADME shows\n%s", i+1, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// anonymous are the lines of a log, sorted, without times and with N for every number.
func anonymous(text string) []string {
	version := regexp.MustCompile(`version="[^"]*"`)
	when := regexp.MustCompile(`(time=\S+ )|([0-9]{4}-[0-9-]+T[0-9:.]+(Z|[+-][0-9:]+))`)
	number := regexp.MustCompile(`[0-9]+(\.[0-9]+)*(:[0-9]+)?(h|ms|µs|m[0-9]|s)?\b`)
	var out []string
	for line := range strings.Lines(text) {
		line = when.ReplaceAllString(strings.TrimSpace(line), "")
		line = number.ReplaceAllString(version.ReplaceAllString(line, "version"), "N")
		if line != "" {
			out = append(out, line)
		}
	}
	slices.Sort(out)
	return out
}
