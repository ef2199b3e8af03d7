package main

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The tests of deafness: states in which everything seems well and nothing arrives.

const testProbe = time.Second // PROBE_INTERVAL

func probing(dsn, channels string, more ...vars) vars {
	return fast(dsn, channels, append([]vars{{"PROBE_INTERVAL": testProbe.String()}}, more...)...)
}

func TestPoolerInTransactionModeIsReported(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	c := &counter{}
	began := time.Now()
	r := start(t, probing(testkit.Bouncer(t, testkit.LocalServer(t), "transaction"), channel+"=doorbell:counter"), table{
		"counter": func(string, Setup) (notify.Handler, error) { return notify.HandlerFunc(c.Handle), nil },
	})
	r.Wait(t, "notifications do not arrive", 1)
	if took, bound := time.Since(began), testTimeout+time.Second; took > bound {
		t.Errorf("it took %v to notice, more than %v", took, bound)
	}
	// It reconnects once, stays deaf, says so, and the work goes on.
	r.Wait(t, "reconnected", 1)
	r.Wait(t, "notifications do not arrive", 2)
	before := c.handled.Load()
	testkit.Eventually(t, "doorbell work does not go on", func() bool {
		if code, body := r.readyz(); code != http.StatusServiceUnavailable || !strings.Contains(body, "pooler") && !strings.Contains(body, "LISTEN") && !strings.Contains(body, "disconnected") {
			t.Errorf("/readyz: %d %s", code, body)
		}
		return c.handled.Load() >= before+2
	})
	if code, body := r.readyz(); code != http.StatusServiceUnavailable || !strings.Contains(body, "pooler") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if n := len(r.All("reconnected")); n != 1 {
		t.Errorf("reconnected %d times, want once", n)
	}
	if code, body := r.livez(); code != http.StatusOK {
		t.Errorf("/livez: %d %s", code, body)
	}
}

func TestPoolerInSessionModeIsHeard(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	r := start(t, probing(testkit.Bouncer(t, testkit.LocalServer(t), "session"), channel+"=test"), nil).listening(t)
	r.ready(t)
	testkit.Send(t, channel, "through the pooler")
	r.expect(t, "through the pooler")
}

func TestSwappedSessionIsNoticedAndHealed(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	c := &counter{}
	r := start(t, probing(dsn, channel+"=test,"+channel+"2=counter"), table{
		"counter": func(string, Setup) (notify.Handler, error) { return c, nil },
	}).listening(t)
	r.ready(t)
	if err := proxy.Swap(); err != nil {
		t.Fatal(err)
	}
	swapped := time.Now()
	testkit.Send(t, channel, "into the void")
	deaf := r.heardAgain(t, testkit.DB(t), channel).Sub(swapped)
	if bound := testProbe + testTimeout + time.Second; deaf > bound {
		t.Errorf("deaf for %v, more than %v", deaf, bound)
	}
	lost := r.Wait(t, "notifications no longer arrive", 1)
	if lost["level"] != "ERROR" {
		t.Errorf("%v", lost)
	}
	r.Wait(t, "reconnected; whether", 1)
	gap, err := time.ParseDuration(r.Wait(t, "delivery resumed", 1)["gap"].(string))
	if err != nil || gap < testTimeout {
		t.Errorf("the gap is said to be %v; it began with the last probe that came back", gap)
	}
	r.ready(t)
	if n := c.caughtUp.Load(); n != 2 {
		t.Errorf("caught up %d times, want 2", n)
	}
}

func TestDeliveryResumesOnADeafConnection(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	c := &counter{}
	r := start(t, probing(testkit.DSN(t), channel+"=counter"), table{
		"counter": func(string, Setup) (notify.Handler, error) { return c, nil },
	}).listening(t)
	r.Wait(t, "delivery proven", 1)
	// The session stops listening, and so does every session after it.
	if err := r.listener.pq.UnlistenAll(); err != nil {
		t.Fatal(err)
	}
	r.Wait(t, "notifications no longer arrive", 1)
	r.Wait(t, "reconnected; whether", 1)
	r.Wait(t, "notifications do not arrive", 1)
	for _, channel := range []string{channel, r.listener.probe.Channel} {
		if err := r.listener.pq.Listen(channel); err != nil {
			t.Fatal(err)
		}
	}
	before := c.caughtUp.Load()
	gap, err := time.ParseDuration(r.Wait(t, "delivery resumed", 1)["gap"].(string))
	if err != nil || gap < 2*testTimeout {
		t.Errorf("the gap is said to be %v; two probes were lost", gap)
	}
	testkit.Eventually(t, "no catch-up when delivery resumed", func() bool { return c.caughtUp.Load() > before })
	if n := len(r.All("reconnected")); n != 1 {
		t.Errorf("reconnected %d times, want once", n)
	}
}

