package probe

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

const (
	interval = time.Minute
	timeout  = 5 * time.Second
)

// owner drives a Probe as the select loop does, with a server that does as it is told.
type owner struct {
	t *testing.T
	*Probe
	listening, reading bool
}

func newOwner(t *testing.T) *owner {
	o := &owner{t: t, Probe: New(interval, timeout), reading: true}
	t.Cleanup(o.Stop)
	return o
}

// due waits for C, for at most a bound, and returns the step that follows.
func (o *owner) due(bound time.Duration) Step {
	o.t.Helper()
	select {
	case <-o.C:
		return o.Due(o.reading)
	case <-time.After(bound + time.Millisecond): // C comes first if both are due
		o.t.Fatalf("nothing was due within %v in state %d", bound, o.state)
		return Wait
	}
}

func (o *owner) is(want state) {
	o.t.Helper()
	if o.state != want {
		o.t.Fatalf("state %d, want %d", o.state, want)
	}
}

func (o *owner) subscribe() {
	o.t.Helper()
	o.listening = true
	o.Subscribed(time.Now())
}

// send takes the step from a probe that is due to one that has been sent.
func (o *owner) send(bound time.Duration) (payload string) {
	o.t.Helper()
	if step := o.due(bound); step != Send {
		o.t.Fatalf("step %d, want Send", step)
	}
	o.is(sending)
	payload = o.nonce
	if o.reading && !strings.Contains(o.Query(), payload) {
		o.t.Errorf("%s does not send %s", o.Query(), payload)
	}
	if step := o.Sent(nil, o.listening); step != Wait {
		o.t.Fatalf("step %d, want Wait", step)
	}
	return payload
}

// proven takes a fresh Probe to one that has come back.
func (o *owner) proven() {
	o.t.Helper()
	o.subscribe()
	payload := o.send(0)
	o.is(awaiting)
	if proof, ok := o.Heard(payload); !ok || !proof.First || !proof.GapFrom.IsZero() {
		o.t.Fatalf("%+v, %v", proof, ok)
	}
	o.is(idle)
}

func run(t *testing.T, name string, f func(o *owner)) {
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { f(newOwner(t)) })
	})
}

func TestTransitions(t *testing.T) {
	run(t, "off without a subscription", func(o *owner) {
		o.is(off)
		select {
		case <-o.C:
			o.t.Error("a probe is due")
		case <-time.After(10 * interval):
		}
	})
	run(t, "off with an interval of 0", func(o *owner) {
		o.Probe = New(0, timeout)
		o.subscribe()
		o.is(off)
	})
	run(t, "idle, due at once, sending, awaiting, heard, idle", func(o *owner) {
		o.subscribe()
		o.is(idle)
		began := time.Now()
		payload := o.send(0)
		o.is(awaiting)
		time.Sleep(time.Second)
		proof, ok := o.Heard(payload)
		if s := o.Status(); !ok || !proof.First || !s.ProvenHere || s.RoundTrip != time.Second || !s.Proven.Equal(began.Add(time.Second)) {
			o.t.Errorf("%+v %v %+v", proof, ok, s)
		}
		o.is(idle)
		// The next one is due within the interval, and not much sooner.
		again := time.Now()
		payload = o.send(interval)
		if wait := time.Since(again); wait < interval*4/5 || wait > interval {
			o.t.Errorf("sent again after %v", wait)
		}
		if proof, ok := o.Heard(payload); !ok || proof.First {
			o.t.Errorf("%+v, %v", proof, ok)
		}
	})
	run(t, "heard while still sending", func(o *owner) {
		o.subscribe()
		if o.due(0) != Send {
			o.t.Fatal("not sent")
		}
		if _, ok := o.Heard(o.nonce); !ok {
			o.t.Fatal("not heard")
		}
		o.is(sending)
		o.Sent(nil, true)
		o.is(idle)
		o.send(interval)
		o.is(awaiting)
	})
	run(t, "sending, failed, idle", func(o *owner) {
		o.subscribe()
		o.due(0)
		o.Sent(errors.New("refused"), true)
		o.is(idle)
		if s := o.Status(); s.SendError != "refused" || s.Deaf != "" || s.Lost != 0 {
			o.t.Errorf("%+v", s)
		}
		o.send(timeout) // soon, not only after the interval
		o.is(awaiting)
		if s := o.Status(); s.SendError != "" {
			o.t.Errorf("%+v", s)
		}
	})
	run(t, "sending, failed, with an interval below the timeout", func(o *owner) {
		o.Probe = New(2*time.Second, timeout)
		o.subscribe()
		o.due(0)
		o.Sent(errors.New("refused"), true)
		o.send(2 * time.Second)
		o.Stop()
	})
	run(t, "sending takes longer than C", func(o *owner) {
		o.subscribe()
		o.due(0)
		if step := o.Due(true); step != Wait {
			o.t.Errorf("step %d", step)
		}
		o.is(sending)
	})
	run(t, "a stranger's and a late payload", func(o *owner) {
		o.subscribe()
		payload := o.send(0)
		if _, ok := o.Heard("forged"); ok {
			o.t.Error("a stranger's payload proves something")
		}
		o.is(awaiting)
		if o.due(timeout) != Reconnect {
			o.t.Error("not lost")
		}
		if _, ok := o.Heard(payload); ok {
			o.t.Error("a late payload proves something")
		}
		if _, ok := o.Heard(""); ok {
			o.t.Error("an empty payload proves something")
		}
	})
}

