// feature: outbox schedule execcmd webhook

package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// A receiver is down for a minute, with 1,000 rows waiting and poison among them.
func TestOutageOfAMinute(t *testing.T) {
	extra(t)
	const total, outage = 1000, time.Minute
	tab, channel, other := outboxTable(t, testkit.DB(t)), testkit.ChannelName(t), testkit.ChannelName(t)+"_other"
	var mu sync.Mutex
	done, attempts := map[string]time.Time{}, 0
	addr := testkit.FreshAddress(t)
	mux := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch string(body) {
		case "always 500":
			w.WriteHeader(http.StatusInternalServerError)
			return
		case "always 502":
			w.WriteHeader(http.StatusBadGateway)
			return
		case "never answered":
			<-r.Context().Done()
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if n := r.Header.Get("Pglistener-Attempt"); n != "1" {
			attempts++
		}
		done[string(body)] = time.Now()
	})
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload) select $1, 'row ' || i from generate_series(1, $2) i`, channel, total)
	for _, poison := range []string{"always 500", "always 502", "never answered"} {
		insert(t, testkit.DB(t), tab, channel, poison)
	}
	there := testkit.NewReceiver(t, testkit.Accept)
	p := runProgram(t, fast(testkit.DSN(t), channel+"=outbox:http://"+addr+"/in,"+other+"=outbox:"+there.URL, sending(tab, vars{
		"CONCURRENCY": "10", "HANDLER_TIMEOUT": "2s", "LOG_LEVEL": "info",
	})))
	p.Wait(t, "channel paused", 1)
	insert(t, testkit.DB(t), tab, other, "not paused")
	testkit.Eventually(t, "one endpoint's outage pauses the other", func() bool { return len(there.Requests()) == 1 })
	time.Sleep(outage) // it is the outage
	lines := strings.Count(p.String(), "\n")
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	server := &http.Server{Handler: mux}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		mu.Lock()
		n := len(done)
		mu.Unlock()
		if n == total {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d were delivered", n, total)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	first, last := time.Now(), time.Time{}
	for _, at := range done {
		if at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
	}
	t.Logf("the first request came %v after it was back, the last %v later; %d log lines in the outage; %d rows had spent an attempt",
		first.Sub(back).Round(time.Millisecond), last.Sub(first).Round(time.Millisecond), lines, attempts)
	if first.Sub(back) > 62*time.Second || last.Sub(first) > 5*time.Second || lines > 30 || attempts > 3 {
		t.Error("that is too much")
	}
}

// TestOldProgramWorksTheNewTable builds the program of 1.0 and lets it work the table beside this one, during and
// after the upgrade.
func TestOldProgramWorksTheNewTable(t *testing.T) {
	extra(t)
	const before = "766d9a9" // 1.0
	dir := t.TempDir()
	if out, err := exec.Command("sh", "-c", "git archive "+before+" | tar -x -C "+dir).CombinedOutput(); err != nil {
		testkit.Skip(t, "needs the history of the project: "+string(out))
	}
	old := filepath.Join(dir, "old")
	in(t, dir, "go", "build", "-o", old, ".")
	tab, channel := testkit.ChannelName(t), testkit.ChannelName(t)
	db := testkit.DB(t)
	dropLater(t, db, tab)
	cmd := exec.Command(old, "-outbox-schema")
	cmd.Env = []string{"OUTBOX_TABLE=" + tab}
	sql, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	testkit.Exec(t, db, string(sql))
	journal := filepath.Join(t.TempDir(), "journal")
	v := fast(testkit.DSN(t), channel+"=outbox:append:"+journal, sending(tab, vars{"HANDLER_TIMEOUT": "1s", "CATCH_UP_INTERVAL": "1s"}))
	start := func(path string) *process {
		p := &process{Logs: testkit.NewLogs(t), cmd: exec.Command(path), exited: make(chan error, 1)}
		for name, value := range v {
			p.cmd.Env = append(p.cmd.Env, name+"="+value)
		}
		return p.start(t)
	}
	oldOne := start(old)
	oldOne.Wait(t, "listening", 1)
	written := 0
	write := func(n int) {
		for range n {
			testkit.Exec(t, db, `insert into "`+tab+`" (channel, payload) values ($1, $2)`, channel, fmt.Sprintf("row-%d", written))
			written++
		}
	}
	write(200)
	makeOutbox(t, db, tab) // the upgrade, while the old program works
	write(200)
	newOne := start(program(t))
	newOne.Wait(t, "listening", 1)
	write(1000)
	for deadline := time.Now().Add(90 * time.Second); rowCount(t, db, tab) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d rows are left", rowCount(t, db, tab))
		}
	}
	newOne.signal(t, syscall.SIGTERM) // and the way back
	newOne.exit(t, cli.OK, stopBound)
	write(100)
	emptied(t, db, tab)
	text := testkit.ReadFile(t, journal)
	for i := range written {
		if !strings.Contains(text, fmt.Sprintf(`"row-%d"`, i)) {
			t.Fatalf("row %d of %d was never handled", i, written)
		}
	}
}

// Three replicas share a schedule: one falls silent, one is frozen, one is killed, each in the middle of a run; the
// times go on.
func TestReplicasThatFallSilentFreezeOrDie(t *testing.T) {
	extra(t)
	tab, channel, dir := testkit.ChannelName(t), testkit.ChannelName(t), t.TempDir()
	recorded(t, testkit.DB(t), tab)
	script, handled := filepath.Join(dir, "script"), filepath.Join(dir, "handled")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho \"$REPLICA $PGLISTENER_RUN_AT\" >> "+dir+"/ran\nsleep 0.3\n"+
		"echo \"$PGLISTENER_ID $REPLICA $PGLISTENER_ATTEMPT \" >> "+handled+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	replicas := make([]*process, 3)
	for i := range replicas {
		v := fast(testkit.DSN(t), channel+"=outbox:exec:"+script, sending(tab, vars{
			"HANDLER_TIMEOUT": "1s", "CATCH_UP_INTERVAL": "1s", strings.ToUpper(channel) + "_SCHEDULE": "@every 1s",
		}))
		if i == 0 {
			v["DATABASE_URL"] = dsn
		}
		replicas[i] = runProgram(t, replicated(v, i))
		replicas[i].Wait(t, "listening", 1)
	}
	ran := func() []string {
		data, _ := os.ReadFile(filepath.Join(dir, "ran"))
		return strings.Split(strings.TrimSpace(string(data)), "\n")
	}
	// busy waits until a replica is in the middle of a run, and goesOn until others have run ten times more.
	busy := func(i int) {
		testkit.Eventually(t, fmt.Sprintf("replica %d never runs", i), func() bool { all := ran(); return strings.HasPrefix(all[len(all)-1], fmt.Sprintf("replica-%d ", i)) })
	}
	goesOn := func(what string) {
		t.Helper()
		before := len(ran())
		for deadline := time.Now().Add(60 * time.Second); len(ran()) < before+5; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("nobody goes on when one %s", what)
			}
		}
	}
	goesOn("is well")
	busy(0)
	proxy.Refuse(true)
	proxy.Silence()
	goesOn("has fallen silent")
	proxy.Refuse(false)
	busy(1)
	replicas[1].signal(t, syscall.SIGSTOP)
	goesOn("is frozen")
	replicas[1].signal(t, syscall.SIGCONT)
	busy(2)
	replicas[2].signal(t, syscall.SIGKILL)
	goesOn("was killed")
	for _, p := range replicas[:2] {
		p.signal(t, syscall.SIGTERM)
		p.exit(t, cli.OK, stopBound)
	}
	judge(t, testkit.DB(t), tab, handled, nil, false)
	times := map[string]int{}
	for _, line := range ran() {
		_, at, _ := strings.Cut(line, " ")
		times[at]++
	}
	repeats := 0
	for at, n := range times {
		if at == "" {
			t.Error("a run without its time")
		}
		repeats += n - 1
	}
	t.Logf("%d times, %d repeats, after three faults", len(times), repeats)
	if repeats > 6 {
		t.Errorf("%d repeats", repeats)
	}
}
