// feature: check

package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv" // feature: outbox
	"strings"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// runCheck runs pglistener -check and returns what it printed; it must end in time.
func runCheck(t *testing.T, v vars, code int) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(t), "-check")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range v {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	began := time.Now()
	out, _ := cmd.CombinedOutput()
	if took, bound := time.Since(began), 3*testTimeout+500*time.Millisecond; took > bound {
		t.Errorf("-check took %v, more than %v", took, bound)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("exit code %d, want %d: %s", got, code, out)
	}
	return string(out)
}

func TestCheck(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	journal := filepath.Join(t.TempDir(), "journal")
	out := runCheck(t, fast(testkit.DSN(t), channel+"=doorbell:append:"+journal), cli.OK)
	for _, want := range []string{"ok    handler    " + channel + ": doorbell append:" + journal, "ok    connect    PostgreSQL ", "ok    server     a primary",
		"ok    listen     " + channel, "ok    probe      there and back in "} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if n := len(strings.Split(strings.TrimSpace(out), "\n")); n != 6 {
		t.Errorf("%d lines, want 6, of which one is a warning", n)
	}
}

func TestCheckFails(t *testing.T) {
	t.Parallel()
	silent, proxy := testkit.Proxied(t, testkit.DSN(t))
	proxy.Mute(true)
	s := testkit.OwnServer(t)
	standby := testkit.StandbyOf(t, s)
	for name, c := range map[string]struct {
		vars vars
		want string
	}{
		"program":  {fast(testkit.DSN(t), "a=exec:/does/not/exist"), `FAIL  config     CHANNELS: channel "a": program "/does/not/exist" does not exist`}, // feature: execcmd
		"silent":   {fast(silent, "a"), "FAIL  connect "},
		"refused":  {fast(pgtest.DSN(testkit.FreshAddress(t)), "a"), "check host and port"},
		"standby":  {fast(standby.DSN(), "a"), "FAIL  server     a standby"},
		"pooler":   {fast(testkit.Bouncer(t, s, "transaction"), "a"), "FAIL  probe      notifications do not arrive"},
		"database": {fast(strings.Replace(s.DSN(), "/postgres?", "/nowhere?", 1), "a"), "check the database name"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if out := runCheck(t, c.vars, cli.Failed); !strings.Contains(out, c.want) {
				t.Errorf("no %q in\n%s", c.want, out)
			}
		})
	}
}

// begin: outbox

// TestCheckOfALockedTable: however many channels wait for it, what is wrong is what is said, and in time. LISTEN is not to blame.
func TestCheckOfALockedTable(t *testing.T) {
	t.Parallel()
	db, tab, name := testkit.DB(t), outboxTable(t, testkit.DB(t)), testkit.ChannelName(t)
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	if _, err := tx.Exec(`lock table "` + tab + `"`); err != nil {
		t.Fatal(err)
	}
	var channels []string
	for i := range 8 {
		channels = append(channels, name+strconv.Itoa(i)+"=outbox:log")
	}
	out := runCheck(t, fast(testkit.DSN(t), strings.Join(channels, ","), sending(tab)), cli.Failed)
	if n := strings.Count(out, ": no answer in time, as when somebody has locked the table "+tab); n != len(channels) {
		t.Errorf("%d of %d channels say that the table is locked:\n%s", n, len(channels), out)
	}
	if strings.Count(out, "FAIL") != len(channels) || !strings.Contains(out, "ok    listen ") {
		t.Errorf("more than that has failed:\n%s", out)
	}
}

// end: outbox
