package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The settings of TestEveryBoundary, and what follows from them. A fault is noticed within edgeNotice; then a connection is made,
// and proven, by a probe that may have to be sent again.
const (
	edgeInterval = 400 * time.Millisecond
	edgeTimeout  = time.Second
	edgeProbe    = time.Second
	edgeBackoff  = 100 * time.Millisecond
	edgeNotice   = edgeInterval + edgeTimeout
	edgeHeard    = edgeNotice + edgeBackoff
	edgeReady    = edgeHeard + edgeTimeout + edgeProbe*3/2
	edgeSlack    = 2 * time.Second        // for a loaded machine
	edgeStall    = 200 * time.Millisecond // a machine that stands still for so long proves nothing about bounds
)

// edgeFaults are tried at each point. A delay within PING_TIMEOUT is to go unnoticed.
var edgeFaults = []pgtest.Fault{
	{Kind: pgtest.Cut}, {Kind: pgtest.Torn}, {Kind: pgtest.Reset}, {Kind: pgtest.Silence}, {Kind: pgtest.Forget},
	{Kind: pgtest.Delay, Delay: edgeTimeout / 5}, {Kind: pgtest.Delay, Delay: edgeNotice + edgeTimeout},
}

// edge is a way to connect: who, and whether with TLS.
type edge struct {
	name   string
	user   string
	config *tls.Config
	params string
}

// edgeCase is one fault on one way to connect.
type edgeCase struct {
	edge
	fault pgtest.Fault
}

func (c edgeCase) String() string {
	name := c.name + " " + c.fault.Point.String() + " " + string(c.fault.Kind)
	if c.fault.Delay > 0 {
		name += " " + c.fault.Delay.String()
	}
	return name
}

// TestEveryBoundary records what a session says, and then makes the network fail after each message of it, in every way. make test
// runs a sample, and make test-extra all. BOUNDARY='scram.*SASLFinal' runs what matches.
func TestEveryBoundary(t *testing.T) {
	s := testkit.OwnServer(t, "max_connections = 400")
	root := testkit.Open(t, s.DSN())
	testkit.Exec(t, root, "create role password login password 'pw'; create role scram login password '"+quickSCRAM("pw")+"'")
	for _, err := range []error{
		s.WriteFile("pg_hba.conf", os.O_TRUNC, []byte("host all postgres all trust\nhost all password all password\nhost all scram all scram-sha-256\n")), s.Reload(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	a := testkit.NewAuthority(t)
	cert, key := a.Issue(&x509.Certificate{DNSNames: []string{"localhost"}})
	config := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}}
	var edges []edge
	for _, user := range []string{"password", "scram"} { // a session that is trusted says less, and nothing else
		edges = append(edges, edge{user, user, nil, "sslmode=disable"}, edge{user + "+tls", user, config, "sslmode=verify-full&sslrootcert=" + a.File()})
	}
	// Few share a database, because a NOTIFY wakes every listener of its database.
	const databases = 8
	workers := databases
	if os.Getenv("TEST_EXTRA") != "" {
		workers = 4 * databases // without the race detector
	}
	free := make(chan *edgeWorker, workers)
	for i := range databases {
		name := fmt.Sprintf("edge%d", i)
		testkit.Exec(t, root, "create database "+name)
		db := testkit.Open(t, strings.Replace(s.DSN(), "/"+pgtest.Database+"?", "/"+name+"?", 1))
		for j := range workers / databases {
			free <- &edgeWorker{database: name, db: db, addr: s.Addr(), channel: fmt.Sprintf("edge_%d_%d", i, j)}
		}
	}

	points := make([][]pgtest.Point, len(edges))
	var recording sync.WaitGroup
	for i, e := range edges {
		d := <-free
		recording.Go(func() {
			points[i] = d.record(t, e)
			free <- d
		})
	}
	recording.Wait()
	var cases []edgeCase
	for i, e := range edges {
		for _, p := range points[i] {
			for _, f := range edgeFaults {
				f.Point = p
				cases = append(cases, edgeCase{e, f})
			}
		}
	}
	all := len(cases)
	if pattern := os.Getenv("BOUNDARY"); pattern != "" {
		cases = slices.DeleteFunc(cases, func(c edgeCase) bool { return !regexp.MustCompile(pattern).MatchString(c.String()) })
	} else if os.Getenv("TEST_EXTRA") == "" {
		i := 0 // 19 runs through all seven faults
		cases = slices.DeleteFunc(cases, func(edgeCase) bool { i++; return i%19 != 0 })
	}
	began := time.Now()
	var running sync.WaitGroup
	for _, c := range cases {
		d := <-free
		running.Go(func() {
			defer func() { free <- d }()
			for again := 0; ; again++ {
				problems, stall, log := d.try(t, c)
				if len(problems) == 0 {
					return
				}
				text := fmt.Sprintf("%v:\n\t%s\nthe machine stood still for %v at once, log:\n%s", c, strings.Join(problems, "\n\t"), stall, log)
				if stall < edgeStall || again == 2 {
					t.Error(text)
					return
				}
				t.Log("it is tried again, because the machine was too busy to tell: " + text)
			}
		})
	}
	running.Wait()
	t.Logf("%d of %d cases in %v", len(cases), all, time.Since(began).Round(time.Second))

	// All that a Listener starts has its label.
	var left string
	for deadline := time.Now().Add(testkit.Patience); ; time.Sleep(50 * time.Millisecond) {
		var profile bytes.Buffer
		_ = pprof.Lookup("goroutine").WriteTo(&profile, 1)
		if left = strings.Join(regexp.MustCompile(`(?m)^# labels: .*"boundary".*(\n#.*){0,6}`).FindAllString(profile.String(), 5), "\n"); left == "" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("goroutines are left:\n%s", left)
		}
	}
}

