//go:build unix

package outbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/retry"
)

// receiver is a handler whose receiver can be away. Some payloads are poison.
type receiver struct {
	away     atomic.Bool
	mu       sync.Mutex
	done     map[string]int // payloads, with the attempt at which each was done
	first    time.Time      // when the first was done since it came back
	last     time.Time
	requests int
}

func (r *receiver) Handle(ctx context.Context, n notify.Notification) error {
	r.mu.Lock()
	r.requests++
	r.mu.Unlock()
	switch {
	case r.away.Load():
		return notify.Unavailable(errors.New("connection refused"))
	case n.Payload == "always 500":
		return errors.New("status 500")
	case n.Payload == "always 502":
		return notify.Unavailable(errors.New("status 502"))
	case n.Payload == "never answered":
		<-ctx.Done()
		return context.Cause(ctx)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.first.IsZero() {
		r.first = time.Now()
	}
	r.last = time.Now()
	r.done[n.Payload] = n.Attempt
	return nil
}

func (r *receiver) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.done)
}

// fill inserts n rows with the payloads 1, 2, ...
func fill(t *testing.T, tab, channel string, n int) {
	t.Helper()
	testkit.Exec(t, testkit.DB(t), `insert into "`+tab+`" (channel, payload) select $1, i::text from generate_series(1, $2) i`, channel, n)
}

// An outage costs three rows an attempt, few log lines, and no time afterwards.
func TestOutageOfAReceiver(t *testing.T) {
	t.Parallel()
	const total = 1000
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	h := &receiver{done: map[string]int{}}
	h.away.Store(true)
	fill(t, tab, channel, total)
	for _, poison := range []string{"always 500", "always 502", "never answered"} {
		insert(t, testkit.DB(t), tab, channel, poison)
	}
	r := run(t, config{table: tab, concurrency: 20, attempts: 3, timeout: time.Second, tweak: func(o *Outbox) {
		o.retry = retry.Backoff{Min: 2 * time.Second, Max: time.Hour}
	}}, h)
	r.Wait(t, "channel paused", 1)
	time.Sleep(6 * time.Second) // the outage
	charged := 0
	testkit.Eventually(t, "rows other than those that found out have spent an attempt", func() bool {
		// One may be a try that is under way.
		err := testkit.DB(t).QueryRow(`select count(*) from "` + tab + `" where attempts > 0 and last_error is null or attempts > 1`).Scan(&charged)
		return err == nil && charged <= 1
	})
	var found int
	if err := testkit.DB(t).QueryRow(`select count(*) from "` + tab + `" where last_error is not null`).Scan(&found); err != nil || found != 3 {
		t.Errorf("%d rows have found out, want 3: %v", found, err)
	}
	h.mu.Lock()
	requests := h.requests
	h.mu.Unlock()
	if requests > 20+8 { // those that were under way, and the tries
		t.Errorf("%d requests in an outage", requests)
	}
	if err := r.Ready(); err != nil {
		t.Errorf("not ready within the first minute of a pause: %v", err)
	}
	r.mu.Lock()
	next := r.breaker.Try(time.Now(), 0) // when the next try is due
	r.mu.Unlock()
	h.away.Store(false)
	back := time.Now()
	for deadline := back.Add(next + testkit.Patience); h.count() < total; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d were delivered", h.count(), total)
		}
	}
	if took := h.first.Sub(back); took > next+2*time.Second {
		t.Errorf("the first request came %v after it was back, and the next try was due after %v", took, next)
	}
	if took := h.last.Sub(h.first); took > 5*time.Second {
		t.Errorf("the last was delivered %v after the first", took)
	}
	more := 0
	for payload, attempt := range h.done {
		if attempt > 2 {
			t.Errorf("%s was done at attempt %d", payload, attempt)
		}
		more += attempt - 1
	}
	if more > 3 {
		t.Errorf("%d attempts were spent on the outage, want 3", more)
	}
	// The poisonous rows have held up nobody, and end failed.
	testkit.Eventually(t, "the poisonous rows have not failed", func() bool {
		var failed int
		err := testkit.DB(t).QueryRow(`select count(*) from "` + tab + `" where failed_at is not null`).Scan(&failed)
		return err == nil && failed == 3
	})
	if n := rowCount(t, testkit.DB(t), tab); n != 3 {
		t.Errorf("%d rows are left, want 3", n)
	}
	if len(r.All("channel resumed")) == 0 {
		t.Error("no word of the end")
	}
	if lines := len(r.All("")); lines > 30 {
		t.Errorf("%d log lines", lines)
	}
}

