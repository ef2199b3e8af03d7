package main

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The tests of the promises: delivery, and recovery from each fault. Their names are in README.

func TestDeliversInOrder(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	const channels, each = 4, 500
	var list []string
	for i := range channels {
		list = append(list, fmt.Sprintf("%s%d=test", channel, i))
	}
	r := start(t, fast(testkit.DSN(t), strings.Join(list, ",")), nil).listening(t)
	for n := range each {
		_, err := testkit.DB(t).Exec("select pg_notify($1 || i, $2) from generate_series(0, $3) i", channel, fmt.Sprint(n), channels-1)
		if err != nil {
			t.Fatal(err)
		}
	}
	next := map[string]int{}
	for range channels * each {
		select {
		case n := <-r.heard:
			if want := fmt.Sprint(next[n.Channel]); n.Payload != want {
				t.Fatalf("%s: heard %q, want %q", n.Channel, n.Payload, want)
			}
			next[n.Channel]++
		case <-time.After(testkit.Patience):
			t.Fatalf("heard only %v", next)
		}
	}
}

// TestSlowHandlersHoldUpNoOtherChannel: the channels share goroutines, but nobody waits for another's handler, whether one hangs or
// all the others do.
func TestSlowHandlersHoldUpNoOtherChannel(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	const slow = 30
	hang, hanging := make(chan struct{}), make(chan struct{}, slow)
	handler := notify.HandlerFunc(func(context.Context, notify.Notification) error {
		hanging <- struct{}{}
		<-hang
		return nil
	})
	list := channel + "=test"
	for i := range slow {
		list += fmt.Sprintf(",%s%d=hang", channel, i)
	}
	r := start(t, fast(testkit.DSN(t), list), with("hang", handler)).listening(t)
	defer close(hang)
	// In one transaction: all arrive together.
	testkit.Exec(t, testkit.DB(t), "select pg_notify($1 || i, '') from generate_series(0, $2) i union all select pg_notify($1, 'first')", channel, slow-1)
	r.expect(t, "first")
	for i := range slow {
		select {
		case <-hanging:
		case <-time.After(testkit.Patience):
			t.Fatalf("only %d of %d handlers have begun", i, slow)
		}
	}
	testkit.Send(t, channel, "second")
	r.expect(t, "second")
}

func TestDeliversAnyPayload(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	r := start(t, fast(testkit.DSN(t), channel+"=test"), nil).listening(t)
	for _, payload := range []string{
		"",
		strings.Repeat("x", 7999),
		`it's "quoted" \ and $1 %s`,
		"two\nlines\r\n\ttab",
		"naïve 漢字 🐘",
		"level=ERROR msg=forged",
	} {
		testkit.Send(t, channel, payload)
		r.expect(t, payload)
	}
}

func TestChannelNamesThatNeedQuoting(t *testing.T) {
	t.Parallel()
	channel := `Käse "n' Brot; drop table x; --`
	r := start(t, fast(testkit.DSN(t), channel+"=test"), nil).listening(t)
	testkit.Send(t, channel, "hello")
	r.expect(t, "hello")
}

func TestHearsAgainAfterBackendKilled(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	r := start(t, fast(testkit.WithParams(testkit.DSN(t), "application_name", channel), channel+"=test"), nil).listening(t)
	testkit.Send(t, channel, "before")
	r.expect(t, "before")
	for _, pid := range testkit.Backends(t, testkit.DB(t), channel) {
		testkit.Exec(t, testkit.DB(t), "select pg_terminate_backend($1)", pid)
	}
	gone := r.Wait(t, "disconnected", 1)
	if !strings.Contains(gone["error"].(string), "57P01") {
		t.Errorf("the cause is not the server's word: %v", gone)
	}
	if gone["uptime"] == nil {
		t.Errorf("no uptime: %v", gone)
	}
	back := r.Wait(t, "reconnected", 1)
	for _, attr := range []string{"gap_from", "gap_to", "gap", "channels", "server", "local"} {
		if back[attr] == nil {
			t.Errorf("no %s: %v", attr, back)
		}
	}
	testkit.Send(t, channel, "after")
	r.expect(t, "after")
}

