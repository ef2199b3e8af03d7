// feature: outbox execcmd

package main

import (
	"database/sql"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/history"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// chaos is a plan of faults that a seed decides. With the same seed it is the same plan: what is done when, to whom, what producers
// roll back and which calls fail. What the scheduler makes of it differs.
type chaos struct {
	*rand.Rand
	seed uint64
}

// newChaos takes the seed from CHAOS_SEED, or any, and says how to run it again.
func newChaos(t *testing.T) chaos {
	t.Helper()
	seed := rand.Uint64N(1_000_000)
	if text := os.Getenv("CHAOS_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("CHAOS_SEED: %v", err)
		}
	}
	t.Logf("seed %d", seed)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to run this plan again: CHAOS_SEED=%d go test -count=1 -run '^%s$' .", seed, t.Name())
		}
	})
	c := chaos{seed: seed}
	c.Rand = c.stream(0)
	return c
}

// stream is a source of its own, for one goroutine.
func (c chaos) stream(n uint64) *rand.Rand { return rand.New(rand.NewPCG(c.seed, n)) }

// fault is an entry of the plan.
type fault struct {
	kind   string
	target int
	after  time.Duration // since the one before
}

// plan makes a plan in which each kind comes up.
func (c chaos) plan(n, targets int, kinds ...string) (all []fault) {
	for len(all) < n {
		for _, i := range c.Perm(len(kinds)) {
			all = append(all, fault{kinds[i], c.IntN(targets), time.Duration(150+c.IntN(300)) * time.Millisecond})
		}
	}
	return all
}

// worker writes a program for exec that takes down what it has handled, and fails in so many of 100 calls. Payloads end in a newline,
// for when the listener is killed stdin may end early.
func (c chaos) worker(t *testing.T, out string, failing int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "worker")
	script := fmt.Sprintf("#!/bin/sh\nread -r payload || exit 1\nset -- $(echo \"%d $payload $PGLISTENER_ATTEMPT\" | cksum)\n"+
		"[ $(($1 %% 100)) -lt %d ] && exit 1\necho \"$PGLISTENER_ID $REPLICA $PGLISTENER_ATTEMPT $payload\" >> %s\n", c.seed, failing, out)
	if err := testkit.WriteProgram(path, script); err != nil {
		t.Fatal(err)
	}
	return path
}

// recorded makes an outbox that keeps the history of its rows.
func recorded(t *testing.T, db *sql.DB, table string) {
	t.Helper()
	makeOutbox(t, db, table)
	testkit.Exec(t, db, history.Schema(table))
	t.Cleanup(func() {
		_, _ = db.Exec(`drop table if exists "` + table + `", "` + table + `_history"; drop function if exists "` + table + `_keep"`)
	})
}

// replicated is v for replica i, which its sessions and its programs are told.
func replicated(v vars, i int) vars {
	r := maps.Clone(v)
	r["REPLICA"] = fmt.Sprintf("replica-%d", i)
	r["DATABASE_URL"] = testkit.WithParams(v["DATABASE_URL"], "application_name", r["REPLICA"])
	return r
}

// judge checks the history of an outbox that was worked to its end.
func judge(t *testing.T, db *sql.DB, table, out string, known []string, ordered bool) *history.Report {
	t.Helper()
	h, err := history.Read(db, table)
	if err != nil {
		t.Fatal(err)
	}
	text, _ := os.ReadFile(out)
	h.Calls, h.Known, h.Ordered = history.Calls(string(text)), known, ordered
	r := history.Check(h)
	for i, p := range r.Problems {
		if i == 10 {
			t.Errorf("and %d more", len(r.Problems)-i)
			break
		}
		t.Error(p)
	}
	t.Logf("%d committed events, %d handled, %d repeats, %d entries of history", r.Committed, r.Handled, r.Repeats, len(h.Events))
	return r
}

// drained waits until all rows are handled. The leases of the killed end after margin + timeout + margin, 22 s; retries take a while.
func drained(t *testing.T, db *sql.DB, table string) {
	t.Helper()
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		var n int
		if err := db.QueryRow(`select count(*) from "` + table + `"`).Scan(&n); err == nil && n == 0 {
			return
		} else if time.Now().After(deadline) {
			t.Fatalf("%d rows are left: %v", n, err)
		}
	}
}

