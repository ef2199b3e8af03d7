// feature: outbox execcmd webhook health

package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest"
	"github.com/pglistener/pglistener/internal/pgtest/history"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestSoak runs three replicas on a plain, a doorbell and an outbox channel for SOAK_MINUTES, with faults of the network, of the
// server and of the receiver at random, by the plan of a seed. At the end nothing is lost, the gaps that were told cover what the
// plain channel did not hear, and the two replicas that nobody kills need no more memory, descriptors and goroutines than before.
// make soak runs it.
func TestSoak(t *testing.T) {
	if os.Getenv("TEST_SOAK") == "" {
		t.Skip("make soak runs it")
	}
	minutes := 30
	if text := os.Getenv("SOAK_MINUTES"); text != "" {
		var err error
		if minutes, err = strconv.Atoi(text); err != nil || minutes < 1 {
			t.Fatalf("SOAK_MINUTES: %q is not a number of minutes", text)
		}
	}
	c := newChaos(t)
	fmt.Printf("soak: %d minutes, CHAOS_SEED=%d\n", minutes, c.seed)
	s := testkit.OwnServer(t, "max_connections = 100")
	db := testkit.Open(t, s.DSN())
	recorded(t, db, "outbox")
	in := &soakReceiver{dice: c.stream(1)}
	receiver := testkit.NewReceiver(t, func(http.ResponseWriter, *http.Request) {})
	receiver.Config.Handler = in // a Receiver would keep every request
	dsn, proxy := testkit.Proxied(t, s.DSN())
	dir := t.TempDir()

	v := fast(dsn, "plain,bell=doorbell:"+receiver.URL+"/bell,jobs=outbox:"+receiver.URL+"/jobs", vars{
		"PROBE_INTERVAL": "2s", "CATCH_UP_INTERVAL": "30s", "HANDLER_TIMEOUT": "2s", "JOBS_CONCURRENCY": "4", "LOG_LEVEL": "info", "HANDLER_ATTEMPTS": "1000",
	})
	replicas, addresses := make([]*process, 3), make([]string, 3)
	begin := func(i int) {
		v := replicated(v, i)
		v["HTTP_ADDR"], v["PLAIN_HANDLER"] = addresses[i], "append:"+filepath.Join(dir, fmt.Sprintf("plain-%d", i))
		v["WEBHOOK_HEADERS"] = "X-Replica:" + v["REPLICA"]
		replicas[i] = runProgram(t, v)
	}
	for i := range replicas {
		addresses[i] = testkit.FreshAddress(t)
		begin(i)
		replicas[i].Wait(t, "listening", 1)
	}

	producing, stop := context.WithCancel(t.Context())
	var producers sync.WaitGroup
	var sent []edgeSent // to the plain channel
	var known []string
	var rung time.Time
	produce := func(pause time.Duration, write func(n int) error) {
		producers.Go(func() {
			for n := 0; producing.Err() == nil; time.Sleep(pause) {
				if write(n) == nil { // else the server is away
					n++
				}
			}
		})
	}
	produce(20*time.Millisecond, func(n int) error {
		e := edgeSent{payload: fmt.Sprint(n), began: time.Now()}
		_, err := db.Exec("select pg_notify('plain', $1)", e.payload)
		if e.ended = time.Now(); err == nil {
			sent = append(sent, e)
		}
		return err
	})
	produce(200*time.Millisecond, func(int) error {
		began := time.Now()
		_, err := db.Exec("notify bell")
		if err == nil {
			rung = began
		}
		return err
	})
	produce(20*time.Millisecond, func(n int) error {
		payload := fmt.Sprintf("job-%d", n)
		_, err := db.Exec("insert into outbox (channel, payload) values ('jobs', $1)", payload)
		if err == nil {
			known = append(known, payload)
		}
		return err
	})

	var readings [][]soakReading // by minute, of the replicas that nobody kills
	read := func() (now []soakReading) {
		for i := range 2 {
			now = append(now, readMetrics(t, addresses[i]))
		}
		readings = append(readings, now)
		return now
	}
	time.Sleep(5 * time.Second) // what is needed at all is needed by then
	calm := read()
	faults := map[string]int{}
	end, minute := time.Now().Add(time.Duration(minutes)*time.Minute), time.Now().Add(time.Minute)
	for n := 1; time.Now().Before(end); {
		for _, f := range c.plan(1, 3, "silence", "reset", "refuse", "mute", "delay", "cut", "restart", "kill", "freeze", "receiver") {
			if !time.Now().Before(end) {
				break
			}
			time.Sleep(5 * f.after)
			faults[f.kind]++
			soakFault(t, f, proxy, s, db, in, replicas[2], func() { begin(2) })
			if time.Now().After(minute) {
				now := read()
				fmt.Printf("soak: minute %d: %d faults, plain %d, jobs %d of %d, replicas %v\n", n, sum(faults), len(sent), in.count(), len(known), now)
				n, minute = n+1, minute.Add(time.Minute)
			}
		}
	}
	stop()
	producers.Wait()
	in.away(0)
	drained(t, db, "outbox")
	testkit.Eventually(t, "the doorbell did not run after it was last rung", func() bool { return in.lastBell("replica-0").After(rung) && in.lastBell("replica-1").After(rung) })
	for i := range 2 {
		testkit.Eventually(t, "not ready at the end", func() bool { code, _ := get(t, "http://"+addresses[i]+"/readyz"); return code == http.StatusOK })
	}
	time.Sleep(5 * time.Second) // as before the first reading
	last := read()
	for _, p := range replicas {
		p.signal(t, syscall.SIGTERM)
		p.exit(t, cli.OK, stopBound)
	}
	fmt.Printf("soak: %v, %d faults %v\n", last, sum(faults), faults)

	h, err := history.Read(db, "outbox")
	if err != nil {
		t.Fatal(err)
	}
	h.Calls, h.Known = in.calls, known
	r := history.Check(h)
	for _, p := range r.Problems[:min(10, len(r.Problems))] {
		t.Error(p)
	}
	fmt.Printf("soak: %d jobs, %d handled, %d repeats, %d problems\n", r.Committed, r.Handled, r.Repeats, len(r.Problems))
	for i := range 2 {
		checkPlain(t, replicas[i], filepath.Join(dir, fmt.Sprintf("plain-%d", i)), sent)
		most := 0.0
		for _, now := range readings[:max(1, len(readings)/3)] {
			most = max(most, now[i].rss)
		}
		if last[i].rss > 1.25*most+8 || last[i].fds > calm[i].fds+6 || last[i].goroutines > calm[i].goroutines+10 {
			t.Errorf("replica %d grows: %v at the start, %v at the end, at most %.0f MB in the first third", i, calm[i], last[i], most)
		}
	}
}