func TestHearsAgainAfterReset(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
	proxy.Reset()
	r.Wait(t, "reconnected", 1)
	testkit.Send(t, channel, "after")
	r.expect(t, "after")
}

func TestHearsAgainAfterServerRestart(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	s := testkit.OwnServer(t)
	r := start(t, fast(s.DSN(), channel+"=test"), nil).listening(t)
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	r.Wait(t, "connection attempt failed", 2)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	r.Wait(t, "reconnected", 1)
	testkit.SendOn(t, testkit.Open(t, s.DSN()), channel, "after")
	r.expect(t, "after")
}

func TestWaitsForServerAtStart(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	s := testkit.OwnServer(t)
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	r := start(t, fast(s.DSN(), channel+"=test"), nil)
	r.Wait(t, "connection attempt failed", 1)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	r.listening(t)
	testkit.SendOn(t, testkit.Open(t, s.DSN()), channel, "first")
	r.expect(t, "first")
}

func TestHearsAgainAfterSilence(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
	testkit.Send(t, channel, "before")
	r.expect(t, "before")
	r.Wait(t, "delivery proven", 1) // a probe that was lost in the silence would have the gap go on
	proxy.Silence()
	silenced := time.Now()
	deaf := r.heardAgain(t, testkit.DB(t), channel).Sub(silenced)
	if bound := testInterval + testTimeout + time.Second; deaf > bound {
		t.Errorf("deaf for %v after the connection fell silent, more than %v", deaf, bound)
	}
	// The gap is counted from the last byte, and not from when the silence was noticed.
	gap, err := time.ParseDuration(r.Wait(t, "reconnected", 1)["gap"].(string))
	if err != nil || gap < testTimeout {
		t.Errorf("the log says that the gap was %v (%v); it was at least %v", gap, err, testTimeout)
	}
}

func TestHearsAgainWhileServerProcessFrozen(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	s := testkit.OwnServer(t)
	db := testkit.Open(t, s.DSN())
	r := start(t, fast(testkit.WithParams(s.DSN(), "application_name", channel), channel+"=test"), nil).listening(t)
	r.Wait(t, "delivery proven", 1)
	// A process that is frozen with a lock in its hands freezes the whole server; this one waits for us.
	testkit.Eventually(t, "the session is never idle", func() (idle bool) {
		err := db.QueryRow("select wait_event = 'ClientRead' from pg_stat_activity where application_name = $1 and state = 'idle'", channel).Scan(&idle)
		return err == nil && idle
	})
	for _, pid := range testkit.Backends(t, db, channel) {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	}
	frozen := time.Now()
	deaf := r.heardAgain(t, db, channel).Sub(frozen)
	if bound := testInterval + testTimeout + time.Second; deaf > bound {
		t.Errorf("deaf for %v after the backend froze, more than %v", deaf, bound)
	}
}

func TestConnectAcceptedAndNeverAnswered(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	proxy.Mute(true)
	r := start(t, fast(dsn, channel+"=test"), nil)
	began := time.Now()
	line := r.Wait(t, "connection attempt failed", 1)
	if took, bound := time.Since(began), testTimeout+2*time.Second; took > bound {
		t.Errorf("the attempt took %v, more than %v", took, bound)
	}
	if !strings.Contains(line["error"].(string), "timeout") {
		t.Errorf("unexpected cause: %v", line)
	}
	proxy.Mute(false)
	r.listening(t)
	testkit.Send(t, channel, "first")
	r.expect(t, "first")
}

func TestPingsKeepIdleSessionAlive(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn := testkit.WithParams(testkit.DSN(t), "idle_session_timeout", "1500")
	r := start(t, fast(dsn, channel+"=test", vars{"PING_INTERVAL": "300ms"}), nil).listening(t)
	time.Sleep(3 * time.Second) // there is no event to wait for: that nothing happens is the point
	if lines := r.All("disconnected"); len(lines) > 0 {
		t.Fatalf("the session was ended although it was pinged: %v", lines)
	}
	testkit.Send(t, channel, "still there")
	r.expect(t, "still there")
}