// quickSCRAM is what the server keeps of a password for SCRAM, with 1,000 iterations instead of 4,096: it is most of what
// a case costs, and lib/pq takes no fewer.
func quickSCRAM(password string) string {
	salt := []byte("salt")
	salted, _ := pbkdf2.Key(sha256.New, password, salt, 1000, sha256.Size) // its only error is of FIPS 140
	sum := func(text string) []byte {
		h := hmac.New(sha256.New, salted)
		h.Write([]byte(text))
		return h.Sum(nil)
	}
	stored, encode := sha256.Sum256(sum("Client Key")), base64.StdEncoding.EncodeToString
	return "SCRAM-SHA-256$1000:" + encode(salt) + "$" + encode(stored[:]) + ":" + encode(sum("Server Key"))
}

// edgeWorker tries one case at a time.
type edgeWorker struct {
	database, addr string
	channel        string
	db             *sql.DB
	serial         int
}

// edgeRun is a Listener behind a Wire, and what came of what was sent to it.
type edgeRun struct {
	wire     *pgtest.Wire
	listener *Listener
	logs     *testkit.Logs
	channel  string
	db       *sql.DB
	stop     func() (abandoned int, took time.Duration, err error)
	problems []string
	stall    time.Duration // the longest time in which nothing was done that takes a moment

	sent []edgeSent

	mu       sync.Mutex
	heard    map[string]time.Time
	caughtUp int
}

// edgeSent is one notification.
type edgeSent struct {
	payload      string
	began, ended time.Time
	ready        bool // the listener was, just before
}

func (r *edgeRun) Handle(_ context.Context, n notify.Notification) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heard[n.Payload] = time.Now()
	return nil
}

func (r *edgeRun) CatchUp(context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.caughtUp++
	return nil
}

func (r *edgeRun) complain(format string, args ...any) {
	r.problems = append(r.problems, fmt.Sprintf(format, args...))
}

