package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The tests of the house: who may know whom, and how large anything may be.

const modulePath = "github.com/pglistener/pglistener"

// source is a file of Go that is neither a test nor a tool of the tests.
type source struct {
	path     string
	dir      string // "." is the root
	lines    int
	code     int // of them, those that are neither blank nor only a comment
	featured int // lines of features that can be left out
	file     *ast.File
	set      *token.FileSet
}

// sources are those of the project: not the tests, nor what only tests, the demo and the benchmarks use.
func sources(t *testing.T) (all []source) {
	t.Helper()
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	inner, err := filepath.Glob("internal/*/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(paths, inner...) {
		dir := filepath.Dir(path)
		if strings.HasSuffix(path, "_test.go") || slices.Contains([]string{"internal/pgtest", "internal/demo", "internal/benchside", "internal/template"}, dir) {
			continue
		}
		text := testkit.ReadFile(t, path)
		s := source{path: path, dir: dir, set: token.NewFileSet(), lines: strings.Count(text, "\n"), featured: strings.Count(text, "\n") - strings.Count(withoutFeatures(text), "\n")}
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "//") {
				s.code++
			}
		}
		if s.file, err = parser.ParseFile(s.set, path, nil, 0); err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	return all
}

// mayImport are the packages of ours that each may know; the root may know all.
var mayImport = map[string][]string{
	"internal/notify":   {},
	"internal/env":      {"pgconn"},
	"internal/logs":     {"notify"},
	"internal/cli":      {"env"},
	"internal/check":    {"notify", "pgconn"},
	"internal/retry":    {},
	"internal/memory":   {},
	"internal/workers":  {},
	"internal/schedule": {},
	"internal/template": {},
	"internal/proc":     {"env"},
	"internal/pipe":     {"notify", "retry", "proc"},
	"internal/trigger":  {"notify", "retry", "pgconn"},
	"internal/call":     {"notify", "retry"},
	"internal/pgconn":   {"notify", "retry"},
	"internal/probe":    {"notify", "retry"},
	"internal/queue":    {"notify", "retry", "call"},
	"internal/outbox":   {"notify", "retry", "call", "pgconn"},
	"internal/execcmd":  {"notify", "proc"},
	"internal/webhook":  {"notify", "retry", "env"},
	"internal/health":   {"notify"},
	"internal/page":     {"notify", "retry", "pgconn"},
	"internal/sdnotify": {},
}

// TestDependenciesRunOneWay: leaves know the contract and the tools, no handler knows another, and nobody knows
// main.
func TestDependenciesRunOneWay(t *testing.T) {
	for _, s := range sources(t) {
		allowed, listed := mayImport[s.dir]
		if !listed && s.dir != "." {
			t.Errorf("%s: nobody has said what %s may import", s.path, s.dir)
		}
		for _, i := range s.file.Imports {
			path := strings.Trim(i.Path.Value, `"`)
			ours, isOurs := strings.CutPrefix(path, modulePath+"/internal/")
			if isOurs && s.dir != "." && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s", s.path, ours)
			}
			if strings.Contains(path, ".") && !isOurs && s.dir == "internal/notify" {
				t.Errorf("%s: the contract imports %s", s.path, path)
			}
		}
	}
}

// withoutFeatures is a text without the lines that make new can leave out.
func withoutFeatures(text string) string {
	text = regexp.MustCompile(`(?ms)^\s*// begin: .*?^\s*// end: [^\n]*\n`).ReplaceAllString(text, "")
	return regexp.MustCompile(`(?m)^.*// feature: .*\n`).ReplaceAllString(text, "")
}

// core is what a stranger reads first, and what is left when every feature is left out.
var core = []string{".", "internal/notify", "internal/retry", "internal/call", "internal/pgconn", "internal/probe", "internal/queue"}

// TestSizes: the core counts every line, the whole those that hold code, for nobody should have to save on comments.
func TestSizes(t *testing.T) {
	inCore, whole, code := 0, 0, 0
	for _, s := range sources(t) {
		whole, code = whole+s.lines, code+s.code
		if slices.Contains(core, s.dir) {
			inCore += s.lines - s.featured
		}
		if s.path == "listener.go" && s.lines > 450 {
			t.Errorf("listener.go has %d lines", s.lines)
		}
		for _, d := range s.file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			lines := s.set.Position(f.End()).Line - s.set.Position(f.Pos()).Line + 1
			if lines > 70 && (s.path != "listener.go" || f.Name.Name != "Run") {
				t.Errorf("%s: %s has %d lines", s.path, f.Name.Name, lines)
			}
		}
	}
	if inCore >= 3000 || code >= 7500 {
		t.Errorf("the core has %d lines, the whole %d lines of code", inCore, code)
	}
	t.Logf("the core has %d lines, the whole %d, %d of them code", inCore, whole, code)
}

// TestOnlyTwoModules: what is copied stays small.
func TestOnlyTwoModules(t *testing.T) {
	var required []string
	for line := range strings.Lines(testkit.ReadFile(t, "go.mod")) {
		if f := strings.Fields(line); len(f) >= 2 && strings.Contains(f[0], "/") && strings.HasPrefix(f[1], "v") {
			required = append(required, f[0])
		}
	}
	if !slices.Equal(required, []string{"github.com/lib/pq", "github.com/sethvargo/go-envconfig"}) {
		t.Errorf("go.mod requires %v", required)
	}
}

// TestTreeIsDescribed: CONTRIBUTING.md leads to everything that is in the tree.
func TestTreeIsDescribed(t *testing.T) {
	guide := testkit.ReadFile(t, "CONTRIBUTING.md")
	out, err := exec.Command("git", "ls-files").Output()
	if err != nil {
		testkit.Skip(t, "needs a git checkout: "+err.Error())
	}
	for path := range strings.Lines(string(out)) {
		path = strings.TrimSpace(path)
		if _, err := os.Stat(path); err != nil {
			continue // deleted, and git has not been told
		}
		name := path
		if dir, _, nested := strings.Cut(path, "/"); nested {
			name = dir
			if dir == "internal" {
				name = filepath.Dir(path)
				if strings.HasPrefix(name, "internal/pgtest") {
					name = "internal/pgtest"
				}
			}
		}
		switch {
		case strings.HasSuffix(path, "_test.go"), strings.HasSuffix(path, ".md"), strings.HasPrefix(name, "go."), name == ".gitignore", name == ".dockerignore", name == "LICENSE":
		case !strings.Contains(guide, "`"+name+"`") && !strings.Contains(guide, "`"+name+"/`"):
			t.Errorf("CONTRIBUTING.md does not mention %s", name)
		}
	}
}
