package main

import (
	"io/fs"
	"maps"
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
	"github.com/pglistener/pglistener/internal/env"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// documents are all texts for people, by path.
func documents(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, path := range append(paths, "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "DESIGN.md") {
		all[path] = testkit.ReadFile(t, path)
	}
	return all
}

// testFiles are the texts of all tests.
func testFiles(t *testing.T) string {
	t.Helper()
	var code strings.Builder
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, "_test.go") {
			code.WriteString(testkit.ReadFile(t, path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return code.String()
}

// TestPromisesAreTested: each promise is held by a test of that name.
func TestPromisesAreTested(t *testing.T) {
	t.Parallel()
	code, found := testFiles(t), 0
	for path, text := range documents(t) {
		for _, name := range regexp.MustCompile("`(Test[A-Za-z0-9_]+)`").FindAllStringSubmatch(text, -1) {
			found++
			if !strings.Contains(code, "func "+name[1]+"(t *testing.T)") {
				t.Errorf("%s names %s, which is not there", path, name[1])
			}
		}
	}
	if found < 20 {
		t.Errorf("only %d promises found", found)
	}
}

// TestReadmeIsShort: who has ten minutes reads it to the end.
func TestReadmeIsShort(t *testing.T) {
	if n := len(strings.Fields(testkit.ReadFile(t, "README.md"))); n > 1800 {
		t.Errorf("README has %d words", n)
	}
}

// TestLinksLeadSomewhere follows the links within the project.
func TestLinksLeadSomewhere(t *testing.T) {
	t.Parallel()
	for path, text := range documents(t) {
		for _, m := range regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`).FindAllStringSubmatch(text, -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), m[1])); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
}

// TestReadmeCommands: every command in the documents is run here or in CI.
func TestReadmeCommands(t *testing.T) {
	t.Parallel()
	ci := testkit.ReadFile(t, ".ci/run") + testkit.ReadFile(t, ".github/workflows/test.yml")
	dir := t.TempDir()
	sh := func(t *testing.T, line string, env ...string) *process {
		t.Helper()
		p := &process{Logs: testkit.NewLogs(t), cmd: exec.Command("sh", "-c", "exec "+line), exited: make(chan error, 1)}
		p.cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(program(t))+":"+os.Getenv("PATH"), "DATABASE_URL="+testkit.DSN(t), "LOG_FORMAT=json")
		p.cmd.Env = append(p.cmd.Env, env...)
		return p.start(t)
	}
	// begin: outbox
	onOutbox := func(t *testing.T, line string) {
		sh(t, line, "OUTBOX_TABLE="+outboxTable(t, testkit.DB(t))).exit(t, 0, testkit.Patience)
	}
	// end: outbox
	here := map[string]func(*testing.T, string){
		"go build -o pglistener .": func(t *testing.T, line string) {
			sh(t, strings.Replace(line, "-o pglistener", "-o "+filepath.Join(dir, "pglistener"), 1)).exit(t, 0, time.Minute)
		},
		"CHANNELS=orders DATABASE_URL='postgres://user:password@host/database' ./pglistener": func(t *testing.T, line string) {
			line = strings.Replace(line, "postgres://user:password@host/database", testkit.DSN(t), 1)
			p := sh(t, "env "+strings.Replace(line, "./pglistener", program(t), 1))
			p.Wait(t, "listening", 1)
			p.signal(t, syscall.SIGTERM)
			p.exit(t, cli.OK, stopBound)
		},
		// begin: outbox
		`pglistener -outbox-schema | psql "$DATABASE_URL"`: func(t *testing.T, line string) {
			sh(t, "sh -c '"+line+"'", "OUTBOX_TABLE="+outboxTable(t, testkit.DB(t))).exit(t, 0, testkit.Patience)
		},
		`pglistener -trigger orders | psql -v ON_ERROR_STOP=1 "$DATABASE_URL"`: func(t *testing.T, line string) {
			schema := testkit.ChannelName(t)
			testkit.Exec(t, testkit.DB(t), "create schema "+schema+"; create table "+schema+".orders (id int primary key)")
			t.Cleanup(func() { _, _ = testkit.DB(t).Exec("drop schema " + schema + " cascade") })
			p := sh(t, "sh -c '"+line+"'", "OUTBOX_TABLE="+outboxTable(t, testkit.DB(t)), "PGOPTIONS=-c search_path="+schema+",public")
			p.exit(t, 0, testkit.Patience)
			if !strings.Contains(p.String(), "DO") || strings.Contains(p.String(), "ERROR") {
				t.Error(p.String())
			}
		},
		"pglistener -outbox-list failed":  onOutbox,
		"pglistener -outbox-retry orders": onOutbox,
		"pglistener -outbox-purge -n all": onOutbox,
		// end: outbox
	}
	var blocks [][]string
	for _, text := range documents(t) {
		blocks = append(blocks, regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(text, -1)...)
	}
	ran := map[string]bool{}
	for _, block := range blocks {
		for line := range strings.Lines(block[1]) {
			line, _, _ = strings.Cut(strings.TrimSpace(line), "   #")
			if run := here[line]; run != nil {
				ran[line] = true
				run(t, line)
			} else if !strings.Contains(ci, line) {
				t.Errorf("nobody runs %q", line)
			}
		}
	}
	if len(ran) != len(here) {
		t.Errorf("only these commands are in the documents: %v", slices.Sorted(maps.Keys(ran)))
	}
}

// TestVariablesAreDocumented compares docs/settings.md and .env.example with the structs, both ways.
func TestVariablesAreDocumented(t *testing.T) {
	settings, example := testkit.ReadFile(t, "docs/settings.md"), testkit.ReadFile(t, ".env.example")
	documented := regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\|").FindAllStringSubmatch(settings, -1)
	exampled := regexp.MustCompile("(?m)^#?([A-Z_]+)=").FindAllStringSubmatch(example, -1)
	known, files := map[string]bool{}, 0
	for _, v := range env.Variables(&Config{}) {
		known[v.Name] = true
		row := "| `" + v.Name + "` | " + v.Default + " | " + v.Usage + " |"
		if v.Default == "" {
			row = "| `" + v.Name + "` | | " + v.Usage + " |"
		}
		if !strings.Contains(settings, row) {
			t.Errorf("docs/settings.md lacks the row\n%s", row)
		}
		entry := "# " + v.Usage + "\n#" + v.Name + "=" + v.Default + "\n"
		if strings.HasPrefix(v.Usage, "required") || v.Name == "DATABASE_URL" {
			entry = "# " + v.Usage + "\n" + v.Name + "=" // live, with an example for a value
		}
		if !strings.Contains(example, entry) {
			t.Errorf(".env.example lacks\n%s", entry)
		}
		if v.File {
			known[v.Name+"_FILE"] = true
			files++
			if !strings.Contains(settings, "`"+v.Name+"_FILE`") || !strings.Contains(example, "#"+v.Name+"_FILE=") {
				t.Errorf("%s_FILE is not documented", v.Name)
			}
		}
	}
	for _, name := range append(documented, exampled...) {
		if !known[name[1]] {
			t.Errorf("%s is documented and does not exist", name[1])
		}
	}
	if len(exampled) != len(known) || len(documented) != len(known)-files {
		t.Errorf("%d variables, %d in docs/settings.md, %d in .env.example", len(known), len(documented), len(exampled))
	}
}

// TestEnvExampleIsReadAlikeByAll: a shell, systemd and docker differ in how they read quotes and blanks, so
// there must be none; and what it sets must be valid.
func TestEnvExampleIsReadAlikeByAll(t *testing.T) {
	v := vars{}
	for line := range strings.Lines(testkit.ReadFile(t, ".env.example")) {
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
	if _, problems := loadConfig(v.lookup, addHandlers(handlerTable()), modes()); len(problems) > 0 {
		t.Error(problems)
	}
}
