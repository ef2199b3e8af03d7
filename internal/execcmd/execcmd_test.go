package execcmd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/proc"
)

const grace = 500 * time.Millisecond

// script writes an executable shell script and returns an exec handler for it.
func script(t *testing.T, lines string) (notify.Handler, *testkit.Logs) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	if err := testkit.WriteProgram(path, "#!/bin/sh\n"+lines+"\n"); err != nil {
		t.Fatal(err)
	}
	lg := testkit.NewLogs(t)
	h, err := New(path+" arg1 arg2", proc.Settings{}, notify.Setup{Log: lg.Logger(), Grace: grace})
	if err != nil {
		t.Fatal(err)
	}
	return h, lg
}

func TestExec(t *testing.T) {
	t.Parallel()
	h, lg := script(t, `echo "$#" "$1" "$2" "$PGLISTENER_CHANNEL" "$PGLISTENER_PID" "$PGLISTENER_ATTEMPT"
cat >&2
printf 'no newline'`)
	payload := "line one; $(exit 9)\n`line` \"two\""
	if err := h.Handle(t.Context(), notify.Notification{Channel: "a b", Payload: payload, PID: 7, Attempt: 2}); err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	for _, line := range lg.All("output") {
		stream := line["stream"].(string)
		got[stream] = append(got[stream], line["line"].(string))
	}
	if s := strings.Join(got["stdout"], "|"); s != "2 arg1 arg2 a b 7 2|no newline" {
		t.Errorf("stdout: %s", s)
	}
	if s := strings.Join(got["stderr"], "\n"); s != payload {
		t.Errorf("stdin came back as %q", s)
	}
}

func TestExecFailures(t *testing.T) {
	t.Parallel()
	h, _ := script(t, "exit 3")
	if err := h.Handle(t.Context(), notify.Notification{}); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("exit 3: %v", err)
	}
	h, _ = script(t, "exec true") // does not read its stdin
	if err := h.Handle(t.Context(), notify.Notification{Payload: strings.Repeat("x", 1<<20)}); err != nil {
		t.Errorf("unread stdin: %v", err)
	}
}

func TestExecCutsLongLines(t *testing.T) {
	t.Parallel()
	h, lg := script(t, `head -c 10000000 /dev/zero | tr '\0' x; echo; echo short`)
	if err := h.Handle(t.Context(), notify.Notification{}); err != nil {
		t.Fatal(err)
	}
	lines := lg.All("output")
	if len(lines) != 2 || len(lines[0]["line"].(string)) != proc.MaxLine || lines[0]["cut_at"] == nil || lines[1]["line"] != "short" {
		t.Errorf("%d lines", len(lines))
	}
}

// alive says whether a process with this pid is there and not a zombie.
func alive(pid string) bool {
	stat, err := os.ReadFile("/proc/" + strings.TrimSpace(pid) + "/stat")
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func TestExecIsStoppedWithItsChildren(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/stat"); err != nil {
		testkit.Skip(t, "needs /proc to see processes")
	}
	for name, body := range map[string]string{
		"obedient":        `sleep 1000`,
		"ignores SIGTERM": `trap '' TERM; sleep 1000 & echo $! >> "$1"; while :; do sleep 1000; done`,
		"forks children":  `sleep 1000 & echo $! >> "$1"; sleep 1000 & echo $! >> "$1"; wait`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			pids := filepath.Join(dir, "pids")
			path := filepath.Join(dir, "script")
			if err := testkit.WriteProgram(path, "#!/bin/sh\necho $$ > \"$1\"\n"+body+"\n"); err != nil {
				t.Fatal(err)
			}
			h, err := New(path+" "+pids, proc.Settings{}, notify.Setup{Log: testkit.NewLogs(t).Logger(), Grace: grace})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, notify.ErrHandlerTimeout)
			defer cancel()
			began := time.Now()
			err = h.Handle(ctx, notify.Notification{})
			if !errors.Is(err, notify.ErrHandlerTimeout) {
				t.Errorf("error: %v", err)
			}
			if took := time.Since(began); took > 300*time.Millisecond+grace+5*time.Second {
				t.Errorf("took %v", took)
			}
			data, err := os.ReadFile(pids)
			if err != nil {
				t.Fatal(err)
			}
			for _, pid := range strings.Fields(string(data)) {
				testkit.Eventually(t, "process "+pid+" is still there", func() bool { return !alive(pid) })
			}
		})
	}
}