// run starts a Listener.
func (d *edgeWorker) run(t *testing.T, e edge, f pgtest.Fault, label string) (*edgeRun, error) {
	d.serial++
	r := &edgeRun{logs: testkit.NewLogs(nil), channel: fmt.Sprintf("%s_%d", d.channel, d.serial), db: d.db, heard: map[string]time.Time{}}
	known := make(chan struct{})
	wire, err := pgtest.NewWire(d.addr, e.config, func(client net.Addr) string {
		<-known
		if c := r.listener.dialer.Current(); c != nil && c.LocalAddr().String() == client.String() {
			return "listener"
		}
		return "prober"
	})
	if err != nil {
		return nil, err
	}
	wire.Stage("start")
	wire.Arm(f)
	r.wire = wire
	host := wire.Addr()
	if e.config != nil {
		_, port, _ := net.SplitHostPort(host)
		host = net.JoinHostPort("localhost", port)
	}
	r.listener = newTestListener(t, fast("postgres://"+e.user+":pw@"+host+"/"+d.database+"?"+e.params, r.channel+"=edge", vars{
		"PING_INTERVAL": edgeInterval.String(), "PING_TIMEOUT": edgeTimeout.String(), "PROBE_INTERVAL": edgeProbe.String(),
		"RECONNECT_MIN": "10ms", "RECONNECT_MAX": edgeBackoff.String(),
	}), with("edge", r), r.logs)
	close(known)
	ctx, cancel := context.WithCancel(context.Background())
	type result struct {
		abandoned int
		err       error
	}
	ended := make(chan result, 1)
	pprof.Do(ctx, pprof.Labels("boundary", label), func(ctx context.Context) {
		go func() {
			abandoned, err := r.listener.Run(ctx)
			ended <- result{abandoned, err}
		}()
	})
	r.stop = func() (int, time.Duration, error) {
		cancel()
		asked := time.Now()
		select {
		case e := <-ended:
			return e.abandoned, time.Since(asked), e.err
		case <-time.After(testkit.Patience):
			return 0, time.Since(asked), errors.New("it does not stop")
		}
	}
	return r, nil
}

// look asks whether the listener is ready, and complains if it says so although it knows better.
func (r *edgeRun) look() (ready bool) {
	deaf := func(s Status) bool { return !s.Connected || !s.Listening || !s.Probe.ProvenHere }
	before := r.listener.newest()
	ready = r.listener.Ready() == nil
	after := r.listener.newest()
	if ready && deaf(before) && deaf(after) && before.Probe.Proven.Equal(after.Probe.Proven) {
		r.complain("ready while %+v", after)
	}
	if err := r.listener.Alive(); err != nil {
		r.complain("not alive: %v", err)
	}
	return ready
}

// send sends a notification past the Wire.
func (r *edgeRun) send() {
	s := edgeSent{payload: fmt.Sprint(len(r.sent)), ready: r.look(), began: time.Now()}
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	if _, err := r.db.ExecContext(ctx, "select pg_notify($1, $2)", r.channel, s.payload); err != nil {
		r.complain("notify: %v", err)
	}
	s.ended = time.Now()
	r.sent = append(r.sent, s)
}

// until sends, or only looks, until done says so.
func (r *edgeRun) until(what string, send bool, done func() bool) bool {
	for deadline := time.Now().Add(testkit.Patience); !done(); {
		if time.Now().After(deadline) {
			r.complain("never %s", what)
			return false
		}
		began := time.Now()
		if send {
			r.send()
		} else {
			r.look()
		}
		time.Sleep(25 * time.Millisecond)
		r.stall = max(r.stall, time.Since(began)-25*time.Millisecond)
	}
	return true
}

// works says whether it is ready and what was sent last, after a time, has been heard.
func (r *edgeRun) works(after time.Time) bool {
	if len(r.sent) == 0 || !r.sent[len(r.sent)-1].began.After(after) || r.listener.Ready() != nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, heard := r.heard[r.sent[len(r.sent)-1].payload]
	return heard
}

// passed says whether a point has.
func (r *edgeRun) passed(p pgtest.Point) bool { return slices.Contains(r.wire.Points(), p) }

