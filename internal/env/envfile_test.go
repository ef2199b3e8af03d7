package env

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// asShell reads a file of variables as `set -a; . FILE` does.
func asShell(t *testing.T, text string) environ {
	t.Helper()
	path := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `set -a; . "$1"; env -0`, "sh", path)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	e := environ{}
	for pair := range bytes.SplitSeq(out, []byte{0}) {
		name, value, _ := strings.Cut(string(pair), "=")
		e[name] = value
	}
	return e
}

// asSystemd reads it as EnvironmentFile= does: systemd.exec(5). Lines that begin with # or ; are comments. Blanks around
// a value are none of it. Quotes may stand at its beginning, and again after a closing quote; elsewhere they are
// characters. Within '...' everything is; within "..." a \ is taken from before ", \, $ and `; outside quotes from
// before any character. A \ at the end of a line joins it with the next.
func asSystemd(_ *testing.T, text string) environ {
	e := environ{}
	for rest := text; rest != ""; {
		line, after, _ := strings.Cut(rest, "\n")
		rest = after
		line = strings.TrimLeft(line, " \t\r")
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		name, begin, ok := strings.Cut(line, "=")
		if !ok {
			continue
		}
		rest = begin + "\n" + rest
		var value []byte
		i, solid, started := 0, 0, false // solid: so much of value is no blank at its end
		for ; i < len(rest); i++ {
			switch c := rest[i]; {
			case c == '\n':
			case c == '\\':
				if i++; i < len(rest) && rest[i] != '\n' {
					value = append(value, rest[i])
				}
				solid, started = len(value), true
				continue
			case !started && c == '\'':
				for i++; i < len(rest) && rest[i] != '\''; i++ {
					value = append(value, rest[i])
				}
				solid = len(value)
				continue
			case !started && c == '"':
				for i++; i < len(rest) && rest[i] != '"'; i++ {
					if rest[i] == '\\' && i+1 < len(rest) {
						if i++; strings.IndexByte("\"\\$`", rest[i]) < 0 {
							value = append(value, '\\')
						}
					}
					value = append(value, rest[i])
				}
				solid = len(value)
				continue
			case strings.IndexByte(" \t\r", c) >= 0:
				if started {
					value = append(value, c)
				}
				continue
			default:
				value, started = append(value, c), true
				solid = len(value)
				continue
			}
			break
		}
		e[strings.TrimRight(name, " \t\r")] = string(value[:solid])
		rest = rest[min(i+1, len(rest)):]
	}
	return e
}

// asDocker reads it as docker run --env-file does: everything after = is the value, and lines that begin with # are
// comments.
func asDocker(_ *testing.T, text string) environ {
	e := environ{}
	for line := range strings.Lines(text) {
		line = strings.TrimLeft(strings.TrimRight(line, "\r\n"), " \t")
		if name, value, ok := strings.Cut(line, "="); ok && line[0] != '#' {
			e[name] = value
		}
	}
	return e
}

var readers = map[string]func(*testing.T, string) environ{"sh": asShell, "systemd": asSystemd, "docker": asDocker}

