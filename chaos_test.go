// feature: outbox execcmd

package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestOutboxChaos kills everything at any time: every committed row is handled at least once, no row that was
// rolled back ever is, and the table ends empty.
func TestOutboxChaos(t *testing.T) {
	t.Parallel()
	s := testkit.OwnServer(t)
	db := testkit.Open(t, s.DSN())
	makeOutbox(t, db, "outbox")
	channel := testkit.ChannelName(t)
	dir := t.TempDir()
	out := filepath.Join(dir, "handled")
	worker := filepath.Join(dir, "worker")
	// Fails at random; what it has handled is a line, appended at once.
	if err := os.WriteFile(worker, []byte("#!/bin/sh\nread -r payload\n[ $(($(od -An -N1 -tu1 /dev/urandom) % 20)) = 0 ] && exit 1\necho \"$payload\" >> "+out+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	v := fast(s.DSN(), channel+"=outbox:exec:"+worker, vars{
		"CONCURRENCY": "4", "HANDLER_TIMEOUT": "1s", "PROBE_INTERVAL": "1s", "CATCH_UP_INTERVAL": "1s", "SHUTDOWN_TIMEOUT": "1s",
	})

	const total, writers = 5000, 5
	committed := make(chan string, total)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := 0; i < total/writers; {
				payload := fmt.Sprintf("w%d-%d", w, i)
				rollback := rand.N(5) == 0
				if rollback {
					payload = "rolled back " + payload
				}
				tx, err := db.Begin()
				if err != nil {
					time.Sleep(10 * time.Millisecond) // the server is away
					continue
				}
				_, err = tx.Exec("insert into outbox (channel, payload) values ($1, $2 || E'\\n')", channel, payload)
				if err != nil || rollback {
					_ = tx.Rollback()
					continue
				}
				if tx.Commit() == nil {
					committed <- payload
					i++
				} // else nobody knows; the row may be there, under the same name as its successor
			}
		})
	}
	replicas := make([]*process, 2)
	for i := range replicas {
		replicas[i] = runProgram(t, v)
	}
	writing := make(chan struct{})
	go func() {
		wg.Wait()
		close(writing)
	}()
	faults := 0
	for done := false; !done || faults < 6; faults++ {
		select {
		case <-writing:
			done = true
		default:
		}
		time.Sleep(300 * time.Millisecond) // between two faults
		switch faults % 3 {
		case 0:
			i := rand.N(len(replicas))
			_ = replicas[i].cmd.Process.Signal(syscall.SIGKILL)
			replicas[i] = runProgram(t, v)
		case 1:
			_, _ = db.Exec("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pglistener'")
		case 2:
			if err := s.Stop(); err != nil {
				t.Fatal(err)
			}
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
		}
	}
	<-writing
	close(committed)
	// The leases of the killed end after margin + timeout + margin, 22 s; retries take a while.
	deadline := time.Now().Add(90 * time.Second)
	for {
		var n int
		if err := db.QueryRow("select count(*) from outbox").Scan(&n); err == nil && n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d rows are left", n)
		}
		time.Sleep(50 * time.Millisecond)
	}
	for _, p := range replicas {
		p.signal(t, syscall.SIGTERM)
		p.exit(t, cli.OK, stopBound)
	}
	handled := map[string]int{}
	for line := range strings.Lines(testkit.ReadFile(t, out)) {
		handled[strings.TrimSpace(line)]++
	}
	repeats := 0
	for payload, n := range handled {
		if strings.HasPrefix(payload, "rolled back") {
			t.Errorf("%q was handled", payload)
		}
		repeats += n - 1
	}
	missing := 0
	for payload := range committed {
		if handled[payload] == 0 {
			missing++
		}
	}
	t.Logf("%d committed rows, %d repeats, %d missing, after %d faults", total, repeats, missing, faults)
	if missing > 0 {
		t.Errorf("%d committed rows were never handled", missing)
	}
}

// The whole way from a row to a program, and back to the row.
func TestOutboxIDAndAttempt(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	script := filepath.Join(t.TempDir(), "script")
	text := "#!/bin/sh\necho \"$PGLISTENER_ID $PGLISTENER_ATTEMPT $(wc -c)\"; test \"$PGLISTENER_ATTEMPT\" = 2\n"
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
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
