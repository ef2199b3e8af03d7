package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The tests of copying the project.

// traces are what a copy must not have when a feature is left out.
var traces = map[string]string{
	"outbox":   `(?i)outbox`,
	"check":    `-check\b`,
	"execcmd":  `exec:|execcmd`,
	"pipe":     `pipe:|` + "`pipe`" + `|"pipe"|_pipe_|of a pipe`,
	"webhook":  `(?i)webhook|https?://\.\.\.`,
	"health":   `(?i)\bhealth|readyz|livez|metrics|HTTP_ADDR`,
	"page":     `status page|internal/page|page\.md`,
	"schedule": `(?i)\bschedule|crontab`,
	"sdnotify": `(?i)systemd|sdnotify`,
}

// variants are what to leave out, by name.
func variants() map[string][]string {
	all := map[string][]string{"nothing": nil}
	for name := range traces {
		all[name] = []string{name}
		all["everything"] = append(all["everything"], name)
	}
	return all
}

// newCopy copies the project as make new does.
func newCopy(t *testing.T, without []string) (dir string) {
	t.Helper()
	if _, err := exec.Command("git", "rev-parse", "--git-dir").Output(); err != nil {
		testkit.Skip(t, "needs a git checkout: "+err.Error())
	}
	dir = filepath.Join(t.TempDir(), "copy")
	out, err := exec.Command("go", append([]string{"run", "./internal/template", "example.com/acme/notifier", dir}, without...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

// in runs a command in a copy and returns what it prints.
func in(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestNewLeavesNoTrace makes copies without each feature, and without all: they build, pass vet and gofmt, name
// nothing that is not there, and what can be tested in them without a server passes.
func TestNewLeavesNoTrace(t *testing.T) {
	t.Parallel()
	for title, without := range variants() {
		t.Run(title, func(t *testing.T) {
			t.Parallel()
			dir := newCopy(t, without)
			in(t, dir, "go", "vet", "./...")
			if unformatted := in(t, dir, "gofmt", "-l", "."); unformatted != "" {
				t.Errorf("not formatted: %s", unformatted)
			}
			texts := map[string]string{"-h": in(t, dir, "go", "run", ".", "-h")}
			for _, pattern := range []string{"README.md", ".env.example", "docs/*.md", "main.go", "handler.go", "features.go", "config.go"} {
				paths, _ := filepath.Glob(filepath.Join(dir, pattern))
				for _, path := range paths {
					name, _ := filepath.Rel(dir, path)
					texts[name] = testkit.ReadFile(t, path)
				}
			}
			if len(texts) < 8 {
				t.Errorf("only %d texts found", len(texts))
			}
			for name, text := range texts {
				if strings.HasSuffix(name, ".go") {
					text = regexp.MustCompile(`(?m)^\s*//.*$`).ReplaceAllString(text, "") // comments may speak of what could be
				}
				if strings.Contains(text, "pglistener/pglistener/internal") {
					t.Errorf("%s has the name of the old module", name)
				}
				for _, feature := range without {
					if found := regexp.MustCompile(".*(?:"+traces[feature]+").*").FindAllString(text, -1); len(found) > 0 {
						t.Errorf("%s has traces of %s:\n%s", name, feature, strings.Join(found, "\n"))
					}
				}
			}
			for _, feature := range without {
				if _, err := os.Stat(filepath.Join(dir, "internal", feature)); err == nil {
					t.Errorf("internal/%s is still there", feature)
				}
			}
			if _, err := os.Stat(filepath.Join(dir, "internal/proc")); (err != nil) != (slices.Contains(without, "execcmd") && slices.Contains(without, "pipe")) {
				t.Errorf("programs are started by exec and pipe, and internal/proc: %v", err)
			}
			in(t, dir, "go", "test", "-run", "^("+strings.Join(withoutServer, "|")+")$", ".")
			in(t, dir, "go", "test", "./internal/queue", "./internal/retry", "./internal/call", "./internal/probe")
			if !slices.Contains(without, "webhook") {
				in(t, dir, "go", "test", "./internal/webhook")
			}
		})
	}
}

// withoutServer are tests of the root that start no server.
var withoutServer = []string{"TestAppend", "TestAllConfigurationProblemsAtOnce", "TestGoodConnectionStrings", "TestHelpAndVersion",
	"TestVariablesAreDocumented", "TestEnvExampleIsReadAlikeByAll", "TestPromisesAreTested", "TestLinksLeadSomewhere", "TestDependenciesRunOneWay", "TestSizes"}

// suites are the copies whose whole suites are run: each feature is left out of one of them, with another that it does not lean on,
// and all of one. The suite of the project itself is that of the copy that leaves out nothing.
var suites = [][]string{{"outbox"}, {"check", "page"}, {"execcmd", "schedule"}, {"pipe", "sdnotify"}, {"webhook", "health"}, variants()["everything"]}

// TestCopiesPassTheirTests runs the whole suites of copies. It is heavy: make test-extra asks for it.
func TestCopiesPassTheirTests(t *testing.T) {
	if os.Getenv("TEST_EXTRA") == "" {
		t.Skip("make test-extra runs it")
	}
	for feature := range traces {
		if !slices.ContainsFunc(suites[:len(suites)-1], func(without []string) bool { return slices.Contains(without, feature) }) {
			t.Errorf("no suite is run without %s", feature)
		}
	}
	for _, without := range suites {
		t.Run(strings.Join(without, "+"), func(t *testing.T) { // one after another, for their tests have bounds
			dir := newCopy(t, without)
			// A checkout of its own, as a team would make, with the tools; its tests do not make copies of copies.
			in(t, dir, "git", "init", "-q")
			in(t, dir, "git", "add", "-A")
			promtool, err := filepath.Abs("bin/promtool")
			if err == nil {
				err = errors.Join(os.MkdirAll(filepath.Join(dir, "bin"), 0o755), os.Symlink(promtool, filepath.Join(dir, "bin/promtool")))
			}
			if err != nil {
				t.Fatal(err)
			}
			suite := []string{"-u", "TEST_EXTRA", "go", "test", "-skip", "^(TestNewLeavesNoTrace|TestCopiesPassTheirTests|TestReadmeCommands)$", "./..."}
			cmd := exec.CommandContext(t.Context(), "env", suite...)
			if cmd.Dir = dir; cmd.Run() != nil {
				// A machine that runs suites for half an hour misses a bound now and then. What has passed is not run again.
				t.Log("what has failed is run once more")
				in(t, dir, "env", suite...)
			}
		})
	}
}

func TestNewRefusesWhatCannotBeMeant(t *testing.T) {
	t.Parallel()
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tool := filepath.Join(t.TempDir(), "template")
	in(t, ".", "go", "build", "-o", tool, "./internal/template")
	for want, args := range map[string][]string{
		`WITHOUT: "outbocks" is not a feature; there are `: {"example.com/x", filepath.Join(t.TempDir(), "new"), "outbocks"},
		`is not empty`:                     {"example.com/x", full},
		`MODULE: "two words" is not a mod`: {"two words", filepath.Join(t.TempDir(), "new")},
		`usage: make new MODULE=`:          {"", ""},
	} {
		out, err := exec.Command(tool, args...).CombinedOutput()
		if err == nil || !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q: %v %s", args, err, out)
		}
	}
}

// TestOnlyTheCore copies the core into an empty module, with the main of README, and kills its session under
// it.
func TestOnlyTheCore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, modulePath, "example.com/core")), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_, rest, _ := strings.Cut(testkit.ReadFile(t, "README.md"), "```go\npackage main\n")
	main, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("README has no main")
	}
	body := main[strings.Index(main, "func main()"):]
	if n := strings.Count(body, "\n"); n > 30 {
		t.Errorf("README's main has %d lines", n)
	}
	write("main.go", "package main\n"+main)
	for _, path := range []string{"listener.go", "status.go", "shutdown.go", "go.sum"} {
		write(path, testkit.ReadFile(t, path))
	}
	for _, inner := range core[1:] {
		files, _ := filepath.Glob(inner + "/*.go")
		for _, path := range files {
			if !strings.HasSuffix(path, "_test.go") {
				write(path, testkit.ReadFile(t, path))
			}
		}
	}
	var pq string
	for line := range strings.Lines(testkit.ReadFile(t, "go.mod")) {
		if strings.Contains(line, "lib/pq") {
			pq = strings.TrimSpace(line)
		}
	}
	write("go.mod", "module example.com/core\n\ngo 1.25.0\n\nrequire "+pq+"\n")
	in(t, dir, "go", "vet", "./...")
	in(t, dir, "go", "build", "-o", "core", ".")

	application := testkit.ChannelName(t)
	cmd := exec.Command(filepath.Join(dir, "core"))
	cmd.Env = append(os.Environ(), "DATABASE_URL="+testkit.WithParams(testkit.DSN(t), "application_name", application))
	p := &process{Logs: testkit.NewLogs(t), cmd: cmd, exited: make(chan error, 1)}
	p.start(t)
	hears := func(payload string) {
		t.Helper()
		testkit.Eventually(t, "it does not hear "+payload, func() bool {
			testkit.Send(t, "orders", payload)
			return strings.Contains(p.String(), payload+"\n")
		})
	}
	hears("core-before")
	for _, pid := range testkit.Backends(t, testkit.DB(t), application) {
		testkit.Exec(t, testkit.DB(t), "select pg_terminate_backend($1)", pid)
	}
	testkit.Eventually(t, "no word of the kill", func() bool { return strings.Contains(p.String(), "reconnected") })
	hears("core-after")
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
}