func TestProbeThatCannotBeSentIsAWarning(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	role := "r" + strconv.FormatInt(time.Now().UnixNano(), 36)
	testkit.Exec(t, testkit.DB(t), "create role "+role+" login connection limit 1 password 'x'")
	t.Cleanup(func() { _, _ = testkit.DB(t).Exec("drop role " + role) })
	r := start(t, probing(testkit.WithUser(testkit.DSN(t), role, "x"), channel+"=test"), nil).listening(t)
	if line := r.Wait(t, "probe could not be sent", 2); line["level"] != "WARN" {
		t.Errorf("%v", line)
	}
	testkit.Send(t, channel, "still heard")
	r.expect(t, "still heard")
	if lines := r.All("disconnected"); len(lines) > 0 {
		t.Errorf("torn down: %v", lines)
	}
	if code, body := r.readyz(); code != http.StatusServiceUnavailable || !strings.Contains(body, "not proven") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	testkit.Exec(t, testkit.DB(t), "alter role "+role+" connection limit 5")
	r.Wait(t, "delivery proven", 1)
	r.ready(t)
}

// verified counts how often the second connection has been used, the probe being sent by then.
type verified struct {
	counter
	times atomic.Int64
}

func (v *verified) Verify() string { return "select 1" }
func (v *verified) Verified(error) { v.times.Add(1) }

// A probe that is under way when the connection breaks cannot come back, and nothing follows from that.
func TestConnectionBreaksUnderAProbe(t *testing.T) {
	t.Parallel()
	const patience = 2 * time.Second // for the probe
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.WithParams(testkit.DSN(t), "application_name", channel))
	v := &verified{}
	r := start(t, probing(dsn, channel+"=verified", vars{"PING_TIMEOUT": patience.String()}), with("verified", v)).listening(t)
	r.ready(t)
	last := r.listener.newest().Probe.Proven
	alone := func() bool { return len(testkit.Backends(t, testkit.DB(t), channel)) == 1 } // the second connection is closed again
	testkit.Eventually(t, "no second proof", func() bool { return r.listener.newest().Probe.Proven.After(last) && alone() })
	sent := v.times.Load()
	proxy.Silence() // long before the next one
	testkit.Eventually(t, "no other probe is sent", func() bool { return v.times.Load() > sent && alone() })
	proxy.Refuse(true)
	proxy.Reset()
	r.Wait(t, "disconnected", 1)
	time.Sleep(patience + 200*time.Millisecond) // that nothing happens is the point
	proxy.Refuse(false)
	r.ready(t)
	if lines := r.All("notifications"); len(lines) > 0 || r.stat("pglistener_probes_lost_total", "") > 0 {
		t.Errorf("a false alarm: %v", lines)
	}
}

// Nothing is wrong with the connection that listens; but for how long may one believe that, without a proof?
func TestProofGrowsOld(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	r := start(t, probing(dsn, channel+"=test"), nil).listening(t)
	r.ready(t)
	proxy.Refuse(true) // the one that listens stays
	testkit.Eventually(t, "still ready although nothing is proven any more", func() bool {
		code, body := r.readyz()
		return code == http.StatusServiceUnavailable && strings.Contains(body, "has not been proven for")
	})
	testkit.Send(t, channel, "still heard")
	r.expect(t, "still heard")
	if lines := r.All("disconnected"); len(lines) > 0 {
		t.Errorf("torn down: %v", lines)
	}
	proxy.Refuse(false)
	r.ready(t)
}

