package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/env"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// problemsOf runs the program's run with an environment that cannot work and returns what it prints.
func problemsOf(t *testing.T, v vars) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	if code := run(ctx, nil, cli.Env{Lookup: v.lookup, Stdout: &stdout, Stderr: &stderr}); code != cli.Usage {
		t.Errorf("exit code %d, want %d", code, cli.Usage)
	}
	if stdout.Len() > 0 {
		t.Errorf("printed to stdout: %s", stdout.String())
	}
	return stderr.String()
}

func TestAllConfigurationProblemsAtOnce(t *testing.T) {
	t.Parallel()
	const dsn = "postgres://localhost/x"
	dir := t.TempDir()
	notExecutable := filepath.Join(dir, "plain")
	if err := os.WriteFile(notExecutable, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 64)
	for name, c := range map[string]struct {
		vars vars
		want []string // one line each, in any order
	}{
		"nothing set": {vars{}, []string{"DATABASE_URL: not set", "CHANNELS: not set"}},
		"empty is unset": {vars{"DATABASE_URL": "", "CHANNELS": "", "PING_INTERVAL": ""},
			[]string{"DATABASE_URL: not set", "CHANNELS: not set"}},
		"channels": {vars{"DATABASE_URL": dsn, "CHANNELS": "a,,a," + long + ",b=nope,c=doorbell:nope,d=,e=doorbell:,f=append:"},
			[]string{"CHANNELS: entry 2 has no", `CHANNELS: channel "a" is listed twice`, "CHANNELS: the channel of entry 4 has 64 bytes", `CHANNELS: channel "b" has neither a mode`,
				`CHANNELS: channel "c" has neither a mode`, `CHANNELS: channel "d" has no handler`, `CHANNELS: channel "e" has no handler`, `CHANNELS: channel "f": append needs`}},
		// begin: execcmd
		"programs": {vars{"DATABASE_URL": dsn, "CHANNELS": "z=exec:,a=exec:/does/not/exist,b=exec:not-in-path,c=exec:" + notExecutable + ",d=exec:" + dir + ",e=exec:PASSWORD=hunter2 cat"},
			[]string{`CHANNELS: channel "z": exec needs`, `CHANNELS: channel "a": program "/does/not/exist" does not exist`, `CHANNELS: channel "b": program "not-in-path" is not in PATH`,
				`CHANNELS: channel "c": program "` + notExecutable + `" may not be executed`, `CHANNELS: channel "d": program "` + dir, `CHANNELS: channel "e": the command begins with a variable`}},
		"what is never passed": {vars{"DATABASE_URL": dsn, "CHANNELS": "a,b", "ENV_PASS": "HOME, CHANNELS", "A_ENV_PASS": "KEY=hunter2", "B_ENV_PASS": "MY_HANDLERS,PATH"},
			[]string{"ENV_PASS: entry 2 is never passed", "A_ENV_PASS: entry 1 is never passed"}},
		// end: execcmd
		"numbers": {vars{"DATABASE_URL": dsn, "CHANNELS": "a", "PING_INTERVAL": "10", "PING_TIMEOUT": "0s", "RECONNECT_MIN": "5s", "RECONNECT_MAX": "1s",
			"QUEUE_SIZE": "0", "CONCURRENCY": "many", "HANDLER_ATTEMPTS": "-1", "CATCH_UP_INTERVAL": "-1s", "OVERFLOW": "lose", "QUEUE_MEMORY": "64", "LOG_LEVEL": "loud", "LOG_FORMAT": "xml"},
			[]string{`PING_INTERVAL: "10" is not a duration`, "PING_TIMEOUT: 0s is not positive", "RECONNECT_MIN: 5s is more than RECONNECT_MAX",
				"QUEUE_SIZE: 0 is not from 1 to", `CONCURRENCY: "many" is not a whole number`, "HANDLER_ATTEMPTS: -1 is not from 1 to", "CATCH_UP_INTERVAL: -1s",
				`OVERFLOW: "lose"`, `QUEUE_MEMORY: "64" is not a size such as`, `LOG_LEVEL: "loud"`, `LOG_FORMAT: "xml"`}},
		"little memory":        {vars{"DATABASE_URL": dsn, "CHANNELS": "a", "QUEUE_MEMORY": "1000KB"}, []string{"QUEUE_MEMORY: it is less than 1MB"}},
		"files":                {vars{"DATABASE_URL_FILE": "/does/not/exist", "CHANNELS": "a"}, []string{"DATABASE_URL_FILE: open /does/not/exist"}},
		"both":                 {vars{"DATABASE_URL": dsn, "DATABASE_URL_FILE": "/x", "CHANNELS": "a"}, []string{"DATABASE_URL_FILE: DATABASE_URL is set too"}},
		"no file to append to": {vars{"DATABASE_URL": dsn, "CHANNELS": "a=append:" + dir}, []string{`CHANNELS: channel "a": open ` + dir}},
		"no file's content": {vars{"DATABASE_URL_FILE": notExecutable, "CHANNELS": "a"},
			[]string{"DATABASE_URL_FILE: "}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := problemsOf(t, c.vars)
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if len(lines) != len(c.want) || strings.Contains(out, "hunter2") {
				t.Errorf("%d lines, want %d, without a secret", len(lines), len(c.want))
			}
			for _, want := range c.want {
				if !strings.Contains(out, "pglistener: "+want) {
					t.Errorf("no line begins with %q", want)
				}
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

// malformed are connection strings that hold "hunter2" where a mistake exposes it.
var malformed = map[string]string{
	"bad escape":         "postgres://u:hunter2%zz@localhost/db",
	"slash in password":  "postgres://u:12/hunter2@localhost/db",
	"hash in password":   "postgres://u:12#hunter2@localhost/db",
	"query in password":  "postgres://u:12?hunter2@localhost/db",
	"bad port":           "postgres://u:x@localhost:hunter2/db",
	"blank in key=value": "host=localhost password=my hunter2 word",
	"open quote":         "host=localhost password='hunter2",
	"other scheme":       "mysql://u:hunter2@localhost/db?sslmode=disable",
	"slash, no port":     "postgres://u:hunter2/x@localhost/db",
}

func TestPasswordIsNeverShown(t *testing.T) {
	t.Parallel()
	for name, dsn := range malformed {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := problemsOf(t, vars{"DATABASE_URL": dsn, "CHANNELS": "a"})
			if strings.Contains(out, "hunter2") {
				t.Errorf("the password is shown: %s", out)
			}
			if !strings.Contains(out, "DATABASE_URL: not a valid connection string") || !strings.Contains(out, "percent-encoded") {
				t.Errorf("no help: %s", out)
			}
		})
	}
	t.Run("while running", func(t *testing.T) {
		t.Parallel()
		channel := testkit.ChannelName(t)
		dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
		dsn = strings.Replace(dsn, "@", ":hunter2@", 1)
		r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
		proxy.Refuse(true)
		proxy.Reset()
		r.Wait(t, "connection attempt failed", 2)
		r.stop()
		if strings.Contains(r.String(), "hunter2") {
			t.Error("the password is in the log")
		}
	})
}

func TestGoodConnectionStrings(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{
		"postgres://u:p%40ss%2F%23@localhost/db",
		"postgres://u@h1,h2/db?port=5432,5433&target_session_attrs=read-write",
		"postgresql:///db?host=/var/run/postgresql",
		"host=/tmp dbname=x password='with blank'",
		"host=localhost search_path=app",
		"postgres://localhost/db?user=me%40tenant&options=-csearch_path%3Dapp",
	} {
		cfg, problems := loadConfig(vars{"DATABASE_URL": dsn, "CHANNELS": "a"}.lookup, addHandlers(handlerTable()), modes())
		if len(problems) > 0 {
			t.Errorf("%s: %v", dsn, problems)
			continue
		}
		if _, err := env.CheckDSN(cfg.dsn(), vars{}.lookup); err != nil {
			t.Errorf("%s: with the application name: %v", dsn, err)
		}
	}
}

func TestValueFromFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "url")
	if err := os.WriteFile(path, []byte(testkit.DSN(t)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	channel := testkit.ChannelName(t)
	v := fast("", channel+"=test", vars{"DATABASE_URL_FILE": path})
	r := start(t, v, nil).listening(t)
	testkit.Send(t, channel, "hello")
	r.expect(t, "hello")
}

func TestApplicationName(t *testing.T) {
	t.Parallel()
	for application, dsn := range map[string]string{
		"pglistener":   testkit.DSN(t),
		"chosen by me": testkit.WithParams(testkit.DSN(t), "application_name", "chosen by me"),
	} {
		channel := testkit.ChannelName(t) + application
		start(t, fast(dsn, channel+"=test"), nil).listening(t)
		if len(testkit.Backends(t, testkit.DB(t), application)) == 0 {
			t.Errorf("no session is named %q", application)
		}
	}
}

// TestServiceFileBreaks: lib/pq reads it at each attempt, and its error quotes the line.
func TestServiceFileBreaks(t *testing.T) {
	t.Parallel()
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "services")
	write := func(line string) {
		t.Helper()
		text := fmt.Sprintf("[mine]\nhost=%s\nport=%s\nuser=%s\ndbname=%s\nsslmode=disable\n%s\n",
			u.Hostname(), u.Port(), u.User.Username(), strings.Trim(u.Path, "/"), line)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	p := runProgram(t, fast("", testkit.ChannelName(t), vars{"PGSERVICE": "mine", "PGSERVICEFILE": path}))
	p.Wait(t, "delivery proven", 1)
	write("password hunter2")
	proxy.Reset()
	began := time.Now()
	// The first, second, fourth, eighth and sixteenth are told. RECONNECT_MIN and RECONNECT_MAX keep them more than a second apart.
	last := p.Wait(t, "connection attempt failed", 5)
	if took := time.Since(began); took < time.Second || last["attempt"] != 16.0 || !strings.HasPrefix(last["error"].(string), "the service file cannot be read") {
		t.Errorf("after %v: %v", took, last)
	}
	write("password=hunter2")
	p.Wait(t, "reconnected", 1)
	// It also breaks while attempts fail for another reason.
	told := len(p.All("connection attempt failed"))
	proxy.Refuse(true)
	proxy.Reset()
	p.Wait(t, "connection attempt failed", told+1)
	write("password hunter2")
	testkit.Eventually(t, "it does not say so again", func() bool {
		all := p.All("connection attempt failed")
		return strings.HasPrefix(all[len(all)-1]["error"].(string), "the service file cannot be read")
	})
	proxy.Refuse(false)
	write("password=hunter2")
	p.Wait(t, "reconnected", 2)
	if strings.Contains(p.String(), "hunter2") {
		t.Errorf("the password is in the log: %s", p)
	}
}

// TestLogThatWritesNothingIsWarnedOf: its lines are the work.
func TestLogThatWritesNothingIsWarnedOf(t *testing.T) {
	t.Parallel()
	for level, want := range map[string]int{"debug": 0, "info": 0, "warn": 1, "error": 1} {
		cfg, problems := loadConfig(vars{"DATABASE_URL": "postgres://localhost/x", "CHANNELS": "a,b=append:/dev/null", "LOG_LEVEL": level}.lookup,
			addHandlers(handlerTable()), modes())
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		warnings := cfg.warnings(nil)
		if len(warnings) != want || want > 0 && !strings.HasPrefix(warnings[0], "LOG_LEVEL: it is "+level+", at which the handler log of channel \"a\" writes nothing") {
			t.Errorf("%s: %q", level, warnings)
		}
	}
}

func TestUpperCaseChannelIsWarnedOf(t *testing.T) {
	t.Parallel()
	out := runProgram(t, fast(testkit.DSN(t), "Orders"))
	line := out.Wait(t, "CHANNELS: ", 1)
	if line["level"] != "WARN" || !strings.Contains(line["msg"].(string), `"orders"`) {
		t.Errorf("%v", line)
	}
}

func TestHelpAndVersion(t *testing.T) {
	t.Parallel()
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"-h"}, cli.Env{Lookup: vars{}.lookup, Stdout: &stdout, Stderr: &stderr}); code != cli.OK {
		t.Errorf("-h: exit code %d: %s", code, stderr.String())
	}
	for _, v := range env.Variables(&Config{}) {
		name, value := v.Name, v.Default
		found := false
		for line := range strings.Lines(stdout.String()) {
			fields := strings.Fields(line)
			if len(fields) > 0 && fields[0] == name {
				found = strings.Contains(line, value) && strings.Contains(line, v.Usage)
			}
		}
		if !found {
			t.Errorf("-h does not show %s with its default %q and its meaning", name, value)
		}
	}
	stdout.Reset()
	if code := run(t.Context(), []string{"-version"}, cli.Env{Lookup: vars{}.lookup, Stdout: &stdout, Stderr: &stderr}); code != cli.OK || !strings.HasPrefix(stdout.String(), "pglistener ") {
		t.Errorf("-version: exit code %d: %q", code, stdout.String())
	}
	if code := run(t.Context(), []string{"orders"}, cli.Env{Lookup: vars{}.lookup, Stdout: &stdout, Stderr: &stderr}); code != cli.Usage {
		t.Errorf("an argument: exit code %d", code)
	}
	if code := run(t.Context(), []string{"-nope"}, cli.Env{Lookup: vars{}.lookup, Stdout: &stdout, Stderr: &stderr}); code != cli.Usage {
		t.Errorf("an unknown flag: exit code %d", code)
	}
}

