package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
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