// record goes through a session, a second one after a reset, and the end, and returns their points. A message that comes any
// number of times counts once, and others twice.
func (d *edgeWorker) record(t *testing.T, e edge) []pgtest.Point {
	t.Helper()
	r, err := d.run(t, e, pgtest.Fault{}, "recorder")
	if err != nil {
		t.Error(err)
		return nil
	}
	defer r.wire.Close()
	pong := pgtest.Point{Session: "start listener", Message: "← ReadyForQuery after Query ping", Nth: 2} // the first follows the LISTENs
	r.until("works", true, func() bool { return r.works(time.Time{}) })
	r.until("pings", false, func() bool { return r.passed(pong) })
	r.wire.Stage("again")
	r.wire.Break("listener")
	broken := time.Now()
	r.until("works", true, func() bool {
		return r.works(broken) && r.passed(pgtest.Point{Session: "again prober", Message: "→ Terminate", Nth: 1})
	})
	pong.Session, pong.Nth = "again listener", 1
	r.until("pings", false, func() bool { return r.passed(pong) })
	r.wire.Stopping()
	if _, _, err := r.stop(); err != nil || len(r.problems) > 0 {
		t.Errorf("%s: %v %v\n%s", e.name, err, r.problems, r.logs)
	}
	points := slices.DeleteFunc(r.wire.Points(), func(p pgtest.Point) bool {
		often := strings.Contains(p.Message, "ParameterStatus") || strings.Contains(p.Message, "Notification") || strings.Contains(p.Message, " TLS ")
		return p.Nth > 2 || often && p.Nth > 1 || strings.HasPrefix(p.Session, "stop prober")
	})
	var text strings.Builder
	for _, p := range points {
		fmt.Fprintln(&text, p)
	}
	for _, session := range []string{"start", "again"} { // the recorder must not have slept
		for _, want := range []string{"listener → StartupMessage", "listener → Query LISTEN", "listener ← CommandComplete", "listener → Query ping",
			"listener ← EmptyQueryResponse", "listener ← Notification", "prober → Query SELECT", "prober ← DataRow"} {
			if !strings.Contains(text.String(), session+" "+want+" 1\n") {
				t.Errorf("%s: the recorder has not seen %q in\n%s", e.name, session+" "+want, &text)
			}
		}
	}
	return points
}

// try runs a case, and returns what was wrong, for how long the machine stood still meanwhile, and the log.
func (d *edgeWorker) try(t *testing.T, c edgeCase) (problems []string, stall time.Duration, log string) {
	r, err := d.run(t, c.edge, c.fault, c.String())
	if err != nil {
		return []string{err.Error()}, 0, ""
	}
	defer r.wire.Close()
	stage, role, _ := strings.Cut(c.fault.Point.Session, " ")
	fired := func() bool { return !r.wire.Fired().IsZero() }

	r.until("works at first", true, func() bool { return fired() || r.works(time.Time{}) })
	switch stage {
	case "again":
		r.wire.Stage("again")
		r.wire.Break("listener")
		broken := time.Now()
		r.until("works after a reset", true, func() bool { return fired() || r.works(broken) })
		fallthrough
	case "start":
		// Pings are sent when nothing else is, and probes in any case.
		if r.until("happened", false, fired) {
			r.recover(c.fault, role)
		}
	case "stop":
		r.wire.Stopping()
	}
	abandoned, took, err := r.stop()
	if err != nil || abandoned > 0 || took > 5*time.Second+edgeSlack {
		r.complain("it took %v to stop, with %d abandoned: %v", took, abandoned, err)
	}
	if stage == "stop" && !fired() {
		r.complain("never happened")
	}
	if len(r.problems) == 0 {
		r.judge(c.fault, stage, role)
	}
	text := r.logs.String()
	return r.problems, r.stall, text[max(0, len(text)-6000):]
}