// What the outbox claims ahead is bounded by QUEUE_MEMORY too: each channel is given its share of the half that is divided.
func TestEachChannelHasItsShareOfTheMemory(t *testing.T) {
	t.Parallel()
	v := vars{"DATABASE_URL": "postgres://localhost/x", "CHANNELS": "a,b,c,d", "QUEUE_MEMORY": "64MB"}
	cfg, problems := loadConfig(v.lookup, addHandlers(handlerTable()), modes())
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	for _, r := range cfg.routes {
		if got := cfg.setup(r, slog.New(slog.DiscardHandler)).Memory; got != 8<<20 {
			t.Errorf("%s may hold %d bytes, want %d", r.Channel, got, 8<<20)
		}
	}
}

// The garbage collector is told what QUEUE_MEMORY allows, and to let the heap grow to five times what is in use. Both are of this
// process: they must be out of the other tests' way.
func TestMemoryLimitFollowsQueueMemory(t *testing.T) {
	t.Parallel()
	if os.Getenv("GOMEMLIMIT")+os.Getenv("GOGC") != "" {
		testkit.Skip(t, "GOMEMLIMIT or GOGC is set, and goes before")
	}
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	v := fast(testkit.DSN(t), testkit.ChannelName(t), vars{"QUEUE_MEMORY": "1000GB"})
	if code := run(ctx, nil, cli.Env{Lookup: v.lookup, Stdout: io.Discard, Stderr: io.Discard}); code != cli.OK {
		t.Errorf("exit code %d", code)
	}
	if got, want := debug.SetMemoryLimit(-1), int64(1000<<30+48<<20); got != want {
		t.Errorf("the limit is %d bytes, want %d", got, want)
	}
	if got := debug.SetGCPercent(400); got != 400 {
		t.Errorf("GOGC is %d", got)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add("10s", "5", "block", "postgres://u:p@h/d")
	f.Add("-1s", "x", "", "host=h password=secret")
	f.Add("1e9s", "99999999999999999999", "drop", "postgres://[::1")
	f.Fuzz(func(t *testing.T, duration, number, overflow, dsn string) {
		cfg, problems := loadConfig(vars{"DATABASE_URL": dsn, "CHANNELS": "a", "PING_INTERVAL": duration, "QUEUE_SIZE": number, "OVERFLOW": overflow}.lookup, addHandlers(handlerTable()), modes())
		if len(problems) == 0 && (cfg.Listener.PingInterval < time.Nanosecond || cfg.Channel.Queue.Size < 1) {
			t.Errorf("accepted %+v", cfg)
		}
		for _, p := range problems {
			if strings.Contains(p.Error(), "\n") {
				t.Errorf("not one line: %q", p)
			}
		}
	})
}
