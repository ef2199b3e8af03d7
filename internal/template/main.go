// Template copies the project for a team of its own: "make new" runs it.
//
// Usage: template MODULE DIR [FEATURE...]
//
// It copies the files that git knows into DIR, which must not exist or be empty, under the name MODULE and without
// the features, which are the names of their folders in internal. What belongs to a feature is removed:
//
//   - its folder, and what needs has for it
//   - a file whose first line is "// feature: NAME" or "<!-- file: NAME -->"
//   - a line that contains "feature: NAME" in a comment
//   - the lines from one that contains "begin: NAME" to one that contains "end: NAME"
//
// NAME may be several names: each of them takes it away. Of names with a slash between them, as in execcmd/pipe, all must go.
package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const module = "github.com/pglistener/pglistener"

// features are what can be left out, with what else is of no use without each.
var features = map[string][]string{
	"check":    {},
	"outbox":   {"bench", "internal/benchside", "internal/trigger"},
	"execcmd":  {"internal/demo"},
	"webhook":  {},
	"pipe":     {},
	"health":   {"internal/page", "deploy/kubernetes.yaml", "deploy/alerts.yml", "deploy/alerts_test.yml"},
	"page":     {},
	"schedule": {},
	"sdnotify": {"deploy/pglistener.service", "deploy/pglistener@.service"},
}

func main() {
	if len(os.Args) < 3 || os.Args[1] == "" || os.Args[2] == "" {
		fmt.Fprintln(os.Stderr, `usage: make new MODULE=example.com/acme/notifier DIR=../notifier [WITHOUT="outbox webhook"]`)
		os.Exit(2)
	}
	if err := copyProject(".", os.Args[2], os.Args[1], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, "new:", err)
		os.Exit(1)
	}
	fmt.Printf("%s is in %s; cd there and run make test\n", os.Args[1], os.Args[2])
}

// copyProject copies the project in from to the directory to.
func copyProject(from, to, name string, without []string) error {
	if !regexp.MustCompile(`^[A-Za-z0-9._~/-]+$`).MatchString(name) {
		return fmt.Errorf("MODULE: %q is not a module path; write one such as example.com/acme/notifier", name)
	}
	var gone []string // paths
	without = slices.Clone(without)
	for i := 0; i < len(without); i++ {
		also, ok := features[without[i]]
		if !ok {
			return fmt.Errorf("WITHOUT: %q is not a feature; there are %s", without[i], strings.Join(slices.Sorted(maps.Keys(features)), ", "))
		}
		gone = append(append(gone, "internal/"+without[i]), also...)
		for _, path := range also {
			if f, inner := strings.CutPrefix(path, "internal/"); inner && features[f] != nil { // it needs this one
				without = append(without, f)
			}
		}
	}
	if slices.Contains(without, "execcmd") && slices.Contains(without, "pipe") {
		gone = append(gone, "internal/proc") // nobody else starts programs
	}
	if entries, err := os.ReadDir(to); err == nil && len(entries) > 0 {
		return fmt.Errorf("DIR: %q is not empty", to)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("DIR: %w", err)
	}
	list := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard")
	list.Dir = from
	files, err := list.Output()
	if err != nil {
		return fmt.Errorf("git ls-files: %w", err)
	}
	for file := range strings.Lines(string(files)) {
		file = strings.TrimSuffix(file, "\n")
		if slices.ContainsFunc(gone, func(g string) bool { return file == g || strings.HasPrefix(file, g+"/") }) {
			continue
		}
		if err := copyFile(filepath.Join(from, file), filepath.Join(to, file), name, without); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to, name string, without []string) error {
	data, err := os.ReadFile(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // deleted, and git has not been told
	}
	if err != nil {
		return err
	}
	text, keep := strip(string(data), without)
	if !keep {
		return nil
	}
	text = strings.ReplaceAll(text, module, name)
	if strings.HasSuffix(from, ".go") && len(without) > 0 {
		formatted, err := tidy(text)
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		text = string(formatted)
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, []byte(text), info.Mode().Perm())
}

// tidy drops the imports of what has gone, and formats: comments are aligned with lines that have gone.
func tidy(text string) ([]byte, error) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, "", text, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok {
				used[x.Name] = true
			}
		}
		return true
	})
	lines := strings.SplitAfter(text, "\n")
	for _, i := range file.Imports {
		full := regexp.MustCompile(`/v[0-9]+$`).ReplaceAllString(strings.Trim(i.Path.Value, `"`), "")
		name := strings.TrimPrefix(path.Base(full), "go-")
		if i.Name != nil {
			name = i.Name.Name
		}
		if name != "_" && !used[name] {
			lines[set.Position(i.Pos()).Line-1] = ""
		}
	}
	return format.Source([]byte(strings.Join(lines, "")))
}

var (
	ofFile = regexp.MustCompile(`^(?:// feature:|<!-- file:) ([a-z/ ]+?)(?: -->)?$`)
	ofLine = regexp.MustCompile(`(?://|#|<!--) feature: ([a-z/ ]+?)(?: -->.*)?$`)
	begins = regexp.MustCompile(`^\s*(?://|#|<!--) begin: ([a-z/ ]+?)(?: -->)?$`)
	ends   = regexp.MustCompile(`^\s*(?://|#|<!--) end: ([a-z/ ]+?)(?: -->)?$`)
)

// strip removes what belongs to features from a file's text. keep is false when the whole file does.
func strip(text string, without []string) (stripped string, keep bool) {
	if len(without) == 0 {
		return text, true
	}
	for _, f := range without { // of names with a slash between them the others are left, which keep what is marked
		text = regexp.MustCompile(`((?:feature|begin|end): [a-z/ ]*?)\b(?:`+f+`/|/`+f+`\b)`).ReplaceAllString(text, "$1")
	}
	// of says whether a marker is there and names one of the features.
	of := func(marker *regexp.Regexp, line string) (names string, here bool) {
		m := marker.FindStringSubmatch(strings.TrimRight(line, "\n"))
		if m == nil {
			return "", false
		}
		return m[1], slices.ContainsFunc(strings.Fields(m[1]), func(f string) bool { return slices.Contains(without, f) })
	}
	first, _, _ := strings.Cut(text, "\n")
	if _, whole := of(ofFile, first); whole {
		return "", false
	}
	var out strings.Builder
	inside := "" // the names of the block that is being removed
	for line := range strings.Lines(text) {
		if inside != "" {
			if names, _ := of(ends, line); names == inside {
				inside = ""
			}
			continue
		}
		if names, here := of(begins, line); here {
			inside = names
			continue
		}
		if _, here := of(ofLine, line); !here {
			out.WriteString(line)
		}
	}
	// What is left between two blocks must not be two empty lines.
	return regexp.MustCompile(`\n{3,}`).ReplaceAllString(out.String(), "\n\n"), true
}
