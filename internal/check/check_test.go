//go:build unix

package check

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestServersWithoutListenAreNamed plays CockroachDB and YugabyteDB, which are not there to be asked: a fake server says what
// their version() says, and LISTEN fails as it does there.
func TestServersWithoutListenAreNamed(t *testing.T) {
	t.Parallel()
	refused := &pq.Error{Code: "0A000", Message: "LISTEN is not supported"}
	for _, c := range []struct {
		version  string
		listened bool
		want     string
	}{
		{"CockroachDB CCL v24.3.1 (x86_64-pc-linux-gnu, built 2024/12/05)", false, "FAIL  listen     CockroachDB has no LISTEN: pq: LISTEN is not supported"},
		{"PostgreSQL 15.12-YB-2025.2.1.0-b0 on x86_64-pc-linux-gnu", false, "FAIL  listen     YugabyteDB has LISTEN from 2025.2.3 on, and only with the flag ysql_yb_enable_listen_notify"},
		{"PostgreSQL 15.12-YB-2025.2.3.0-b0 on x86_64-pc-linux-gnu", true, "ok    listen     orders"},
		{"PostgreSQL 15.18 (Debian 15.18-0+deb12u1) on x86_64-pc-linux-gnu", false, "FAIL  listen     pq: LISTEN is not supported"},
	} {
		t.Run(c.version, func(t *testing.T) {
			t.Parallel()
			addr := testkit.FakeServer(t, testkit.OneRow("15.12", "f", c.version))
			var out strings.Builder
			latest := time.Now().Add(3 * testkit.Patience)
			Run(t.Context(), Input{DSN: pgtest.DSN(addr), Timeout: testkit.Patience, Channels: []string{"orders"},
				Listen: func(ctx context.Context) (time.Duration, bool, error) {
					// It may wait for what never comes, and has to end in time nevertheless.
					if end, ok := ctx.Deadline(); !ok || end.After(latest) {
						t.Errorf("it ends at %v, later than %v", end, latest)
					}
					if c.listened {
						return time.Millisecond, true, nil
					}
					return 0, false, errors.Join(refused)
				}}, &out)
			if !strings.Contains(out.String(), c.want) {
				t.Errorf("no %q in\n%s", c.want, &out)
			}
		})
	}
}

// silent is a handler whose receiver does not answer, and prompt one whose receiver does if there is time.
type silent struct{ notify.HandlerFunc }

func (silent) Check(ctx context.Context) (string, error) { <-ctx.Done(); return "", context.Cause(ctx) }

type prompt struct{ notify.HandlerFunc }

func (prompt) Check(ctx context.Context) (string, error) { return "it is there", ctx.Err() }

// TestSilentReceiversTakeNoTimeFromOthers: what does not answer is blamed, and nothing else.
func TestSilentReceiversTakeNoTimeFromOthers(t *testing.T) {
	t.Parallel()
	const timeout = 2 * time.Second
	addr := testkit.FakeServer(t, testkit.OneRow("15.12", "f", "PostgreSQL 15.12"))
	var out strings.Builder
	began := time.Now()
	Run(t.Context(), Input{DSN: pgtest.DSN(addr), Timeout: timeout, Channels: []string{"a", "b", "c", "d", "e"},
		Handlers: map[string]notify.Handler{"a": silent{}, "b": prompt{}, "c": silent{}, "d": silent{}, "e": prompt{}},
		Listen: func(ctx context.Context) (time.Duration, bool, error) {
			if left, ok := ctx.Deadline(); !ok || time.Until(left) < timeout/4 {
				t.Errorf("LISTEN has until %v", left)
			}
			return 0, true, ctx.Err()
		}}, &out)
	if took := time.Since(began); took > 3*timeout {
		t.Errorf("it took %v", took)
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		if f := strings.Fields(line); f[1] == "handler" || f[1] == "listen" {
			got = append(got, f[0]+" "+f[1]+" "+f[2])
		}
	}
	if want := []string{"FAIL handler a:", "ok handler b:", "FAIL handler c:", "FAIL handler d:", "ok handler e:", "ok listen a,"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q, in\n%s", got, want, &out)
	}
}
