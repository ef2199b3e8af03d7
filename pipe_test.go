// feature: outbox schedule pipe

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The handler pipe with the listener and a server around it; what it does by itself is tested in internal/pipe.

// pipeProgram writes a program in Python.
func pipeProgram(t *testing.T, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "program")
	text = "#!" + testkit.Python(t) + "\nimport json, os, signal, sys, time\n" +
		"def answer(event, **more): print(json.dumps({'id': event['id'], **(more or {'ok': True})}), flush=True)\n" + text
	if err := testkit.WriteProgram(path, text); err != nil {
		t.Fatal(err)
	}
	return path
}

// journal are the lines of a file, as far as they are complete.
func journal(path string) []string {
	data, _ := os.ReadFile(path)
	lines := strings.Split(string(data), "\n")
	return lines[:len(lines)-1]
}

// numbers are 1 to n, as texts of one width.
func numbers(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("%04d", i+1))
	}
	return all
}

// The program of docs/handlers.md behind the program itself: every row arrives, a notification too, and both in order with
// CONCURRENCY=1.
func TestPipeFromTheOutboxAndPlain(t *testing.T) {
	t.Parallel()
	channel, tab, dir := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), t.TempDir()
	worker := testkit.Program(t, "docs/handlers.md", "python")
	of := func(name string) string { return filepath.Join(dir, name) }
	v := fast(testkit.DSN(t), fmt.Sprintf("%[1]s_rows=outbox:pipe:%[2]s %[3]s,%[1]s_many=outbox:pipe:%[2]s %[4]s,%[1]s_plain=pipe:%[2]s %[5]s", channel, worker, of("rows"), of("many"), of("plain")),
		sending(tab, vars{strings.ToUpper(channel) + "_MANY_CONCURRENCY": "100"}))
	const n = 2000
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload) select $1 || c, lpad(i::text, 4, '0') from generate_series(1, $2) i, unnest('{_rows,_many}'::text[]) c order by i`, channel, n)
	p := runProgram(t, v)
	p.Wait(t, "listening", 1)
	testkit.Exec(t, testkit.DB(t), "select pg_notify($1, lpad(i::text, 4, '0')) from generate_series(1, $2) i", channel+"_plain", n)
	emptied(t, testkit.DB(t), tab)
	testkit.Eventually(t, "not all notifications are handled", func() bool { return len(journal(of("plain"))) >= n })
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	for _, name := range []string{"rows", "plain", "many"} {
		got := journal(of(name))
		if name == "many" {
			slices.Sort(got)
		}
		if !slices.Equal(got, numbers(n)) {
			t.Errorf("%s: %d lines, not all once and in order: %.200v", name, len(got), got)
		}
	}
	if lines := append(p.All("the program of the pipe"), p.All("a line of the program")...); lines != nil {
		t.Errorf("%v", lines)
	}
}

// In every mode the program is started with the listener, and may finish at the stop.
func TestPipeStartsAndFinishesInEveryMode(t *testing.T) {
	t.Parallel()
	tab := outboxTable(t, testkit.DB(t))
	program := pipeProgram(t, `
def note(text):
    with open(sys.argv[1], "a") as f:
        print(text, file=f)
note("started")
for line in sys.stdin:
    event = json.loads(line)
    note("run <%s>" % event["payload"])
    answer(event)
time.sleep(0.3)
note("finished")
`)
	for name, mode := range map[string]string{"plain": "", "doorbell": "doorbell:", "outbox": "outbox:", "scheduled": "doorbell:"} {
		t.Run(name, func(t *testing.T) { // a process of its own, which waits for nothing else
			t.Parallel()
			channel, notes := testkit.ChannelName(t), filepath.Join(t.TempDir(), "notes")
			v := fast(testkit.DSN(t), channel+"="+mode+"pipe:"+program+" "+notes, sending(tab))
			want := []string{"started", "finished"}
			switch name {
			case "scheduled":
				v[strings.ToUpper(channel)+"_SCHEDULE"] = "0 0 1 1 *"
			case "doorbell":
				want = []string{"started", "run <>", "run <>", "run <>", "run <>", "finished"}
			}
			p := runProgram(t, v)
			p.Wait(t, "listening", 1)
			testkit.Eventually(t, "it is not started", func() bool { return len(journal(notes)) > 0 })
			if name == "doorbell" {
				testkit.Eventually(t, "it does not run at the start", func() bool { return len(journal(notes)) == 2 })
				for i := range 3 {
					testkit.Send(t, channel, "not handed on")
					testkit.Eventually(t, "it does not run when it is rung", func() bool { return len(journal(notes)) == 3+i })
				}
			}
			p.signal(t, syscall.SIGTERM)
			p.exit(t, cli.OK, stopBound)
			if got := journal(notes); !slices.Equal(got, want) {
				t.Errorf("%q", got)
			}
		})
	}
}

// A listener that is killed leaves no program behind: its stdin ends. Its row is another's.
func TestPipeEndsWithAKilledListener(t *testing.T) {
	t.Parallel()
	channel, tab, dir := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), t.TempDir()
	program := pipeProgram(t, `
for line in sys.stdin:
    with open(sys.argv[1], "a") as f: print(os.getpid(), file=f)