func TestFullQueueRaisesNoFalseAlarm(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	gate := make(chan struct{})
	slow := &gated{counter: &counter{}, gate: gate}
	r := start(t, probing(testkit.DSN(t), channel+"=slow", vars{"QUEUE_SIZE": "10"}), table{
		"slow": func(string, Setup) (notify.Handler, error) { return slow, nil },
	}).listening(t)
	r.ready(t)
	if _, err := testkit.DB(t).Exec("select pg_notify($1, i::text) from generate_series(1, 1000) i", channel); err != nil {
		t.Fatal(err)
	}
	full, err := time.Parse(time.RFC3339Nano, r.Wait(t, "queue full", 1)["time"].(string)) // not when we get to know it
	if err != nil {
		t.Fatal(err)
	}
	for end := full.Add(2*testProbe + 2*testTimeout + testInterval); time.Now().Before(end); {
		// Whoever can hear nothing for long is not ready; but nothing is said to be lost.
		code, body := r.readyz()
		if code != http.StatusOK && (time.Since(full) < testProbe+testTimeout || !strings.Contains(body, "reading has stopped")) {
			t.Fatalf("a false alarm: %s", body)
		}
	}
	if code, body := r.readyz(); code != http.StatusServiceUnavailable || !strings.Contains(body, channel) {
		t.Errorf("reading has stopped for long, and /readyz is %d %s", code, body)
	}
	close(gate)
	released := time.Now()
	// From then on it is ready, although the last proof is older than it may be otherwise, until the next one comes.
	testkit.Eventually(t, "no proof after the queue has emptied", func() bool {
		if code, body := r.readyz(); code != http.StatusOK && !strings.Contains(body, "reading has stopped") {
			t.Fatalf("a false alarm when reading goes on: %s", body)
		}
		return r.listener.newest().Probe.Proven.After(released)
	})
	r.ready(t)
	testkit.Eventually(t, "not all were handled", func() bool { return slow.handled.Load() == 1000 })
	for _, msg := range []string{"disconnected", "notifications", "ping failed"} {
		if lines := r.All(msg); len(lines) > 0 {
			t.Errorf("a false alarm: %v", lines)
		}
	}
}

// What breaks while nothing is read is noticed late, and must not be told as if it had just happened.
func TestBreakBehindAFullQueue(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	gate := make(chan struct{})
	slow := &gated{counter: &counter{}, gate: gate}
	r := start(t, probing(dsn, channel+"=slow", vars{"QUEUE_SIZE": "10"}), table{
		"slow": func(string, Setup) (notify.Handler, error) { return slow, nil },
	}).listening(t)
	r.ready(t)
	if _, err := testkit.DB(t).Exec("select pg_notify($1, i::text) from generate_series(1, 1000) i", channel); err != nil {
		t.Fatal(err)
	}
	r.Wait(t, "queue full", 1)
	proxy.Refuse(true)
	proxy.Reset()
	cut := time.Now()
	testkit.Eventually(t, "ready although the server is away", func() bool { code, _ := r.readyz(); return code == http.StatusServiceUnavailable })
	if took, bound := time.Since(cut), testProbe+2*testTimeout; took > bound {
		t.Errorf("it took %v to say so, more than %v", took, bound)
	}
	if _, body := r.readyz(); !strings.Contains(body, "reading has stopped") {
		t.Errorf("/readyz: %s", body)
	}
	proxy.Refuse(false)
	unread := time.Since(cut)
	close(gate)
	gap, err := time.ParseDuration(r.Wait(t, "reconnected", 1)["gap"].(string))
	if err != nil || gap < unread {
		t.Errorf("the gap is said to be %v; it was at least %v", gap, unread)
	}
	r.ready(t)
}

// A laggard is whoever does not read: us, while a queue is full, or another.
func TestLaggardIsNamed(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	s := testkit.OwnServer(t)
	db := testkit.Open(t, s.DSN())
	fill := func() {
		// More than the buffers of both sockets hold, so that the server has to keep it.
		if _, err := db.Exec("select pg_notify($1, i || repeat('x', 7000)) from generate_series(1, 4000) i", channel); err != nil {
			t.Fatal(err)
		}
	}
	gate := make(chan struct{})
	slow := &gated{counter: &counter{}, gate: gate}
	r := start(t, probing(s.DSN(), channel+"=slow", vars{"QUEUE_SIZE": "5000"}), table{
		"slow": func(string, Setup) (notify.Handler, error) { return slow, nil },
	}, func(l *Listener) {
		// 8 GB are too much for a test: a part of a thousandth stands for a quarter and a half.
		l.usage.Bounds = [2]float64{1e-6, 2e-6}
	}).listening(t)
	r.Wait(t, "delivery proven", 1)
	if _, err := db.Exec("select pg_notify($1, i::text) from generate_series(1, 5200) i", channel); err != nil {
		t.Fatal(err)
	}
	r.Wait(t, "queue full", 1)
	fill()
	fill()
	line := r.Wait(t, "the server's NOTIFY queue is more than half full", 1)
	if line["level"] != "ERROR" || line["channel"] != channel || !strings.Contains(line["cause"].(string), "this listener") {
		t.Errorf("%v", line)
	}
	testkit.Eventually(t, "the metric has not risen", func() bool { return r.stat("pglistener_notification_queue_usage_ratio", "") > 0 })
	close(gate)
	r.Wait(t, "the server's NOTIFY queue has emptied", 1)

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
	line = r.Wait(t, "the server's NOTIFY queue is more than half full", 2)
	if line["channel"] != nil || !strings.Contains(line["cause"].(string), "another listener") {
		t.Errorf("%v", line)
	}
}