// The two readers above do as their programs do: this is what the parser of systemd 252 and the client of docker 28 make
// of the same lines.
func TestReadersOfFiles(t *testing.T) {
	const text = "# x=1\n; x=2\nA=a b \nB='a b'\nC=\"a \\\"b\\\" \\$c \\d\"\nD=a\\ b\nE=a'b'\nF='a''b'\nG=\n  H = h\nI=a\\\nb\nJ=a#b\n"
	for name, want := range map[string]environ{
		"systemd": {"A": "a b", "B": "a b", "C": `a "b" $c \d`, "D": "a b", "E": "a'b'", "F": "ab", "G": "", "H": "h", "I": "ab", "J": "a#b"},
		"docker":  {"A": "a b ", "B": "'a b'", "C": `"a \"b\" \$c \d"`, "D": `a\ b`, "E": "a'b'", "F": "'a''b'", "G": "", "I": `a\`, "J": "a#b"},
	} {
		got := readers[name](t, text)
		for v, value := range want {
			if got[v] != value {
				t.Errorf("%s: %s is %q, want %q", name, v, got[v], value)
			}
		}
	}
}

// One file serves a shell, systemd and docker, handlers with arguments and schedules included.
func TestOneFileForShellSystemdAndDocker(t *testing.T) {
	const text = `# Copy to .env.
DATABASE_URL='postgres://u:p%40ss@h/db?sslmode=require&application_name=x'
CHANNELS=orders,jobs,report,hook,plain=doorbell:log

ORDERS_HANDLER='exec:./bin "two words" x'
JOBS_HANDLER="outbox:exec:./bin \"two words\" 'a \$b' \\\\ x"
REPORT_HANDLER=doorbell:exec:./report
REPORT_SCHEDULE='CRON_TZ=Europe/Berlin 0 3 * * *'
HOOK_HANDLER='https://u:p@h/x?a=1,2&b=3;c#d'
HOOK_CONCURRENCY="7"
HOOK_WEBHOOK_SECRET='whsec_x'
PLAIN_HANDLER=''
`
	for name, read := range readers {
		e := read(t, text)
		routes, problems := ParseChannels(e["CHANNELS"], e.lookup, known)
		if len(problems) > 0 || len(routes) != 5 {
			t.Fatalf("%s: %v %v", name, routes, problems)
		}
		for i, want := range []string{"plain exec ./bin|two words|x", `outbox exec ./bin|two words|a $b|\|x`, "doorbell exec ./report", "plain https //u:p@h/x?a=1,2&b=3;c#d", "doorbell log "} {
			words, err := Words(routes[i].Arg)
			got := routes[i].Mode + " " + routes[i].Handler + " " + strings.Join(words, "|")
			if err != nil || got != want {
				t.Errorf("%s: %s: %q, want %q: %v", name, routes[i].Channel, got, want, err)
			}
		}
		var report, hook settings
		_, wrong := DecodeFor(&report, e.lookup, "report")
		_, more := DecodeFor(&hook, e.lookup, "hook")
		if len(wrong)+len(more) > 0 || report.Own != "CRON_TZ=Europe/Berlin 0 3 * * *" || hook.Concurrency != 7 || hook.Nested.Secret != "whsec_x" {
			t.Errorf("%s: %v %v %+v %+v", name, wrong, more, report, hook)
		}
		var dsn struct {
			URL string `env:"DATABASE_URL" file:"true"`
		}
		Decode(&dsn, e.lookup)
		if dsn.URL != "postgres://u:p%40ss@h/db?sslmode=require&application_name=x" {
			t.Errorf("%s: %q", name, dsn.URL)
		}
	}
}

func TestQuotesAroundAValue(t *testing.T) {
	for value, want := range map[string]string{
		"": "", "a": "a", " a\r\n": "a", "'a b'": "a b", `"a b"`: "a b", "''": "", `""`: "", "'": "'", `"`: `"`, `"a'`: `"a'`, " 'a ' ": "a ",
		`"a\"b\\c\$d` + "\\`" + `e\f"`: `a"b\c$d` + "`" + `e\f`, `'a\'`: `a\`, `'a\"b'`: `a\"b`, `"a'b"`: "a'b", `'a"b'`: `a"b`,
	} {
		if got := Unquote(value); got != want {
			t.Errorf("%s: %s, want %s", value, got, want)
		}
	}
	var s struct {
		Kept    string `env:"KEPT" quotes:"keep"`
		Removed string `env:"REMOVED" file:"true"`
	}
	file := filepath.Join(t.TempDir(), "value")
	if err := os.WriteFile(file, []byte("'from file'"), 0o600); err != nil {
		t.Fatal(err)
	}
	Decode(&s, environ{"KEPT": ` "a"`, "REMOVED_FILE": "'" + file + "'"}.lookup)
	if s.Kept != ` "a"` || s.Removed != "'from file'" {
		t.Errorf("%+v", s)
	}
}