// Rows that fail so while others succeed are poison, and stop nobody.
func TestPoisonThatLooksLikeAnOutage(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	h := &receiver{done: map[string]int{}}
	r := run(t, config{table: tab, attempts: 4}, h)
	for i := range 50 {
		insert(t, testkit.DB(t), tab, channel, fmt.Sprint(i))
		if i%30 == 0 {
			insert(t, testkit.DB(t), tab, channel, "always 502")
		}
	}
	testkit.Eventually(t, "not all were done", func() bool { return h.count() == 50 })
	testkit.Eventually(t, "the poison has not failed", func() bool {
		var failed int
		err := testkit.DB(t).QueryRow(`select count(*) from "` + tab + `" where failed_at is not null and attempts = 4`).Scan(&failed)
		return err == nil && failed == 2
	})
	if n := len(r.All("channel paused")); n > 0 {
		t.Errorf("paused %d times by two rows", n)
	}
}

// TestPausedChannelWaitsAsLongAsItsReceiverAsks: and for a minute at most, which is how long its own pauses grow.
func TestPausedChannelWaitsAsLongAsItsReceiverAsks(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	r := run(t, config{table: tab, attempts: 10, concurrency: 3}, notify.HandlerFunc(func(context.Context, notify.Notification) error {
		return notify.RetryAfter(notify.Unavailable(errors.New("429")), time.Hour)
	}))
	fill(t, tab, channel, 3)
	r.Wait(t, "channel paused", 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if wait := r.breaker.Try(time.Now(), slowTry); wait < 50*time.Second || wait > time.Minute {
		t.Errorf("the next try is in %v", wait)
	}
}

func TestChannelsDoNotPauseEachOther(t *testing.T) {
	t.Parallel()
	tab := outboxTable(t, testkit.DB(t))
	gone, there := &receiver{done: map[string]int{}}, &receiver{done: map[string]int{}}
	gone.away.Store(true)
	a := run(t, config{table: tab, channel: "gone"}, gone)
	run(t, config{table: tab, channel: "there"}, there)
	fill(t, tab, "gone", 10)
	a.Wait(t, "channel paused", 1)
	fill(t, tab, "there", 100)
	testkit.Eventually(t, "one channel's receiver stops the other's", func() bool { return there.count() == 100 })
}

func TestNotReadyWhilePausedForLong(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	h := &receiver{done: map[string]int{}}
	h.away.Store(true)
	r := run(t, config{table: tab}, h)
	fill(t, tab, channel, 5)
	r.Wait(t, "channel paused", 1)
	if stat(r, "pglistener_channel_paused", "") != 1 {
		t.Error("the metric does not say that it is paused")
	}
	r.mu.Lock() // a minute is too long for a test
	r.breaker = pausedFor(2*time.Minute, errors.New("connection refused"))
	r.mu.Unlock()
	r.recount(t)
	if err := r.Ready(); err == nil || !strings.Contains(err.Error(), "paused for 2m") || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("paused for long, and Ready says %v", err)
	}
	h.away.Store(false)
	testkit.Eventually(t, "never ready again", func() bool { return r.Ready() == nil })
	if stat(r, "pglistener_channel_paused", "") != 0 {
		t.Error("the metric still says that it is paused")
	}
}

// A try that is never answered says nothing of the receiver, so that the channel stays paused, and nothing of its row, which spends no
// attempt. The next try is another row.
func TestTryThatIsNeverAnswered(t *testing.T) {
	t.Parallel()
	channel, tab, s := testkit.ChannelName(t), outboxTable(t, testkit.DB(t)), &seen{}
	fill(t, tab, channel, 3)
	r := run(t, config{table: tab, timeout: 200 * time.Millisecond, attempts: 100, tweak: func(o *Outbox) {
		o.breaker = pausedFor(30*time.Second, errors.New("connection refused"))
	}}, notify.HandlerFunc(func(ctx context.Context, n notify.Notification) error {
		_ = s.Handle(ctx, n)
		<-ctx.Done()
		return context.Cause(ctx)
	}))
	testkit.Eventually(t, "no second try", func() bool { return len(s.payloads()) >= 2 })
	testkit.Eventually(t, "a try has spent an attempt, or its row is not given back", func() bool {
		var n int
		err := testkit.DB(t).QueryRow(`select count(*) from "` + tab + `" where attempts = 0 and lease is null and last_error is null`).Scan(&n)
		return err == nil && n == 3
	})
	if got := s.payloads(); got[0] != "1" || got[1] != "2" {
		t.Errorf("tried %v", got)
	}
	if len(r.All("channel resumed")) > 0 || stat(r, "pglistener_channel_paused", "") != 1 {
		t.Error("a try that was not answered has ended the pause")
	}
}