func TestLostOnceReconnects(t *testing.T) {
	run(t, "then heard", func(o *owner) {
		o.proven()
		provenAt := time.Now()
		o.send(interval)
		sentAt := time.Now()
		if step := o.due(timeout); step != Reconnect {
			t.Fatalf("step %d, want Reconnect", step)
		}
		if wait := time.Since(sentAt); wait != timeout {
			t.Errorf("given up after %v", wait)
		}
		o.is(lost)
		if n, from := o.Deaf(); n != 1 || !from.Equal(provenAt) || o.Status().Deaf != deafOnce || o.Status().Lost != 1 {
			t.Errorf("%d since %v, %+v", n, from, o.Status())
		}
		o.Unsubscribed()
		o.is(off)
		time.Sleep(time.Second)
		o.subscribe()
		subscribedAt := time.Now()
		if o.Status().Deaf == "" {
			t.Error("a fresh connection that has proven nothing is not called deaf")
		}
		payload := o.send(0)
		time.Sleep(time.Second)
		proof, ok := o.Heard(payload)
		if !ok || !proof.First || !proof.GapFrom.Equal(provenAt) || !proof.GapTo.Equal(subscribedAt) || proof.CatchUp {
			t.Errorf("%+v, %v", proof, ok)
		}
		if n, _ := o.Deaf(); n != 0 || o.Status().Deaf != "" {
			t.Errorf("still deaf: %d, %+v", n, o.Status())
		}
	})
	run(t, "then deaf for good", func(o *owner) {
		o.proven()
		o.send(interval)
		o.due(timeout)
		o.Unsubscribed()
		o.subscribe()
		for n := 2; n < 5; n++ {
			o.send(interval)
			if step := o.due(timeout); step != CatchUp {
				t.Fatalf("step %d, want CatchUp", step)
			}
			o.is(lost)
			if lost, _ := o.Deaf(); lost != n || o.Status().Deaf != deafForGood {
				t.Errorf("%d lost, %+v", lost, o.Status())
			}
		}
		// It comes back on this very connection: what was missed on it is to be looked for.
		payload := o.send(interval)
		proof, ok := o.Heard(payload)
		if !ok || !proof.CatchUp || !proof.GapTo.Equal(time.Now()) {
			t.Errorf("%+v, %v", proof, ok)
		}
	})
}

// TestDeafFrom: on a subscription that has proven nothing, delivery was sure until it began, whatever an earlier one has proven.
func TestDeafFrom(t *testing.T) {
	for name, before := range map[string]func(*owner){
		"the first one": func(*owner) {},
		"a later one":   func(o *owner) { o.proven(); o.Unsubscribed() },
	} {
		run(t, name, func(o *owner) {
			before(o)
			time.Sleep(time.Hour)
			subscribedAt := time.Now()
			o.subscribe()
			o.send(0)
			o.due(timeout)
			if _, from := o.Deaf(); !from.Equal(subscribedAt) {
				t.Errorf("deaf from %v, subscribed at %v", from, subscribedAt)
			}
		})
	}
}