// recover waits until all is well again, and checks that this is so in time.
func (r *edgeRun) recover(f pgtest.Fault, role string) {
	at := r.wire.Fired()
	watch := 300 * time.Millisecond // so that what follows can follow
	if f.Kind == pgtest.Silence || f.Kind == pgtest.Forget || f.Kind == pgtest.Delay {
		watch += min(edgeNotice, max(f.Delay, edgeTimeout))
	}
	var heard time.Time
	r.until("well again", true, func() bool {
		well := r.works(at)
		if heard.IsZero() {
			r.mu.Lock()
			for _, s := range r.sent {
				if h, ok := r.heard[s.payload]; ok && s.began.After(at) && (heard.IsZero() || h.Before(heard)) {
					heard = h
				}
			}
			r.mu.Unlock()
		}
		return well && time.Since(at) > watch
	})
	slack := edgeSlack + 8*r.stall
	if took := time.Since(at); took > edgeReady+slack {
		r.complain("ready again after %v, more than %v", took, edgeReady)
	}
	bound := time.Duration(0)
	if role == "listener" {
		bound = edgeHeard
	}
	if took := heard.Sub(at); took > bound+slack {
		r.complain("heard again after %v, more than %v", took, bound)
	}
}

// judge checks what must hold of every history: what was lost is told, and catching up was done once per subscription.
func (r *edgeRun) judge(f pgtest.Fault, stage, role string) {
	at := r.wire.Fired()
	r.mu.Lock()
	defer r.mu.Unlock()
	first := edgeTime(r.logs.All("listening")[0]["time"])
	type gap struct{ from, to time.Time }
	var gaps []gap
	for _, message := range []string{"reconnected; notifications", "delivery resumed"} {
		for _, line := range r.logs.All(message) {
			gaps = append(gaps, gap{edgeTime(line["gap_from"]), edgeTime(line["gap_to"])})
		}
	}
	if n := r.listener.newest().Gaps; n != len(gaps) {
		r.complain("%d gaps are in the log, and %d were counted", len(gaps), n)
	}
	notice := time.Duration(0)
	if f.Kind == pgtest.Silence || f.Kind == pgtest.Forget || f.Kind == pgtest.Delay {
		notice = edgeNotice
	}
	// What was under way when the last byte came is lost too, and a gap is told by the clock of who hears.
	way := 20 * time.Millisecond
	for _, s := range r.sent {
		if took := r.heard[s.payload].Sub(s.began); took < edgeTimeout { // else the fault has delayed it
			way = max(way, took+4*r.stall)
		}
	}
	for _, s := range r.sent {
		if _, ok := r.heard[s.payload]; ok {
			continue
		}
		told := slices.ContainsFunc(gaps, func(g gap) bool { return s.ended.Add(way).After(g.from) && s.began.Before(g.to) })
		switch {
		case !told && s.ready:
			r.complain("%s was lost while it was ready, and in no gap that was told: %v to %v", s.payload, s.began, s.ended)
		case !told && s.began.After(first):
			r.complain("%s was lost in no gap that was told: %v to %v", s.payload, s.began, s.ended)
		case s.ready && s.began.After(at.Add(notice+edgeSlack/2+4*r.stall)):
			r.complain("%s was lost while it was ready, %v after the fault", s.payload, s.began.Sub(at))
		}
	}
	wanted := 0 // gaps
	if stage == "again" {
		wanted = 1
	}
	unnoticed := f.Kind == pgtest.Delay && f.Delay < edgeTimeout || role == "prober" || stage == "stop"
	switch {
	case unnoticed && len(gaps) != wanted:
		r.complain("%d gaps, want %d", len(gaps), wanted)
	case !unnoticed && first.Before(at) && !slices.ContainsFunc(gaps, func(g gap) bool { return g.to.After(at) }):
		r.complain("it was subscribed, and no gap was told after the fault of %v", at)
	}
	subscriptions := len(r.logs.All("listening")) + len(r.logs.All("reconnected"))
	if r.caughtUp != subscriptions {
		r.complain("caught up %d times in %d subscriptions", r.caughtUp, subscriptions)
	}
}

func edgeTime(v any) time.Time {
	s, _ := v.(string)
	at, _ := time.Parse(time.RFC3339Nano, s)
	return at
}
