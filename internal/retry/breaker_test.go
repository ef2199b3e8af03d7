package retry

import (
	"errors"
	"testing"
	"time"
)

var errAway = errors.New("away")

func TestBreakerOpensAfterThreeDifferentItems(t *testing.T) {
	now := time.Now()
	var b Breaker
	for i, item := range []string{"a", "a", "a", "b", "a", "b"} {
		if opened, wasOpen := b.Fail(item, errAway, 0, now); opened || wasOpen {
			t.Fatalf("opened by failure %d, of two items", i)
		}
	}
	if opened, wasOpen := b.Fail("c", errAway, 0, now); !opened || wasOpen || !b.Open() {
		t.Fatal("not opened by the third item")
	}
	if since, cause := b.Since(); !since.Equal(now) || cause != errAway {
		t.Errorf("since %v because of %v", since, cause)
	}
	last := errors.New("away in another way")
	if opened, wasOpen := b.Fail("d", last, 0, now); opened || !wasOpen {
		t.Error("a failure while it is open is charged")
	}
	if _, cause := b.Since(); cause != last {
		t.Errorf("the last cause is %v", cause)
	}
	if b.Succeed(now) == 0 { // within the same tick of a coarse clock
		t.Error("it was open, and that is not told")
	}
}

// TestBreakerWaitsAsLongAsIsAsked: when it opens and at each try, but for a minute at most.
func TestBreakerWaitsAsLongAsIsAsked(t *testing.T) {
	for asked, want := range map[time.Duration]time.Duration{40 * time.Second: 40 * time.Second, time.Hour: time.Minute} {
		now := time.Now()
		var b Breaker
		for i, item := range []string{"a", "b", "c", "d", "e"} {
			b.Fail(item, errAway, asked, now)
			if wait := b.Try(now, 0); i >= 2 && wait != want {
				t.Errorf("asked for %v by failure %d: the next try is in %v", asked, i, wait)
			}
		}
	}
}

func TestBreakerForgetsWhenOneSucceeds(t *testing.T) {
	now := time.Now()
	var b Breaker
	b.Fail("a", errAway, 0, now)
	b.Fail("b", errAway, 0, now)
	if b.Succeed(now) != 0 {
		t.Error("it was never open")
	}
	b.Fail("c", errAway, 0, now)
	b.Fail("d", errAway, 0, now)
	if b.Open() {
		t.Error("open although one succeeded between")
	}
	b.Fail("e", errAway, 0, now)
	if paused := b.Succeed(now.Add(time.Hour)); paused != time.Hour || b.Open() {
		t.Errorf("paused for %v, open: %v", paused, b.Open())
	}
}

func TestBreakerTriesAreSpaced(t *testing.T) {
	now := time.Now()
	var b Breaker
	for _, item := range []string{"a", "b", "c"} {
		b.Fail(item, errAway, 0, now)
	}
	for n := 1; n < 20; n++ {
		full := min(time.Minute, 2*time.Second<<(n-1))
		wait := b.Try(now, time.Second)
		if wait < full/2 || wait > full {
			t.Fatalf("try %d after %v, want %v at most", n, wait, full)
		}
		now = now.Add(wait)
		if b.Try(now, time.Second) != 0 {
			t.Fatal("not when it said")
		}
		if wait := b.Try(now, time.Second); wait != time.Second { // the one that was begun has not been answered yet
			t.Fatalf("the next one after %v", wait)
		}
		b.Fail("x", errAway, 0, now)
	}
}