func sum(m map[string]int) (n int) {
	for _, v := range m {
		n += v
	}
	return n
}

// soakFault lets one thing happen, and mends what does not mend itself.
func soakFault(t *testing.T, f fault, proxy *pgtest.Proxy, s *pgtest.Server, db *sql.DB, in *soakReceiver, victim *process, begin func()) {
	t.Helper()
	awhile := func() { time.Sleep(2 * f.after) }
	switch f.kind {
	case "silence":
		proxy.Silence()
	case "reset":
		proxy.Reset()
	case "refuse":
		proxy.Refuse(true)
		proxy.Reset()
		awhile()
		proxy.Refuse(false)
	case "mute":
		proxy.Mute(true)
		proxy.Reset()
		awhile()
		proxy.Mute(false)
	case "delay":
		proxy.Delay(50 * time.Millisecond)
		proxy.Reset()
		awhile()
		proxy.Delay(0)
	case "cut":
		_, _ = db.Exec("select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1", fmt.Sprintf("replica-%d", f.target))
	case "restart":
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
		awhile()
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
	case "kill":
		_ = victim.cmd.Process.Signal(syscall.SIGKILL)
		<-victim.exited
		begin()
	case "freeze":
		victim.signal(t, syscall.SIGSTOP)
		awhile()
		if f.target == 0 {
			time.Sleep(30 * time.Second) // longer than its leases: what it sends then is late
		}
		victim.signal(t, syscall.SIGCONT)
	case "receiver":
		in.away(10 * f.after)
	}
}

