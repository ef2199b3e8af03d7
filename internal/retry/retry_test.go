package retry

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestBackoff(t *testing.T) {
	b := Backoff{Min: 100 * time.Millisecond, Max: 2 * time.Second}
	if b.After(0) != 0 {
		t.Error("a wait after no failure")
	}
	for n := 1; n < 100; n++ {
		full := b.Max
		if n < 6 {
			full = min(full, b.Min<<(n-1))
		}
		for range 100 {
			if d := b.After(n); d < full/2 || d > full {
				t.Fatalf("after %d failures: %v, want between %v and %v", n, d, full/2, full)
			}
		}
	}
}

func TestSleepEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if !Sleep(ctx, 500*time.Millisecond) || time.Since(began) != 500*time.Millisecond {
			t.Errorf("slept for %v", time.Since(began))
		}
		if Sleep(ctx, time.Hour) || time.Since(began) != time.Second {
			t.Errorf("slept until %v after the beginning", time.Since(began))
		}
		if Sleep(ctx, 0) {
			t.Error("an ended context is not told")
		}
	})
}

func TestFailuresAreThinnedByKind(t *testing.T) {
	var f Failures
	logged := map[string]int{}
	for i := range 200 {
		kind := []string{"a", "b"}[i%2]
		attempt, shouldLog := f.Count(kind)
		if attempt != i+1 {
			t.Fatalf("attempt %d, want %d", attempt, i+1)
		}
		if shouldLog {
			logged[kind]++
		}
	}
	if logged["a"] != 7 || logged["b"] != 7 { // the 1st, 2nd, 4th, ... 64th of each
		t.Errorf("logged %v", logged)
	}
	f.Reset()
	if attempt, shouldLog := f.Count("a"); attempt != 1 || !shouldLog {
		t.Error("the first failure after a success is not logged as the first")
	}
}

// TestRareFailuresAreAllLogged: what comes once an hour is news each time.
func TestRareFailuresAreAllLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f Failures
		for _, step := range []struct {
			after time.Duration
			want  bool
		}{
			{0, true}, {0, true}, {time.Minute, false}, {time.Minute, true}, {time.Minute, false},
			{time.Minute + 1, true}, {time.Hour, true}, {0, true}, {0, false},
		} {
			time.Sleep(step.after)
			if n, shouldLog := f.Count("a"); shouldLog != step.want {
				t.Errorf("failure %d, %v after the one before: logged %v, want %v", n, step.after, shouldLog, step.want)
			}
			if step.after > time.Minute {
				if _, shouldLog := f.Count("b"); !shouldLog {
					t.Errorf("the first of another kind in %v is not logged", step.after)
				}
			}
		}
	})
}