// TestOutboxChaos kills everything at any time, by the plan of a seed: every committed row is handled at least once, no row that was
// rolled back ever is, no result is written by who has lost the row, and the table ends empty.
func TestOutboxChaos(t *testing.T) {
	t.Parallel()
	c := newChaos(t)
	s := testkit.OwnServer(t)
	db := testkit.Open(t, s.DSN())
	recorded(t, db, "outbox")
	channel := testkit.ChannelName(t)
	out := filepath.Join(t.TempDir(), "handled")
	v := fast(s.DSN(), channel+"=outbox:exec:"+c.worker(t, out, 5), vars{
		"CONCURRENCY": "4", "HANDLER_TIMEOUT": "1s", "PROBE_INTERVAL": "1s", "CATCH_UP_INTERVAL": "1s", "SHUTDOWN_TIMEOUT": "1s",
	})

	const total, writers = 5000, 5
	var mu sync.Mutex
	var known []string
	var wg sync.WaitGroup
	for w := range writers {
		dice := c.stream(uint64(w + 1))
		wg.Go(func() {
			for i := range total / writers {
				// What is to happen is decided before anything can fail, and so by the seed alone.
				payload, rollback, query := fmt.Sprintf("w%d-%d", w, i), dice.IntN(5) == 0, "insert into outbox (channel, payload) values ($1, $2 || E'\\n')"
				if rollback {
					payload = "rolled back " + payload
				}
				if dice.IntN(20) == 0 { // most of these replace one that waits, or change one that is being handled
					query = "insert into outbox (channel, payload, key) values ($1, $2 || E'\\n', 'key') on conflict (channel, key) where failed_at is null do update set payload = excluded.payload"
				}
				for written := false; !written; {
					tx, err := db.Begin()
					if err != nil {
						time.Sleep(10 * time.Millisecond) // the server is away
						continue
					}
					if _, err = tx.Exec(query, channel, payload); err != nil || rollback {
						_ = tx.Rollback()
						written = err == nil
					} else if written = tx.Commit() == nil; written { // else nobody knows; it may be there, under the same name as its successor
						mu.Lock()
						known = append(known, payload)
						mu.Unlock()
					}
				}
			}
		})
	}
	replicas := make([]*process, 2)
	for i := range replicas {
		replicas[i] = runProgram(t, replicated(v, i))
	}
	writing := make(chan struct{})
	go func() {
		wg.Wait()
		close(writing)
	}()
	faults := 0
	for _, f := range c.plan(300, len(replicas), "kill", "cut", "restart") {
		select {
		case <-writing:
			if faults >= 6 {
				goto over
			}
		default:
		}
		faults++
		time.Sleep(f.after)
		switch f.kind {
		case "kill":
			_ = replicas[f.target].cmd.Process.Signal(syscall.SIGKILL)
			<-replicas[f.target].exited
			replicas[f.target] = runProgram(t, replicated(v, f.target))
		case "cut":
			_, _ = db.Exec("select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'replica%'")
		case "restart":
			if err := s.Stop(); err != nil {
				t.Fatal(err)
			}
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
		}
	}
over:
	<-writing
	t.Logf("%d faults", faults)
	drained(t, db, "outbox")
	for _, p := range replicas {
		p.signal(t, syscall.SIGTERM)
		p.exit(t, cli.OK, stopBound)
	}
	judge(t, db, "outbox", out, known, false)
}

