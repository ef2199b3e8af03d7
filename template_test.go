package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The tests of copying the project: what can be left out, and what is deployed.

// features are what a team may not want, with their files.
var features = map[string][]string{
	"outbox":  {"outbox.go", "outbox_store.go", "outbox.sql"},
	"webhook": {"webhook.go"},
	"health":  {"health.go"},
}

// TestFeaturesCanBeDeleted deletes the files of each feature, and of all, with the lines of main.go
// that are marked with its name, in a copy of the tree, and builds what is left.
func TestFeaturesCanBeDeleted(t *testing.T) {
	t.Parallel()
	without := map[string][]string{"all": nil}
	for name := range features {
		without[name] = []string{name}
		without["all"] = append(without["all"], name)
	}
	for title, names := range without {
		t.Run(title, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			files, err := filepath.Glob("*")
			if err != nil {
				t.Fatal(err)
			}
			var gone []string
			for _, name := range names {
				gone = append(gone, features[name]...)
			}
			for _, f := range files {
				isCode := strings.HasSuffix(f, ".go") || strings.HasSuffix(f, ".sql") || strings.HasPrefix(f, "go.")
				if !isCode || strings.HasSuffix(f, "_test.go") || slices.Contains(gone, f) {
					continue
				}
				text := readFile(t, f)
				if f == "main.go" {
					for _, name := range names {
						marked := regexp.MustCompile(`(?m)^.*// feature: ` + name + `$\n`)
						if !marked.MatchString(text) {
							t.Errorf("no line of main.go is marked with %s", name)
						}
						text = marked.ReplaceAllString(text, "")
					}
				}
				if err := os.WriteFile(filepath.Join(dir, f), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("go", "vet", ".")
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			readme := readFile(t, "README.md")
			for _, name := range names {
				if row := "| " + name + " | `" + strings.Join(features[name], "`, `") + "` |"; !strings.Contains(readme, row) {
					t.Errorf("README lacks the row %s", row)
				}
			}
		})
	}
}

// TestFilesAreInReadme: nothing is in the tree that the README does not lead to.
func TestFilesAreInReadme(t *testing.T) {
	readme := readFile(t, "README.md")
	out, err := exec.Command("git", "ls-files").Output()
	if err != nil {
		skip(t, "needs a git checkout: "+err.Error())
	}
	for path := range strings.Lines(string(out)) {
		path = strings.TrimSpace(path)
		name := path
		for _, dir := range []string{"internal/pgtest", "internal/demo", "internal/benchside", "bench", ".github", ".ci"} {
			if strings.HasPrefix(path, dir+"/") {
				name = dir
			}
		}
		switch {
		case strings.HasSuffix(path, "_test.go"), name == "README.md", strings.HasPrefix(name, "go."), strings.HasPrefix(name, ".git") && name != ".github", name == ".dockerignore":
		case !strings.Contains(readme, "`"+name+"`"):
			t.Errorf("README does not mention %s", name)
		}
	}
}

// TestOnlyTwoModules: what is copied stays small.
func TestOnlyTwoModules(t *testing.T) {
	var required []string
	for line := range strings.Lines(readFile(t, "go.mod")) {
		if f := strings.Fields(line); len(f) >= 2 && strings.Contains(f[0], "/") && strings.HasPrefix(f[1], "v") {
			required = append(required, f[0])
		}
	}
	if !slices.Equal(required, []string{"github.com/lib/pq", "github.com/sethvargo/go-envconfig"}) {
		t.Errorf("go.mod requires %v", required)
	}
}

// TestSystemdUnit has systemd itself read the unit, and rate it.
func TestSystemdUnit(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		skip(t, "systemd-analyze is missing")
	}
	unit := filepath.Join(t.TempDir(), "pglistener.service")
	text := strings.Replace(readFile(t, "deploy/pglistener.service"), "/usr/local/bin/pglistener", program, 1)
	if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(analyze, "verify", unit).CombinedOutput(); err != nil {
		t.Errorf("verify: %v\n%s", err, out)
	}
	out, err := exec.Command(analyze, "security", "--offline=true", "--threshold=20", unit).CombinedOutput() // in tenths
	if err != nil {
		t.Errorf("its exposure is more than 2.0 of 10: %v\n%s", err, out)
	}
}