// pausedFor is a Breaker that opened some time ago.
func pausedFor(d time.Duration, cause error) (b retry.Breaker) {
	for i := range 3 {
		b.Fail(fmt.Sprint(i), cause, 0, time.Now().Add(-d))
	}
	return b
}

// TestReadyWhenNothingIsLeftToTry: others have done what there was, so that no try of its own can end the pause. It is paused all the
// same, for nobody has heard of the receiver: the next row is a try, and costs no attempt.
func TestReadyWhenNothingIsLeftToTry(t *testing.T) {
	t.Parallel()
	channel, tab := testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	h := &receiver{done: map[string]int{}}
	h.away.Store(true)
	fill(t, tab, channel, 5)
	r := run(t, config{table: tab, attempts: 100}, h)
	r.Wait(t, "channel paused", 1)
	r.mu.Lock()
	r.breaker = pausedFor(2*time.Minute, errors.New("connection refused"))
	r.mu.Unlock()
	rowsAre(t, tab, "last_error is not null", 3)
	is := func(what string, ready bool) {
		t.Helper()
		testkit.Eventually(t, fmt.Sprint(what, ": ready is not ", ready), func() bool {
			r.recount(t)
			return (r.Ready() == nil) == ready
		})
		if stat(r, "pglistener_channel_paused", "") != 1 {
			t.Errorf("%s: not paused", what)
		}
	}
	testkit.Exec(t, testkit.DB(t), `delete from "`+tab+`" where last_error is null; update "`+tab+`" set run_at = now() + interval '1 hour'`)
	is("those that wait for their next attempt are left", false)
	fill(t, tab, channel, 5)
	testkit.Exec(t, testkit.DB(t), `delete from "`+tab+`" where last_error is not null`) // as another replica does, or a person
	is("those that have not been tried are left", false)
	testkit.Exec(t, testkit.DB(t), `delete from "`+tab+`"`)
	is("nothing is left", true)
	fill(t, tab, channel, 4)
	is("there is something again", false)
	rowsAre(t, tab, "last_error is null and attempts <= 1", 4)
	h.away.Store(false)
	emptied(t, testkit.DB(t), tab)
	if r.Ready() != nil || stat(r, "pglistener_channel_paused", "") != 0 || len(r.All("channel resumed: its receiver is back")) != 1 {
		t.Errorf("it is back: %v, %v", r.Ready(), r.All("channel resumed"))
	}
	for payload, attempt := range h.done {
		if attempt != 1 {
			t.Errorf("%s was done at attempt %d", payload, attempt)
		}
	}
}

// TestNotReadyBeforeItHasCounted: what has not been counted may be much.
func TestNotReadyBeforeItHasCounted(t *testing.T) {
	t.Parallel()
	o, err := New(&seen{}, new(Pool), Options{Settings: Settings{Table: "outbox"}, DSN: testkit.DSN(t), Timeout: time.Second}, notify.Setup{Channel: "x"})
	if err != nil {
		t.Fatal(err)
	}
	defer o.pool.release("x")
	o.breaker = pausedFor(2*time.Minute, errors.New("connection refused"))
	if err := o.Ready(); err == nil || !strings.Contains(err.Error(), "paused for 2m") {
		t.Errorf("%v", err)
	}
}

// recount waits until the rows have been counted once more.
func (r *running) recount(t *testing.T) {
	t.Helper()
	r.mu.Lock()
	r.counts.counted, r.counts.took = time.Now().Add(-time.Hour), 0
	r.mu.Unlock()
	testkit.Eventually(t, "it does not count", func() bool {
		retry.Nudge(r.taken)
		r.mu.Lock()
		defer r.mu.Unlock()
		return time.Since(r.counts.counted) < time.Hour
	})
}

// rowsAre waits until so many rows are so.
func rowsAre(t *testing.T, tab, where string, want int) {
	t.Helper()
	testkit.Eventually(t, fmt.Sprint("the rows are not so: ", where), func() bool {
		var n int
		err := testkit.DB(t).QueryRow(`select count(*) from "` + tab + `" where ` + where).Scan(&n)
		return err == nil && n == want
	})
}