func TestStandbyIsWaitedForUntilPromoted(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	primary := testkit.OwnServer(t)
	standby := testkit.StandbyOf(t, primary)
	r := start(t, probing(standby.DSN(), channel+"=test"), nil)
	// Refused on the first connection, or already while it is made: whichever comes first.
	testkit.Eventually(t, "no word of the standby", func() bool {
		return slices.ContainsFunc(append(r.All("server refuses to listen"), r.All("connection attempt failed")...), func(line testkit.Line) bool {
			return strings.Contains(fmt.Sprint(line["hint"]), "standby")
		})
	})
	testkit.Eventually(t, "/readyz does not say that it is a standby", func() bool {
		code, body := r.readyz()
		return code == http.StatusServiceUnavailable && strings.Contains(body, "standby")
	})
	if err := standby.Promote(); err != nil {
		t.Fatal(err)
	}
	r.listening(t)
	r.ready(t)
	testkit.SendOn(t, testkit.Open(t, standby.DSN()), channel, "promoted")
	r.expect(t, "promoted")
}

func TestFailoverBetweenTwoServers(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	primary := testkit.OwnServer(t)
	standby := testkit.StandbyOf(t, primary)
	dsn := testkit.WithParams("postgres://postgres@127.0.0.1,127.0.0.1/postgres?sslmode=disable",
		"port", fmt.Sprintf("%d,%d", primary.Port, standby.Port), "target_session_attrs", "read-write")
	r := start(t, probing(dsn, channel+"=test"), nil).listening(t)
	r.ready(t)
	if err := primary.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(); err != nil {
		t.Fatal(err)
	}
	r.Wait(t, "reconnected", 1)
	r.ready(t)
	testkit.SendOn(t, testkit.Open(t, standby.DSN()), channel, "from the new primary")
	r.expect(t, "from the new primary")
}

func TestReadyzFollowsKillSilenceAndRecovery(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	r := start(t, probing(testkit.WithParams(dsn, "application_name", channel), channel+"=test"), nil)
	r.listening(t)
	r.ready(t)

	proxy.Refuse(true)
	proxy.Reset()
	r.Wait(t, "disconnected", 1)
	testkit.Eventually(t, "ready although nothing is connected", func() bool { code, _ := r.readyz(); return code == http.StatusServiceUnavailable })
	if _, body := r.readyz(); !strings.Contains(body, "connection attempt failed") && !strings.Contains(body, "disconnected") {
		t.Errorf("the reason is not in words: %q", body)
	}
	proxy.Refuse(false)
	r.ready(t)

	proxy.Silence()
	silenced := time.Now()
	notReady := time.Time{}
	for notReady.IsZero() {
		if code, _ := r.readyz(); code != http.StatusOK {
			notReady = time.Now()
		} else if time.Since(silenced) > testInterval+testTimeout+time.Second {
			if len(r.All("disconnected")) < 2 {
				t.Fatal("still ready although nothing is heard")
			}
			notReady = time.Now() // it was not ready between two questions
		}
	}
	r.ready(t)
	if n := len(r.All("delivery proven")); n < 3 {
		t.Errorf("ready before delivery was proven: %d proofs", n)
	}
}

func TestNotReadyBeforeTheFirstConnection(t *testing.T) {
	t.Parallel()
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	proxy.Mute(true)
	r := start(t, probing(dsn, testkit.ChannelName(t)+"=test"), nil)
	for end := time.Now().Add(testTimeout + 500*time.Millisecond); time.Now().Before(end); {
		if code, body := r.readyz(); code != http.StatusServiceUnavailable || strings.TrimSpace(body) == "" {
			t.Fatalf("/readyz: %d %q before anything is connected", code, body)
		}
	}
	proxy.Mute(false)
	r.ready(t)
	if len(r.All("delivery proven")) == 0 {
		t.Error("ready before delivery was proven")
	}
}