func TestHearsAgainAfterIdleSessionTimeout(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn := testkit.WithParams(testkit.DSN(t), "idle_session_timeout", "500")
	r := start(t, fast(dsn, channel+"=test", vars{"PING_INTERVAL": "30s"}), nil).listening(t)
	if line := r.Wait(t, "disconnected", 1); !strings.Contains(line["error"].(string), "57P05") {
		t.Errorf("unexpected cause: %v", line)
	}
	r.Wait(t, "reconnected", 1)
	r.heardAgain(t, testkit.DB(t), channel)
}

func TestLosesNothingInBurstsOnSlowLink(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	proxy.Delay(100 * time.Millisecond) // 200 ms there and back
	// A ping is in flight for most of the time.
	r := start(t, fast(dsn, channel+"=test", vars{"PING_INTERVAL": "50ms", "PING_TIMEOUT": "5s"}), nil).listening(t)
	const bursts, each = 5, 5000
	for b := range bursts {
		if _, err := testkit.DB(t).Exec("select pg_notify($1, $2 || '-' || i) from generate_series(1, $3) i", channel, fmt.Sprint(b), each); err != nil {
			t.Fatal(err)
		}
		for i := 1; i <= each; i++ {
			r.expect(t, fmt.Sprintf("%d-%d", b, i))
		}
	}
	if lines := r.All("disconnected"); len(lines) > 0 {
		t.Errorf("disconnected: %v", lines)
	}
}

func TestSurvivesFlappingServer(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
	for n := 1; n <= 10; n++ {
		proxy.Reset()
		r.Wait(t, "reconnected", n)
	}
	began, dialed := time.Now(), proxy.Dialed()
	for n := 11; n <= 15; n++ {
		proxy.Reset()
		r.Wait(t, "reconnected", n)
	}
	// By now each attempt waits between 100 and 200 ms.
	if took := time.Since(began); took < 400*time.Millisecond {
		t.Errorf("%d connections in %v: no pause between them", proxy.Dialed()-dialed, took)
	}
	testkit.Send(t, channel, "after")
	r.expect(t, "after")
}

func TestHearsAgainWhenConnectionSlotsWereTaken(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	s := testkit.OwnServer(t, "max_connections = 6", "superuser_reserved_connections = 0", "max_wal_senders = 0")
	db := testkit.Open(t, s.DSN())
	db.SetMaxOpenConns(1)
	if err := db.Ping(); err != nil {
		t.Fatal(err)
	}
	dsn, proxy := testkit.Proxied(t, s.DSN())
	r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
	proxy.Refuse(true)
	proxy.Reset()
	r.Wait(t, "connection attempt failed", 1)

	greedy := testkit.Open(t, s.DSN())
	var taken []*sql.Conn
	for {
		c, err := greedy.Conn(t.Context())
		if err != nil {
			break
		}
		taken = append(taken, c)
	}
	proxy.Refuse(false)
	testkit.Eventually(t, "the listener was not told that all slots are taken", func() bool {
		return slices.ContainsFunc(r.All("connection attempt failed"), func(line testkit.Line) bool {
			return strings.Contains(line["error"].(string), "53300")
		})
	})
	for _, c := range taken {
		c.Close()
	}
	greedy.Close()
	r.Wait(t, "reconnected", 1)
	r.heardAgain(t, db, channel)
}

// counter is a handler that counts its calls; it can catch up.
type counter struct{ handled, caughtUp atomic.Int64 }

func (c *counter) Handle(context.Context, notify.Notification) error { c.handled.Add(1); return nil }
func (c *counter) CatchUp(context.Context) error                     { c.caughtUp.Add(1); return nil }

// gated is a counter whose Handle waits for a gate.
type gated struct {
	*counter
	gate chan struct{}
}

func (g *gated) Handle(ctx context.Context, n notify.Notification) error {
	<-g.gate
	return g.counter.Handle(ctx, n)
}