// soakReceiver takes down what it has accepted, and fails now and then.
type soakReceiver struct {
	mu    sync.Mutex
	dice  interface{ IntN(int) int }
	until time.Time // it is away until then
	calls []history.Call
	bells map[string]time.Time // when the last run of each replica began
}

func (s *soakReceiver) away(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.until = time.Now().Add(d)
}

func (s *soakReceiver) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.calls)
}

func (s *soakReceiver) lastBell(replica string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bells[replica]
}

func (s *soakReceiver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	away, dice := began.Before(s.until), s.dice.IntN(100)
	s.mu.Unlock()
	switch {
	case away:
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	case dice < 3:
		w.WriteHeader(http.StatusInternalServerError)
		return
	case dice < 4: // never answered
		<-r.Context().Done()
		return
	case dice < 5: // cut off
		panic(http.ErrAbortHandler)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	replica := r.Header.Get("X-Replica")
	if r.URL.Path == "/bell" {
		if s.bells == nil {
			s.bells = map[string]time.Time{}
		}
		s.bells[replica] = began
		return
	}
	attempt, _ := strconv.Atoi(r.Header.Get("Pglistener-Attempt"))
	s.calls = append(s.calls, history.Call{ID: r.Header.Get("Webhook-Id"), By: replica, Attempt: attempt, Payload: string(body)})
}

// soakReading is what a replica needs.
type soakReading struct{ rss, fds, goroutines float64 } // rss in MB

func (r soakReading) String() string {
	return fmt.Sprintf("%.1f MB %.0f fds %.0f goroutines", r.rss, r.fds, r.goroutines)
}

func readMetrics(t *testing.T, addr string) soakReading {
	t.Helper()
	_, text := get(t, "http://"+addr+"/metrics")
	value := func(name string) float64 {
		m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("no %s in the metrics", name)
		}
		v, _ := strconv.ParseFloat(m[1], 64)
		return v
	}
	return soakReading{value("process_resident_memory_bytes") / 1e6, value("process_open_fds"), value("go_goroutines")}
}

// checkPlain compares what a replica has appended with what was sent: in order, no ghost, and what is missing lies in a gap that it
// told, or was under way when the gap began.
func checkPlain(t *testing.T, p *process, journal string, sent []edgeSent) {
	t.Helper()
	at := map[string]int{}
	for i, s := range sent {
		at[s.payload] = i
	}
	heard, last := map[int]bool{}, -1
	for line := range strings.Lines(testkit.ReadFile(t, journal)) {
		var entry map[string]string
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Errorf("%q: %v", line, err)
			continue
		}
		i, known := at[entry["payload"]]
		if !known || i <= last {
			t.Errorf("%q was heard after number %d; it was sent: %v", entry["payload"], last, known)
		}
		heard[i], last = true, i
	}
	const way = testTimeout // an answer that takes longer counts as none
	lost, gaps := 0, slices.Concat(p.All("reconnected; notifications"), p.All("delivery resumed"))
	began := edgeTime(p.All("listening")[0]["time"])
	for i, s := range sent {
		if heard[i] || s.began.Before(began) {
			continue
		}
		lost++
		if !slices.ContainsFunc(gaps, func(g testkit.Line) bool {
			return s.ended.Add(way).After(edgeTime(g["gap_from"])) && s.began.Before(edgeTime(g["gap_to"]))
		}) {
			t.Errorf("%s was lost in no gap that was told: %v to %v", s.payload, s.began, s.ended)
		}
	}
	fmt.Printf("soak: plain: %d sent, %d heard, %d lost in %d gaps\n", len(sent), len(heard), lost, len(gaps))
}