with open(sys.argv[2], "a") as f: print("end", file=f)
`)
	begun, ended := filepath.Join(dir, "begun"), filepath.Join(dir, "ended")
	insert(t, testkit.DB(t), tab, channel, "x")
	p := runProgram(t, fast(testkit.DSN(t), channel+"=outbox:pipe:"+program+" "+begun+" "+ended, sending(tab)))
	testkit.Eventually(t, "the program has no row", func() bool { return len(journal(begun)) == 1 })
	p.signal(t, syscall.SIGKILL)
	testkit.Eventually(t, "the program runs on", func() bool { return len(journal(ended)) == 1 })
	if n := rowCount(t, testkit.DB(t), tab); n != 1 {
		t.Errorf("%d rows are left", n)
	}
}

// However a program misbehaves, no row is lost, none is given up, and another channel is served meanwhile.
func TestPipeLosesNoRow(t *testing.T) {
	t.Parallel()
	faults := map[string]string{
		"dies at its start":   `sys.exit(3)`,
		"dies of a line":      `sys.stdin.readline(); os._exit(1)`,
		"dies of all at once": `[sys.stdin.readline() for _ in range(5)]; os._exit(1)`,
		"hangs":               `sys.stdin.readline(); time.sleep(1000)`,
		"ignores SIGTERM":     `signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.stdin.readline(); time.sleep(1000)`,
		"never reads":         `time.sleep(1000)`,
		"does not flush":      `[print('{"id":"x","ok":true}') for line in sys.stdin]`,
		"echoes":              `[print(line, end="", flush=True) for line in sys.stdin]`,
		"half a line":         `sys.stdin.readline(); print('{"id":', end="", flush=True); time.sleep(1000)`,
		"no line":             `[os.write(1, b"x" * 1000000) for _ in range(20)]; time.sleep(1000)`,
		"closes stdout":       `sys.stdin.readline(); os.close(1); time.sleep(1000)`,
		"forks":               `[sys.stdin.readline(), os.fork() and os._exit(1), time.sleep(1000)]`,
		"unknown id":          `print('{"id":"x","ok":true}', flush=True); time.sleep(1000)`,
	}
	name, tab, dir := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), t.TempDir()
	mended := filepath.Join(dir, "mended")
	v := sending(tab, vars{"CONCURRENCY": "5", "HANDLER_TIMEOUT": "2s"})
	var channels []string
	const rows = 5
	for fault, program := range faults {
		channel := name + "_" + strings.ReplaceAll(fault, " ", "_")
		path := pipeProgram(t, fmt.Sprintf("mended = os.path.exists(%q)\nif not mended:\n    %s\nfor line in sys.stdin:\n    event = json.loads(line)\n    with open(%q, 'a') as f: print(event['payload'], file=f)\n    answer(event)\n",
			mended, program, filepath.Join(dir, channel)))
		channels = append(channels, channel+"=outbox:pipe:"+path)
		testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload) select $1, lpad(i::text, 4, '0') from generate_series(1, $2) i`, channel, rows)
	}
	healthy := filepath.Join(dir, "healthy")
	channels = append(channels, name+"=pipe:"+testkit.Program(t, "docs/handlers.md", "python")+" "+healthy)
	v[strings.ToUpper(name)+"_HANDLER_TIMEOUT"] = "20s"
	p := runProgram(t, fast(testkit.DSN(t), strings.Join(channels, ","), v))
	p.Wait(t, "listening", 1)

	testkit.Exec(t, testkit.DB(t), "select pg_notify($1, lpad(i::text, 4, '0')) from generate_series(1, 1000) i", name)
	testkit.Eventually(t, "another channel is not served", func() bool { return len(journal(healthy)) == 1000 })
	testkit.Eventually(t, "not every fault has been met", func() bool {
		ended := map[any]bool{}
		for _, line := range p.All("the program of the pipe is started again") {
			ended[line["channel"]] = true
		}
		return len(ended) == len(faults)
	})
	if n := rowCount(t, testkit.DB(t), tab); n != rows*len(faults) {
		t.Errorf("%d rows are left of %d", n, rows*len(faults))
	}
	if err := os.WriteFile(mended, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Rows and channels that have failed have pauses to wait for.
	for deadline := time.Now().Add(3 * testkit.Patience); rowCount(t, testkit.DB(t), tab) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d rows are left", rowCount(t, testkit.DB(t), tab))
		}
	}
	for fault := range faults {
		got := journal(filepath.Join(dir, name+"_"+strings.ReplaceAll(fault, " ", "_")))
		slices.Sort(got)
		if !slices.Equal(slices.Compact(got), numbers(rows)) {
			t.Errorf("%s: handled %q", fault, got)
		}
	}
	if lines := p.All("gave up"); lines != nil {
		t.Errorf("%v", lines)
	}
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
}

// begin: check

// -check starts the program, and stops it again.
func TestCheckOfAPipe(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	pid := filepath.Join(t.TempDir(), "pid")
	program := filepath.Join(t.TempDir(), "program")
	text := "#!/bin/sh\necho $$ >\"$1\"\nif [ $2 = fails ]; then echo no such module >&2; exit 1; fi\nwhile read -r line; do :; done\n"
	if err := testkit.WriteProgram(program, text); err != nil {
		t.Fatal(err)
	}
	out := runCheck(t, fast(testkit.DSN(t), channel+"=pipe:"+program+" "+pid+" secret"), cli.OK)
	if !strings.Contains(out, "starts, and ends when its stdin does") || strings.Contains(out, "secret") {
		t.Errorf("%s", out)
	}
	if _, err := os.Stat("/proc/" + journal(pid)[0]); err == nil {
		t.Error("it still runs")
	}
	out = runCheck(t, fast(testkit.DSN(t), channel+"=pipe:"+program+" "+pid+" fails"), cli.Failed)
	if !strings.Contains(out, "exit status 1: no such module") {
		t.Errorf("%s", out)
	}
}

// end: check