func TestExecKillsWhatItLeavesBehind(t *testing.T) {
	t.Parallel()
	h, lg := script(t, `sleep 1000 & echo $!`)
	if err := h.Handle(t.Context(), notify.Notification{}); err != nil {
		t.Errorf("a program that exits with 0 has not failed: %v", err)
	}
	pid := lg.Wait(t, "output", 1)["line"].(string)
	testkit.Eventually(t, "the child still runs", func() bool { return !alive(pid) })
	lg.Wait(t, "program left processes behind", 1)
}

func TestExecExitCodes(t *testing.T) {
	t.Parallel()
	for code, want := range map[int][2]bool{1: {}, 64: {}, 65: {true, false}, 66: {}, 69: {false, true}, 75: {false, true}, 255: {}} {
		h, _ := script(t, fmt.Sprintf("exit %d", code))
		err := h.Handle(t.Context(), notify.Notification{})
		if got := [2]bool{notify.IsPermanent(err), notify.IsUnavailable(err)}; err == nil || got != want {
			t.Errorf("exit %d: %v, permanent and unavailable %v, want %v", code, err, got, want)
		}
	}
	h, _ := script(t, "kill -9 $$")
	if err := h.Handle(t.Context(), notify.Notification{}); err == nil || notify.IsPermanent(err) || notify.IsUnavailable(err) {
		t.Errorf("killed: %v", err)
	}
}

// What only the listener needs is not handed to programs.
func TestExecInheritsNoSecrets(t *testing.T) {
	for _, name := range []string{"WEBHOOK_SECRET", "ORDERS_WEBHOOK_AUTHORIZATION", "WEBHOOK_SECRET_FILE", "CHANNELS", "ORDERS_HANDLER", "NOTIFY_SOCKET", "WATCHDOG_USEC", "DATABASE_URL", "APP_KEY"} {
		t.Setenv(name, "hunter2-"+name)
	}
	inherited := func(pass string) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "script")
		if err := testkit.WriteProgram(path, "#!/bin/sh\nenv\n"); err != nil {
			t.Fatal(err)
		}
		lg := testkit.NewLogs(t)
		h, err := New(path, proc.Settings{Pass: pass}, notify.Setup{Log: lg.Logger(), Grace: grace})
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Handle(t.Context(), notify.Notification{Channel: "orders"}); err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, line := range lg.All("output") {
			if name, value, _ := strings.Cut(line["line"].(string), "="); strings.HasPrefix(value, "hunter2-") || name == "PATH" || name == "PGLISTENER_CHANNEL" {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return strings.Join(names, " ")
	}
	if got, want := inherited(""), "APP_KEY DATABASE_URL PATH PGLISTENER_CHANNEL"; got != want {
		t.Errorf("inherits %s, want %s", got, want)
	}
	if got, want := inherited("OTHER, APP_KEY ,"), "APP_KEY PATH PGLISTENER_CHANNEL"; got != want {
		t.Errorf("with ENV_PASS it inherits %s, want %s", got, want)
	}
}

// What a shell would do, and nobody does here, is an error and not an odd argument.
func TestExecIsNoShell(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"cat | wc -l", "cat > out", "cat 2>/dev/null", "true && false", "sleep 1 ;", "cat < file", "cat &"} {
		if _, err := New(command, proc.Settings{}, notify.Setup{}); err == nil || !strings.Contains(err.Error(), "no shell") {
			t.Errorf("%s: %v", command, err)
		}
	}
	if _, err := New(`cat a>b -x=1&2 ""`, proc.Settings{}, notify.Setup{}); err != nil { // words of their own are fine
		t.Errorf("%v", err)
	}
}

func TestExecOfAScriptFromWindows(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "script")
	if err := testkit.WriteProgram(path, "#!/bin/sh\r\necho hello\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := New(path, proc.Settings{}, notify.Setup{}); err == nil || !strings.Contains(err.Error(), "CR LF") || !strings.Contains(err.Error(), "sed -i") {
		t.Errorf("%v", err)
	}
}