// TestOutboxKeepsItsOrder: one replica with CONCURRENCY=1 is stopped and started, and its LISTEN sessions are cut, by the plan of a
// seed. Nothing fails that has claimed a row, so the rows are handled in order.
func TestOutboxKeepsItsOrder(t *testing.T) {
	t.Parallel()
	c := newChaos(t)
	db, table, channel := testkit.DB(t), testkit.ChannelName(t), testkit.ChannelName(t)
	recorded(t, db, table)
	out := filepath.Join(t.TempDir(), "handled")
	v := fast(testkit.DSN(t), channel+"=outbox:exec:"+c.worker(t, out, 0), sending(table, vars{"PROBE_INTERVAL": "1s", "CATCH_UP_INTERVAL": "1s"}))
	v["PING_TIMEOUT"] = "15s" // a claim that a busy machine answers late is nobody's until its lease ends
	v = replicated(v, int(c.seed))
	p := runProgram(t, v)
	const total = 1000
	writing := make(chan struct{})
	var known []string
	go func() {
		defer close(writing)
		for i := range total {
			payload := fmt.Sprintf("row-%d", i)
			if _, err := db.Exec(`insert into "`+table+`" (channel, payload) values ($1, $2 || E'\n')`, channel, payload); err != nil {
				t.Errorf("insert: %v", err)
			}
			known = append(known, payload)
			time.Sleep(2 * time.Millisecond) // so that the faults fall between
		}
	}()
	for _, f := range c.plan(8, 1, "stop", "cut") {
		time.Sleep(f.after)
		switch f.kind {
		case "stop":
			p.signal(t, syscall.SIGTERM)
			p.exit(t, cli.OK, stopBound)
			p = runProgram(t, v)
			p.Wait(t, "listening", 1)
		case "cut": // not a session of the outbox: a claim whose answer is lost is nobody's until its lease ends
			_, _ = db.Exec(`select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1 and query ~ '^(LISTEN|$)'`, v["REPLICA"])
		}
	}
	<-writing
	drained(t, db, table)
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	if r := judge(t, db, table, out, known, true); r.Repeats > 0 {
		t.Errorf("%d repeats although nothing has failed", r.Repeats)
	}
}

// The whole way from a row to a program, and back to the row.
func TestOutboxIDAndAttempt(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	script := filepath.Join(t.TempDir(), "script")
	text := "#!/bin/sh\necho \"$PGLISTENER_ID $PGLISTENER_ATTEMPT $(wc -c)\"; test \"$PGLISTENER_ATTEMPT\" = 2\n"
	if err := testkit.WriteProgram(script, text); err != nil {
		t.Fatal(err)
	}
	r := start(t, fast(testkit.DSN(t), channel+"=outbox:exec:"+script, sending(tab)), nil).listening(t)
	id := insert(t, testkit.DB(t), tab, channel, strings.Repeat("x", 5<<20)) // no notification could hold it
	emptied(t, testkit.DB(t), tab)
	r.Wait(t, "handler failed; the row will be tried again", 1)
	for attempt := 1; attempt <= 2; attempt++ {
		if got, want := r.Wait(t, "output", attempt)["line"], fmt.Sprintf("%s %d %d", id, attempt, 5<<20); got != want {
			t.Errorf("the program saw %q, want %q", got, want)
		}
	}
}

// TestRowThatKillsTheListener each time that it is begun is given up in the end, and what comes after it is done.
func TestRowThatKillsTheListener(t *testing.T) {
	t.Parallel()
	channel, tab, script := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), filepath.Join(t.TempDir(), "script")
	if err := testkit.WriteProgram(script, "#!/bin/sh\nread -r payload\ntest \"$payload\" != poison || kill -9 $PPID\n"); err != nil {
		t.Fatal(err)
	}
	v := fast(testkit.DSN(t), channel+"=outbox:exec:"+script, sending(tab, vars{"OUTBOX_ATTEMPTS": "1"}))
	id := insert(t, testkit.DB(t), tab, channel, "poison")
	testkit.Exec(t, testkit.DB(t), `update "`+tab+`" set attempts = 9`) // as if this were the tenth time
	runProgram(t, v).exit(t, -1, stopBound)
	testkit.Exec(t, testkit.DB(t), `update "`+tab+`" set leased_until = now()`) // as it is after a while
	insert(t, testkit.DB(t), tab, channel, "good")
	p := runProgram(t, v)
	if line := p.Wait(t, "gave up", 1); line["event"] != id || !strings.Contains(fmt.Sprint(line["error"]), "begun 10 times") {
		t.Errorf("%v", line)
	}
	testkit.Eventually(t, "what came after it is not done", func() bool { return rowCount(t, testkit.DB(t), tab) == 1 })
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
}
