package call

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// sleeper is a handler that takes its time and looks at nothing.
func sleeper(d time.Duration) Func {
	return func(context.Context, notify.Notification) error {
		time.Sleep(d)
		return nil
	}
}

const stillRunning = "handler is still running after its time limit"

// The context of the first call grows too old and is cancelled while the second runs: that must not be taken
// for the second one's time limit.
func TestNoFalseAlarmOfLongCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lg := testkit.NewLogs(t)
		var c Caller
		defer c.Close()
		for range 5 {
			if took, err := c.Call(t.Context(), 30*time.Second, sleeper(6*time.Second), notify.Notification{}, lg.Logger()); err != nil || took != 6*time.Second {
				t.Errorf("%v, %v", took, err)
			}
		}
		time.Sleep(time.Minute)
		if lines := lg.All(stillRunning); len(lines) > 0 {
			t.Errorf("calls of 6 s are said to have overrun 30 s: %v", lines)
		}
	})
}

func TestOverrunIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lg := testkit.NewLogs(t)
		var c Caller
		defer c.Close()
		_, _ = c.Call(t.Context(), 30*time.Second, sleeper(time.Hour), notify.Notification{}, lg.Logger())
		if n := len(lg.All(stillRunning)); n != 1 {
			t.Errorf("told %d times", n)
		}
		// One that ends within the grace has obeyed, if slowly.
		_, _ = c.Call(t.Context(), 30*time.Second, sleeper(33*time.Second), notify.Notification{}, lg.Logger())
		time.Sleep(time.Minute)
		if n := len(lg.All(stillRunning)); n != 1 {
			t.Errorf("told %d times", n)
		}
	})
}

func TestEveryCallHasItsWholeLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 64 * time.Second
		var c Caller
		defer c.Close()
		for i := range 50 {
			time.Sleep(time.Duration(i) * 100 * time.Millisecond)
			took, err := c.Call(t.Context(), limit, func(ctx context.Context, _ notify.Notification) error {
				if i%3 > 0 {
					return ctx.Err() // a quick one, so that the next shares its context
				}
				<-ctx.Done()
				return context.Cause(ctx)
			}, notify.Notification{}, testkit.NewLogs(t).Logger())
			if i%3 > 0 && err != nil {
				t.Errorf("call %d was given an ended context: %v", i, err)
			}
			if i%3 == 0 && (took < limit || took > Longest(limit) || !errors.Is(err, notify.ErrHandlerTimeout)) {
				t.Errorf("call %d ended after %v with %v", i, took, err)
			}
		}
	})
}

func TestPanicIsAnError(t *testing.T) {
	lg := testkit.NewLogs(t)
	var c Caller
	defer c.Close()
	_, err := c.Call(t.Context(), time.Minute, func(context.Context, notify.Notification) error { panic("boom") }, notify.Notification{}, lg.Logger())
	if err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("%v", err)
	}
	if line := lg.Wait(t, "handler panicked", 1); !strings.Contains(line["stack"].(string), "call_test.go") {
		t.Errorf("the stack does not show where: %v", line)
	}
}