func TestCatchesUpOncePerSubscription(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	c := &counter{}
	r := start(t, fast(dsn, channel+"=counter,"+channel+"2=test,"+channel+"3=test"), table{
		"counter": func(string, Setup) (notify.Handler, error) { return c, nil },
	}).listening(t)
	const times = 5
	for n := 1; n <= times; n++ {
		proxy.Reset()
		r.Wait(t, "reconnected", n)
	}
	// What is heard now comes after whatever catch-up was asked for before.
	testkit.Send(t, channel, "after")
	testkit.Eventually(t, "the notification was not handled", func() bool { return c.handled.Load() == 1 })
	if n := c.caughtUp.Load(); n != times+1 {
		t.Errorf("caught up %d times in %d subscriptions", n, times+1)
	}
}

func TestDoorbell(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	began := make(chan notify.Notification, 100)
	finish := make(chan struct{})
	r := start(t, fast(dsn, channel+"=doorbell:work"), table{
		"work": func(string, Setup) (notify.Handler, error) {
			return notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
				began <- n
				<-finish
				return nil
			}), nil
		},
	}).listening(t)
	runs := func(what string) {
		t.Helper()
		select {
		case n := <-began:
			if n.Payload != "" || n.Channel != channel || n.Attempt != 1 {
				t.Errorf("%s: given %+v", what, n)
			}
		case <-time.After(testkit.Patience):
			t.Fatalf("%s: the handler did not run", what)
		}
	}
	runs("at the start")
	// However many arrive while it runs, it runs once more.
	for i := range 50 {
		testkit.Send(t, channel, fmt.Sprint(i))
	}
	testkit.Eventually(t, "it was not rung", func() bool { return r.stat("pglistener_notifications_received_total", channel) == 50 })
	finish <- struct{}{}
	runs("on notifications")
	finish <- struct{}{}
	proxy.Reset()
	r.Wait(t, "reconnected", 1)
	runs("after a gap")
	close(finish)
	if n := r.stop(); n != 0 {
		t.Errorf("%d abandoned", n)
	}
	// A ring may have arrived just after the second run began; not fifty.
	if extra := len(began); extra > 1 {
		t.Errorf("%d more runs than needed", extra)
	}
}

func TestDoorbellIsSweptWhileServerIsAway(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	c := &counter{}
	r := start(t, fast(dsn, channel+"=doorbell:counter", vars{"CATCH_UP_INTERVAL": "100ms"}), table{
		"counter": func(string, Setup) (notify.Handler, error) { return notify.HandlerFunc(c.Handle), nil },
	}).listening(t)
	proxy.Refuse(true)
	proxy.Reset()
	r.Wait(t, "connection attempt failed", 1)
	before := c.handled.Load()
	testkit.Eventually(t, "no sweep while disconnected", func() bool { return c.handled.Load() >= before+3 })
}

func TestLongOutageDoesNotFloodTheLog(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	r := start(t, fast(dsn, channel+"=test", vars{"RECONNECT_MIN": "1ms", "RECONNECT_MAX": "2ms"}), nil).listening(t)
	proxy.Refuse(true)
	proxy.Reset()
	dialed := proxy.Dialed()
	testkit.Eventually(t, "too few attempts", func() bool { return proxy.Dialed() >= dialed+200 })
	// The 1st, 2nd, 4th, ... 128th of each kind; the proxy makes two, EOF and RST.
	if n := len(r.All("connection attempt failed")); n < 5 || n > 2*8+2 {
		t.Errorf("%d lines for 200 attempts", n)
	}
	proxy.Refuse(false)
	r.Wait(t, "reconnected", 1)
}

// A loop that does not turn is what /livez and the watchdog are for.
func TestLivezNoticesAStuckLoop(t *testing.T) {
	t.Parallel()
	r := start(t, fast(testkit.DSN(t), testkit.ChannelName(t)+"=test"), nil).listening(t)
	if err := r.listener.Alive(); err != nil {
		t.Errorf("not alive: %v", err)
	}
	r.stop() // no loop turns from here on
	s := *r.listener.published.Load()
	s.turnedAt = s.turnedAt.Add(-loopBound)
	r.listener.published.Store(&s)
	if r.listener.Alive() == nil || r.listener.Ready() == nil {
		t.Error("a stuck loop is called alive")
	}
}
