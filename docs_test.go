package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestReadmeNamesTestsThatExist keeps the promises: each is held by a test of that name.
func TestReadmeNamesTestsThatExist(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var code strings.Builder
	for _, f := range files {
		code.WriteString(readFile(t, f))
	}
	names := regexp.MustCompile("`(Test[A-Za-z0-9]+)`").FindAllStringSubmatch(readFile(t, "README.md"), -1)
	if len(names) < 20 {
		t.Errorf("only %d promises found", len(names))
	}
	for _, name := range names {
		if !strings.Contains(code.String(), "func "+name[1]+"(t *testing.T)") {
			t.Errorf("README promises %s, which is not there", name[1])
		}
	}
}

// TestReadmePicture runs what the README shows at its top and compares, numbers aside.
func TestReadmePicture(t *testing.T) {
	t.Parallel()
	_, rest, _ := strings.Cut(readFile(t, "README.md"), "```console\n")
	picture, _, found := strings.Cut(rest, "```\n")
	if !found {
		t.Fatal("README has no picture")
	}
	dir := t.TempDir()
	drain := "#!/bin/sh\necho 3 jobs done\n"
	if err := os.WriteFile(filepath.Join(dir, "drain"), []byte(drain), 0o755); err != nil {
		t.Fatal(err)
	}
	// The picture's channels have plain names, which other tests must not use.
	dsn := withParams(sharedDSN, "application_name", channelName(t))
	p := runProgramIn(t, dir, vars{"CHANNELS": "orders,jobs=doorbell:exec:./drain", "DATABASE_URL": dsn})
	segment := func(what string, n int) string {
		t.Helper()
		eventually(t, "no "+what, func() bool { return strings.Count(p.String(), what) >= n })
		return p.String()
	}
	segment("delivery proven", 1)
	first := segment("jobs done", 1)
	execSQL(t, sharedDB, `notify orders, '{"id": 1}'; notify jobs`)
	segment("payload=", 1)
	second := segment("jobs done", 2)
	for _, pid := range backends(t, sharedDB, channelName(t)) {
		execSQL(t, sharedDB, "select pg_terminate_backend($1)", pid)
	}
	segment("delivery proven", 2)
	third := segment("jobs done", 3)

	segments := strings.Split(picture, "\n-- ")
	for i, text := range []string{first, strings.TrimPrefix(second, first), strings.TrimPrefix(third, second)} {
		_, shown, _ := strings.Cut(segments[i], "\n") // after the command, or the remark
		if got, want := anonymous(text), anonymous(shown); !slices.Equal(got, want) {
			t.Errorf("part %d: it prints\n%s\nREADME shows\n%s", i+1, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// anonymous are the lines of a log, sorted, without times and with N for every number.
func anonymous(text string) []string {
	version := regexp.MustCompile(`version="[^"]*"`)
	when := regexp.MustCompile(`(time=\S+ )|([0-9]{4}-[0-9-]+T[0-9:.]+(Z|[+-][0-9:]+))`)
	number := regexp.MustCompile(`[0-9]+(\.[0-9]+)*(:[0-9]+)?(h|ms|µs|m[0-9]|s)?\b`)
	var out []string
	for line := range strings.Lines(text) {
		line = when.ReplaceAllString(strings.TrimSpace(line), "")
		line = number.ReplaceAllString(version.ReplaceAllString(line, "version"), "N")
		if line != "" {
			out = append(out, line)
		}
	}
	slices.Sort(out)
	return out
}

// TestReadmeCommands: every command in README is run here or in CI.
func TestReadmeCommands(t *testing.T) {
	t.Parallel()
	ci := readFile(t, ".ci/run") + readFile(t, ".github/workflows/test.yml")
	dir := t.TempDir()
	table := outboxTable(t, sharedDB)
	sh := func(t *testing.T, line string) *process {
		t.Helper()
		p := &process{logs: newLogs(t), cmd: exec.Command("sh", "-c", "exec "+line), exited: make(chan error, 1)}
		p.cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"), "DATABASE_URL="+sharedDSN, "OUTBOX_TABLE="+table, "LOG_FORMAT=json")
		return p.start(t)
	}
	here := map[string]func(*testing.T, string){
		"go build -o pglistener .": func(t *testing.T, line string) {
			sh(t, strings.Replace(line, "-o pglistener", "-o "+filepath.Join(dir, "pglistener"), 1)).exit(t, 0, time.Minute)
		},
		"CHANNELS=orders DATABASE_URL='postgres://user:password@host/database' ./pglistener": func(t *testing.T, line string) {
			line = strings.Replace(line, "postgres://user:password@host/database", sharedDSN, 1)
			p := sh(t, "env "+strings.Replace(line, "./pglistener", program, 1))
			p.wait(t, "listening", 1)
			p.signal(t, syscall.SIGTERM)
			p.exit(t, exitOK, stopBound)
		},
		`pglistener -outbox-schema | psql "$DATABASE_URL"`: func(t *testing.T, line string) {
			sh(t, "sh -c '"+line+"'").exit(t, 0, patience)
		},
	}
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(readFile(t, "README.md"), -1)
	ran := 0
	for _, block := range blocks {
		for line := range strings.Lines(block[1]) {
			line, _, _ = strings.Cut(strings.TrimSpace(line), "   #")
			if run := here[line]; run != nil {
				ran++
				run(t, line)
			} else if !strings.Contains(ci, line) {
				t.Errorf("nobody runs %q", line)
			}
		}
	}
	if ran != len(here) {
		t.Errorf("%d of %d commands are in README", ran, len(here))
	}
}

// TestVariablesAreDocumented compares README and .env.example with the Config struct.
func TestVariablesAreDocumented(t *testing.T) {
	readme, example := readFile(t, "README.md"), readFile(t, ".env.example")
	documented := regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\|").FindAllStringSubmatch(readme, -1)
	exampled := regexp.MustCompile("(?m)^#?([A-Z_]+)=").FindAllStringSubmatch(example, -1)
	known, files := map[string]bool{}, 0
	for f := range variables() {
		name, value := variable(f)
		usage := f.Tag.Get("usage")
		known[name] = true
		row := "| `" + name + "` | " + value + " | " + usage + " |"
		if value == "" {
			row = "| `" + name + "` | | " + usage + " |"
		}
		if !strings.Contains(readme, row) {
			t.Errorf("README lacks the row\n%s", row)
		}
		entry := "# " + usage + "\n#" + name + "=" + value + "\n"
		if strings.HasPrefix(usage, "required") || name == "DATABASE_URL" {
			entry = "# " + usage + "\n" + name + "=" // live, with an example for a value
		}
		if !strings.Contains(example, entry) {
			t.Errorf(".env.example lacks\n%s", entry)
		}
		if f.Tag.Get("file") != "" {
			known[name+"_FILE"] = true
			files++
			if !strings.Contains(readme, "`"+name+"_FILE`") || !strings.Contains(example, "#"+name+"_FILE=") {
				t.Errorf("%s_FILE is not documented", name)
			}
		}
	}
	for _, name := range append(documented, exampled...) {
		if !known[name[1]] {
			t.Errorf("%s is documented and does not exist", name[1])
		}
	}
	if len(exampled) != len(known) || len(documented) != len(known)-files {
		t.Errorf("%d variables, %d in README, %d in .env.example", len(known), len(documented), len(exampled))
	}
}

// TestEnvExampleIsReadAlikeByAll: a shell, systemd and docker differ in how they read
// quotes and blanks, so there must be none; and what it sets must be valid.
func TestEnvExampleIsReadAlikeByAll(t *testing.T) {
	v := vars{}
	for line := range strings.Lines(readFile(t, ".env.example")) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || strings.HasPrefix(line, "# ") {
			continue
		}
		name, value, _ := strings.Cut(strings.TrimPrefix(line, "#"), "=")
		if strings.ContainsAny(value, " \t'\"$`\\;&|<>()") {
			t.Errorf("%s: not all read %q alike", name, value)
		}
		if !strings.HasPrefix(line, "#") {
			v[name] = value
		}
	}
	if _, problems := loadConfig(v.lookup, allHandlers()); len(problems) > 0 {
		t.Error(problems)
	}
}

// TestMetricsAreDocumented compares README with /metrics, both ways.
func TestMetricsAreDocumented(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	r := start(t, fast(sharedDSN, channel+"=outbox:log", sending(outboxTable(t, sharedDB))), withOutbox("x", nil)).listening(t)
	served := map[string]bool{}
	help := regexp.MustCompile(`(?m)^# HELP (\S+) (.*)\n# TYPE \S+ (\S+)$`)
	for _, m := range help.FindAllStringSubmatch(string(r.listener.metrics()), -1) {
		served["| `"+m[1]+"` | "+m[3]+" | "+m[2]+" |"] = true
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `pglistener_.*\\|$").FindAllString(readFile(t, "README.md"), -1) {
		documented[m] = true
	}
	for row := range served {
		if !documented[row] {
			t.Errorf("README lacks the row\n%s", row)
		}
	}
	for row := range documented {
		if !served[row] {
			t.Errorf("/metrics does not have\n%s", row)
		}
	}
	if len(served) < 10 {
		t.Errorf("only %d metrics found", len(served))
	}
}