func TestLateIsNotLost(t *testing.T) {
	run(t, "while others arrive", func(o *owner) {
		o.proven()
		o.Other()
		payload := o.send(interval)
		for range 5 {
			o.Other()
			if step := o.due(timeout); step != Wait {
				t.Fatalf("step %d although notifications are coming in", step)
			}
			o.is(awaiting)
		}
		if _, ok := o.Heard(payload); !ok {
			t.Error("not heard")
		}
	})
	run(t, "until no more arrive", func(o *owner) {
		o.subscribe()
		o.Other() // before it is sent, which says nothing of it
		o.send(0)
		o.Other()
		if step := o.due(timeout); step != Wait {
			t.Fatalf("step %d although notifications are coming in", step)
		}
		if step := o.due(timeout); step != Reconnect {
			t.Errorf("step %d although nothing more has come in", step)
		}
	})
	run(t, "unless the others came before it was sent", func(o *owner) {
		o.subscribe()
		o.Other()
		o.send(0)
		if step := o.due(timeout); step != Reconnect {
			t.Errorf("step %d, want Reconnect", step)
		}
	})
	run(t, "while nothing is read", func(o *owner) {
		o.proven()
		o.send(interval)
		o.reading = false
		if step := o.due(timeout); step != Wait {
			t.Fatalf("step %d although nothing is read", step)
		}
		o.is(idle)
		// The next one only asks how full the queue is.
		o.due(interval)
		o.is(sending)
		if strings.Contains(o.Query(), "pg_notify(") {
			t.Errorf("%s", o.Query())
		}
		o.Sent(nil, true)
		o.is(idle)
		o.reading = true
		o.send(interval)
		o.is(awaiting)
	})
}

func TestUnsubscribedInEveryState(t *testing.T) {
	run(t, "idle", func(o *owner) {
		o.proven()
		o.Unsubscribed()
		o.is(off)
	})
	run(t, "awaiting", func(o *owner) {
		o.subscribe()
		payload := o.send(0)
		o.Unsubscribed()
		o.is(off)
		if _, ok := o.Heard(payload); ok {
			t.Error("heard without a subscription")
		}
		select {
		case <-o.C:
			t.Error("still due")
		case <-time.After(10 * interval):
		}
	})
	run(t, "sending", func(o *owner) {
		o.subscribe()
		o.due(0)
		o.listening = false
		o.Unsubscribed()
		o.is(sending) // the second connection is still in use
		o.Sent(nil, o.listening)
		o.is(off)
		o.subscribe()
		o.send(0)
		o.is(awaiting) // the next one proves something again
	})
	run(t, "sending, and subscribed again before it was sent", func(o *owner) {
		o.subscribe()
		o.due(0)
		stale := o.nonce
		o.Unsubscribed()
		o.subscribe()
		o.is(sending)
		o.Sent(nil, true)
		o.is(idle)
		if fresh := o.send(0); fresh == stale || fresh == "" {
			t.Errorf("%q proves the new subscription, %q was the old one's", fresh, stale)
		}
		if _, ok := o.Heard(stale); ok {
			t.Error("the old subscription's probe proves the new one")
		}
	})
}

func TestUsageIsToldWhenItCrosses(t *testing.T) {
	u := Usage{Bounds: [2]float64{0.25, 0.5}}
	lg := testkit.NewLogs(t)
	var got []string
	for i, usage := range []float64{0, 0.25, 0.26, 0.4, 0.51, 0.9, 0.3, 0} {
		channel := ""
		if i > 4 {
			channel = "slow"
		}
		before := len(lg.All(""))
		u.Tell(usage, channel, lg.Logger())
		for _, line := range lg.All("")[before:] {
			got = append(got, fmt.Sprint(usage, " ", line["level"], " ", line["channel"]))
		}
	}
	want := []string{"0.26 WARN <nil>", "0.51 ERROR <nil>", "0.3 WARN slow", "0 INFO <nil>"}
	if !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}
