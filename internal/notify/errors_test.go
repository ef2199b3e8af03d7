package notify

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

func TestMarksAreFoundWhereverTheyAre(t *testing.T) {
	base := errors.New("base")
	for name, c := range map[string]struct {
		err                    error
		permanent, unavailable bool
		after                  time.Duration
	}{
		"none":           {err: base},
		"nil":            {err: Unavailable(Permanent(RetryAfter(nil, time.Second)))},
		"permanent":      {err: Permanent(base), permanent: true},
		"inside":         {err: RetryAfter(Unavailable(base), time.Second), unavailable: true, after: time.Second},
		"outside":        {err: Unavailable(RetryAfter(base, time.Second)), unavailable: true, after: time.Second},
		"wrapped":        {err: fmt.Errorf("x: %w", Permanent(fmt.Errorf("y: %w", Unavailable(base)))), permanent: true, unavailable: true},
		"joined":         {err: errors.Join(errors.New("other"), Unavailable(base)), unavailable: true},
		"the outer wait": {err: RetryAfter(RetryAfter(base, time.Hour), time.Second), after: time.Second},
	} {
		if IsPermanent(c.err) != c.permanent || IsUnavailable(c.err) != c.unavailable || RetryDelay(c.err) != c.after {
			t.Errorf("%s: permanent %v, unavailable %v, after %v", name, IsPermanent(c.err), IsUnavailable(c.err), RetryDelay(c.err))
		}
		if name != "nil" && !errors.Is(c.err, base) {
			t.Errorf("%s: the cause is lost", name)
		}
	}
}

func TestCutKeepsCharactersWhole(t *testing.T) {
	for _, c := range []struct {
		in   string
		n    int
		want string
	}{{"abc", 5, "abc"}, {"abc", 2, "ab"}, {"aä", 2, "a"}, {"ää", 3, "ä"}, {"ä", 0, ""}} {
		if got := Cut(c.in, c.n); got != c.want {
			t.Errorf("%q cut to %d is %q, want %q", c.in, c.n, got, c.want)
		}
	}
}
