package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/pgtest"
)

// The tests of deafness: states in which everything seems well and nothing arrives.

const testProbe = time.Second // PROBE_INTERVAL

func probing(dsn, channels string, more ...vars) vars {
	return fast(dsn, channels, append([]vars{{"PROBE_INTERVAL": testProbe.String()}}, more...)...)
}

// bouncer starts a PgBouncer before a server and returns the DSN through it.
func bouncer(t *testing.T, s *pgtest.Server, mode string) string {
	t.Helper()
	b, err := s.Bouncer(mode)
	if errors.Is(err, pgtest.ErrNoBouncer) {
		skip(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return pgtest.DSN(b.Addr)
}

// web serves a Listener's health and returns a function that gets a path.
func (r *running) web(t *testing.T) func(path string) (code int, body string) {
	t.Helper()
	h, err := serveHealth("127.0.0.1:0", r.listener, testConfig(t, nil).logger(r.logs))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	return func(path string) (int, string) {
		t.Helper()
		return get(t, "http://"+h.ln.Addr().String()+path)
	}
}

func get(t *testing.T, address string) (int, string) {
	t.Helper()
	c := http.Client{Timeout: patience}
	res, err := c.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// ready waits until /readyz answers 200.
func ready(t *testing.T, web func(string) (int, string)) {
	t.Helper()
	last := ""
	eventually(t, "never ready", func() bool {
		code, body := web("/readyz")
		last = body
		return code == http.StatusOK
	})
	_ = last
}

func TestPoolerInTransactionModeIsReported(t *testing.T) {
	t.Parallel()
	if sharedServer == nil {
		skip(t, "needs a local server; TEST_DATABASE_URL is set")
	}
	channel := channelName(t)
	c := &counter{}
	began := time.Now()
	r := start(t, probing(bouncer(t, sharedServer, "transaction"), channel+"=doorbell:counter"), map[string]newHandler{
		"counter": func(string, env) (Handler, error) { return HandlerFunc(c.Handle), nil },
	})
	web := r.web(t)
	r.wait(t, "notifications do not arrive", 1)
	if took, bound := time.Since(began), testTimeout+time.Second; took > bound {
		t.Errorf("it took %v to notice, more than %v", took, bound)
	}
	// It reconnects once, stays deaf, says so, and the work goes on.
	r.wait(t, "reconnected", 1)
	r.wait(t, "notifications do not arrive", 2)
	before := c.handled.Load()
	eventually(t, "doorbell work does not go on", func() bool {
		if code, body := web("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "pooler") && !strings.Contains(body, "LISTEN") && !strings.Contains(body, "disconnected") {
			t.Errorf("/readyz: %d %s", code, body)
		}
		return c.handled.Load() >= before+2
	})
	if code, body := web("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "pooler") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if n := len(r.all("reconnected")); n != 1 {
		t.Errorf("reconnected %d times, want once", n)
	}
	if code, body := web("/livez"); code != http.StatusOK {
		t.Errorf("/livez: %d %s", code, body)
	}
}

func TestPoolerInSessionModeIsHeard(t *testing.T) {
	t.Parallel()
	if sharedServer == nil {
		skip(t, "needs a local server; TEST_DATABASE_URL is set")
	}
	channel := channelName(t)
	r := start(t, probing(bouncer(t, sharedServer, "session"), channel+"=test"), nil).listening(t)
	ready(t, r.web(t))
	notify(t, channel, "through the pooler")
	r.expect(t, "through the pooler")
}

func TestSwappedSessionIsNoticedAndHealed(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	dsn, proxy := proxied(t, sharedDSN)
	c := &counter{}
	r := start(t, probing(dsn, channel+"=test,"+channel+"2=counter"), map[string]newHandler{
		"counter": func(string, env) (Handler, error) { return c, nil },
	}).listening(t)
	web := r.web(t)
	ready(t, web)
	if err := proxy.Swap(); err != nil {
		t.Fatal(err)
	}
	swapped := time.Now()
	notify(t, channel, "into the void")
	deaf := r.heardAgain(t, sharedDB, channel).Sub(swapped)
	if bound := testProbe + testTimeout + time.Second; deaf > bound {
		t.Errorf("deaf for %v, more than %v", deaf, bound)
	}
	lost := r.wait(t, "notifications no longer arrive", 1)
	if lost["level"] != "ERROR" {
		t.Errorf("%v", lost)
	}
	r.wait(t, "reconnected; whether", 1)
	gap, err := time.ParseDuration(r.wait(t, "delivery resumed", 1)["gap"].(string))
	if err != nil || gap < testTimeout {
		t.Errorf("the gap is said to be %v; it began with the last probe that came back", gap)
	}
	ready(t, web)
	if n := c.caughtUp.Load(); n != 2 {
		t.Errorf("caught up %d times, want 2", n)
	}
}

func TestDeliveryResumesOnADeafConnection(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	c := &counter{}
	r := start(t, probing(sharedDSN, channel+"=counter"), map[string]newHandler{
		"counter": func(string, env) (Handler, error) { return c, nil },
	}).listening(t)
	r.wait(t, "delivery proven", 1)
	// The session stops listening, and so does every session after it.
	if err := r.listener.pq.UnlistenAll(); err != nil {
		t.Fatal(err)
	}
	r.wait(t, "notifications no longer arrive", 1)
	r.wait(t, "reconnected; whether", 1)
	r.wait(t, "notifications do not arrive", 1)
	for _, channel := range []string{channel, r.listener.probe.channel} {
		if err := r.listener.pq.Listen(channel); err != nil {
			t.Fatal(err)
		}
	}
	before := c.caughtUp.Load()
	gap, err := time.ParseDuration(r.wait(t, "delivery resumed", 1)["gap"].(string))
	if err != nil || gap < 2*testTimeout {
		t.Errorf("the gap is said to be %v; two probes were lost", gap)
	}
	eventually(t, "no catch-up when delivery resumed", func() bool { return c.caughtUp.Load() > before })
	if n := len(r.all("reconnected")); n != 1 {
		t.Errorf("reconnected %d times, want once", n)
	}
}

func TestProbeThatCannotBeSentIsAWarning(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	role := "r" + strconv.FormatInt(time.Now().UnixNano(), 36)
	execSQL(t, sharedDB, "create role "+role+" login connection limit 1 password 'x'")
	t.Cleanup(func() { _, _ = sharedDB.Exec("drop role " + role) })
	r := start(t, probing(withUser(sharedDSN, role, "x"), channel+"=test"), nil).listening(t)
	web := r.web(t)
	if line := r.wait(t, "probe could not be sent", 2); line["level"] != "WARN" {
		t.Errorf("%v", line)
	}
	notify(t, channel, "still heard")
	r.expect(t, "still heard")
	if lines := r.all("disconnected"); len(lines) > 0 {
		t.Errorf("torn down: %v", lines)
	}
	if code, body := web("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "not proven") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	execSQL(t, sharedDB, "alter role "+role+" connection limit 5")
	r.wait(t, "delivery proven", 1)
	ready(t, web)
}

func TestFullQueueRaisesNoFalseAlarm(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	gate := make(chan struct{})
	slow := &gated{counter: &counter{}, gate: gate}
	r := start(t, probing(sharedDSN, channel+"=slow", vars{"QUEUE_SIZE": "10"}), map[string]newHandler{
		"slow": func(string, env) (Handler, error) { return slow, nil },
	}).listening(t)
	web := r.web(t)
	ready(t, web)
	if _, err := sharedDB.Exec("select pg_notify($1, i::text) from generate_series(1, 1000) i", channel); err != nil {
		t.Fatal(err)
	}
	r.wait(t, "queue full", 1)
	full := time.Now()
	for end := full.Add(2*testProbe + 2*testTimeout + testInterval); time.Now().Before(end); {
		// Whoever can hear nothing for long is not ready; but nothing is said to be lost.
		code, body := web("/readyz")
		if code != http.StatusOK && (time.Since(full) < testProbe+testTimeout-50*time.Millisecond || !strings.Contains(body, "reading has stopped")) {
			t.Fatalf("a false alarm: %s", body)
		}
	}
	if code, body := web("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, channel) {
		t.Errorf("reading has stopped for long, and /readyz is %d %s", code, body)
	}
	close(gate)
	ready(t, web)
	eventually(t, "not all were handled", func() bool { return slow.handled.Load() == 1000 })
	for _, msg := range []string{"disconnected", "notifications", "ping failed"} {
		if lines := r.all(msg); len(lines) > 0 {
			t.Errorf("a false alarm: %v", lines)
		}
	}
}

// What breaks while nothing is read is noticed late, and must not be told as if it had just happened.
func TestBreakBehindAFullQueue(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	dsn, proxy := proxied(t, sharedDSN)
	gate := make(chan struct{})
	slow := &gated{counter: &counter{}, gate: gate}
	r := start(t, probing(dsn, channel+"=slow", vars{"QUEUE_SIZE": "10"}), map[string]newHandler{
		"slow": func(string, env) (Handler, error) { return slow, nil },
	}).listening(t)
	web := r.web(t)
	ready(t, web)
	if _, err := sharedDB.Exec("select pg_notify($1, i::text) from generate_series(1, 1000) i", channel); err != nil {
		t.Fatal(err)
	}
	r.wait(t, "queue full", 1)
	proxy.Refuse(true)
	proxy.Reset()
	cut := time.Now()
	eventually(t, "ready although the server is away", func() bool { code, _ := web("/readyz"); return code == http.StatusServiceUnavailable })
	if took, bound := time.Since(cut), testProbe+2*testTimeout; took > bound {
		t.Errorf("it took %v to say so, more than %v", took, bound)
	}
	if _, body := web("/readyz"); !strings.Contains(body, "reading has stopped") {
		t.Errorf("/readyz: %s", body)
	}
	proxy.Refuse(false)
	unread := time.Since(cut)
	close(gate)
	gap, err := time.ParseDuration(r.wait(t, "reconnected", 1)["gap"].(string))
	if err != nil || gap < unread {
		t.Errorf("the gap is said to be %v; it was at least %v", gap, unread)
	}
	ready(t, web)
}

// A laggard is whoever does not read: us, while a queue is full, or another.
func TestLaggardIsNamed(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	s := ownServer(t)
	db := testDB(t, s.DSN())
	fill := func() {
		// More than the buffers of both sockets hold, so that the server has to keep it.
		if _, err := db.Exec("select pg_notify($1, i || repeat('x', 7000)) from generate_series(1, 4000) i", channel); err != nil {
			t.Fatal(err)
		}
	}
	gate := make(chan struct{})
	slow := &gated{counter: &counter{}, gate: gate}
	r := start(t, probing(s.DSN(), channel+"=slow", vars{"QUEUE_SIZE": "10"}), map[string]newHandler{
		"slow": func(string, env) (Handler, error) { return slow, nil },
	}, func(l *Listener) {
		// 8 GB are too much for a test: a part of a thousandth stands for a quarter and a half.
		l.probe.bounds = [2]float64{1e-6, 2e-6}
	}).listening(t)
	web := r.web(t)
	r.wait(t, "delivery proven", 1)
	fill()
	fill()
	line := r.wait(t, "the server's NOTIFY queue is more than half full", 1)
	if line["level"] != "ERROR" || line["channel"] != channel || !strings.Contains(line["cause"].(string), "this listener") {
		t.Errorf("%v", line)
	}
	if _, body := web("/metrics"); strings.Contains(body, "pglistener_notification_queue_usage_ratio 0\n") {
		t.Error("the metric has not risen")
	}
	close(gate)
	r.wait(t, "the server's NOTIFY queue has emptied", 1)

	// Now another session listens and does not get to read.
	other, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range []string{"listen " + channel, "begin", "select 1"} {
		if _, err := other.ExecContext(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	fill()
	line = r.wait(t, "the server's NOTIFY queue is more than half full", 2)
	if line["channel"] != nil || !strings.Contains(line["cause"].(string), "another listener") {
		t.Errorf("%v", line)
	}
}

func TestStandbyIsWaitedForUntilPromoted(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	primary := ownServer(t)
	standby := standbyOf(t, primary)
	r := start(t, probing(standby.DSN(), channel+"=test"), nil)
	web := r.web(t)
	// Refused on the first connection, or already while it is made: whichever comes first.
	eventually(t, "no word of the standby", func() bool {
		return slices.ContainsFunc(append(r.all("server refuses to listen"), r.all("connection attempt failed")...), func(line logLine) bool {
			return strings.Contains(fmt.Sprint(line["hint"]), "standby")
		})
	})
	if code, body := web("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "standby") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if err := standby.Promote(); err != nil {
		t.Fatal(err)
	}
	r.listening(t)
	ready(t, web)
	notifyOn(t, testDB(t, standby.DSN()), channel, "promoted")
	r.expect(t, "promoted")
}

func TestFailoverBetweenTwoServers(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	primary := ownServer(t)
	standby := standbyOf(t, primary)
	dsn := withParams("postgres://postgres@127.0.0.1,127.0.0.1/postgres?sslmode=disable",
		"port", fmt.Sprintf("%d,%d", primary.Port, standby.Port), "target_session_attrs", "read-write")
	r := start(t, probing(dsn, channel+"=test"), nil).listening(t)
	web := r.web(t)
	ready(t, web)
	if err := primary.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(); err != nil {
		t.Fatal(err)
	}
	r.wait(t, "reconnected", 1)
	ready(t, web)
	notifyOn(t, testDB(t, standby.DSN()), channel, "from the new primary")
	r.expect(t, "from the new primary")
}

func TestReadyzFollowsKillSilenceAndRecovery(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	dsn, proxy := proxied(t, sharedDSN)
	r := start(t, probing(withParams(dsn, "application_name", channel), channel+"=test"), nil)
	web := r.web(t)
	r.listening(t)
	ready(t, web)

	proxy.Refuse(true)
	proxy.Reset()
	r.wait(t, "disconnected", 1)
	eventually(t, "ready although nothing is connected", func() bool { code, _ := web("/readyz"); return code == http.StatusServiceUnavailable })
	if _, body := web("/readyz"); !strings.Contains(body, "connection attempt failed") && !strings.Contains(body, "disconnected") {
		t.Errorf("the reason is not in words: %q", body)
	}
	proxy.Refuse(false)
	ready(t, web)

	proxy.Silence()
	silenced := time.Now()
	notReady := time.Time{}
	for notReady.IsZero() {
		if code, _ := web("/readyz"); code != http.StatusOK {
			notReady = time.Now()
		} else if time.Since(silenced) > testInterval+testTimeout+time.Second {
			if len(r.all("disconnected")) < 2 {
				t.Fatal("still ready although nothing is heard")
			}
			notReady = time.Now() // it was not ready between two questions
		}
	}
	ready(t, web)
	if n := len(r.all("delivery proven")); n < 3 {
		t.Errorf("ready before delivery was proven: %d proofs", n)
	}
}

func TestNotReadyBeforeTheFirstConnection(t *testing.T) {
	t.Parallel()
	dsn, proxy := proxied(t, sharedDSN)
	proxy.Mute(true)
	r := start(t, probing(dsn, channelName(t)+"=test"), nil)
	web := r.web(t)
	for end := time.Now().Add(testTimeout + 500*time.Millisecond); time.Now().Before(end); {
		if code, body := web("/readyz"); code != http.StatusServiceUnavailable || strings.TrimSpace(body) == "" {
			t.Fatalf("/readyz: %d %q before anything is connected", code, body)
		}
	}
	proxy.Mute(false)
	ready(t, web)
	if len(r.all("delivery proven")) == 0 {
		t.Error("ready before delivery was proven")
	}
}

// freshAddress returns an address of the loopback interface that nobody listens on.
func freshAddress(t *testing.T) string {
	t.Helper()
	port, err := pgtest.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}
