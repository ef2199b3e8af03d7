package env

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// environ is an environment.
type environ map[string]string

func (e environ) lookup(name string) (string, bool) {
	value, ok := e[name]
	return value, ok
}

// settings are variables as a package declares them.
type settings struct {
	Concurrency int           `env:"CONCURRENCY,default=1" max:"100"`
	Timeout     time.Duration `env:"HANDLER_TIMEOUT,default=30s"`
	Mode        string        `env:"OVERFLOW,default=block" oneof:"block drop"`
	Own         string        `env:"SCHEDULE" only:"channel"`
	Nested      secret
}

type secret struct {
	Secret string `env:"WEBHOOK_SECRET" file:"true"`
}

func (s secret) Validate() []error {
	if strings.Contains(s.Secret, "malformed") {
		return []error{errors.New("WEBHOOK_SECRET: must be whsec_...")}
	}
	return nil
}

func TestSettingsOfAChannel(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("from file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e := environ{
		"CONCURRENCY": "3", "HANDLER_TIMEOUT": "1m", "WEBHOOK_SECRET": "global", "SCHEDULE": "@daily",
		"USER_EVENTS_CONCURRENCY": "10", "USER_EVENTS_WEBHOOK_SECRET_FILE": file, "USER_EVENTS_SCHEDULE": "@hourly", "USER_EVENTS_OVERFLOW": "",
	}
	var global, orders, users settings
	if problems := Decode(&global, e.lookup); len(problems) > 0 {
		t.Fatal(problems)
	}
	orders, users = global, global
	if set, problems := DecodeFor(&orders, e.lookup, "orders"); len(problems) > 0 || len(set) > 0 || orders != global {
		t.Errorf("%v %v %+v", set, problems, orders)
	}
	if global.Own != "" || global.Concurrency != 3 || global.Mode != "block" {
		t.Errorf("%+v", global)
	}
	set, problems := DecodeFor(&users, e.lookup, "user-events")
	want := settings{Concurrency: 10, Timeout: time.Minute, Mode: "block", Own: "@hourly", Nested: secret{Secret: "from file"}}
	if len(problems) > 0 || users != want {
		t.Errorf("%v %+v, want %+v", problems, users, want)
	}
	slices.Sort(set)
	if strings.Join(set, " ") != "USER_EVENTS_CONCURRENCY USER_EVENTS_SCHEDULE USER_EVENTS_WEBHOOK_SECRET" {
		t.Errorf("set: %v", set)
	}
}

// TestValuesFromFiles: the end of the line that an editor adds, also one of Windows, is no part of the value; anything else is.
func TestValuesFromFiles(t *testing.T) {
	for text, want := range map[string]string{
		"s": "s", "s\n": "s", "s\r\n": "s", "s\n\n": "s", "s\r\n\r\n": "s", " s \n": " s ", "s\nt\n": "s\nt", `"s"` + "\n": `"s"`,
	} {
		file := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var got settings
		if problems := Decode(&got, environ{"WEBHOOK_SECRET_FILE": file}.lookup); len(problems) > 0 || got.Nested.Secret != want {
			t.Errorf("%q became %q, want %q: %v", text, got.Nested.Secret, want, problems)
		}
	}
}

// Each bad value is reported once, under the name it was given.
func TestBadValuesAreReportedOnce(t *testing.T) {
	e := environ{"CONCURRENCY": "many", "HANDLER_TIMEOUT": "10", "WEBHOOK_SECRET": "malformed hunter2",
		"A_CONCURRENCY": "101", "A_OVERFLOW": "lose", "B_HANDLER_TIMEOUT": "-1s", "B_WEBHOOK_SECRET": "malformed hunter2", "B_CONCURRENCY": "x"}
	var all []string
	var s settings
	for _, err := range Decode(&s, e.lookup) {
		all = append(all, err.Error())
	}
	for _, channel := range []string{"a", "b"} {
		_, problems := DecodeFor(&s, e.lookup, channel)
		for _, err := range problems {
			all = append(all, err.Error())
		}
	}
	slices.Sort(all)
	want := []string{"A_CONCURRENCY: 101 is not from 1 to 100", `A_OVERFLOW: "lose" is not one of block, drop`,
		`B_CONCURRENCY: "x" is not a whole number`, "B_HANDLER_TIMEOUT: -1s is not positive; write a duration such as 10s", "B_WEBHOOK_SECRET: must be whsec_...",
		`CONCURRENCY: "many" is not a whole number`, `HANDLER_TIMEOUT: "10" is not a duration such as 500ms, 10s or 1m30s`, "WEBHOOK_SECRET: must be whsec_..."}
	if !slices.Equal(all, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(all, "\n"), strings.Join(want, "\n"))
	}
}

func TestLimitsOfSanity(t *testing.T) {
	for _, v := range [][3]string{
		{"CONCURRENCY", "101", "101 is not from 1 to 100"}, {"CONCURRENCY", "0", "0 is not from 1 to 100"}, {"HANDLER_TIMEOUT", "100000h", "100000h0m0s is more than a year"},
	} {
		problems := Decode(&settings{}, environ{v[0]: v[1]}.lookup)
		if len(problems) != 1 || problems[0].Error() != v[0]+": "+v[2] {
			t.Errorf("%s: %v", v[0], problems)
		}
	}
	for _, fits := range []string{"1", "100"} {
		if problems := Decode(&settings{}, environ{"CONCURRENCY": fits}.lookup); len(problems) > 0 {
			t.Errorf("%s: %v", fits, problems)
		}
	}
}

func TestPrefixesThatCollide(t *testing.T) {
	for variable, collides := range map[string]bool{
		"USER_EVENTS_CONCURRENCY": true, "USER_EVENTS_HANDLER": true, "ORDERS_CONCURRENCY": false, "CONCURRENCY": false, "USER_EVENTS_NEW_CONCURRENCY": false,
	} {
		e := environ{variable: map[bool]string{true: "log", false: "7"}[strings.HasSuffix(variable, "_HANDLER")]}
		routes, _ := ParseChannels("user-events-new,user-events,user_events,orders", e.lookup, known)
		all, set, problems := DecodeChannels(settings{}, routes, e.lookup)
		if collides != (len(problems) == 1 && problems[0].Error() == variable+`: it is for channel "user-events" as well as for "user_events"; rename one of the channels`) || len(problems) > 1 {
			t.Errorf("%s: %v", variable, problems)
		}
		if len(all) != 4 || (variable == "ORDERS_CONCURRENCY") != (all["orders"].Concurrency == 7 && slices.Equal(set["orders"], []string{variable})) && variable != "CONCURRENCY" {
			t.Errorf("%s: %+v %v", variable, all, set)
		}
	}
}

var known = Known{Handlers: []string{"append", "exec", "http", "https", "log"}, Modes: []string{"doorbell", "outbox", "plain"}}

func TestChannels(t *testing.T) {
	for s, want := range map[string]string{
		"orders":                           "orders plain log",
		" a = log , b=doorbell:log":        "a plain log|b doorbell log",
		"a=outbox:https://h/x?y=1":         "a outbox https://h/x?y=1",
		`Käse "n' Brot; drop table x;`:     `Käse "n' Brot; drop table x; plain log`,
		"a=exec:./p 'two words' x":         "a plain exec:./p 'two words' x",
		" orders,\n  jobs ,b=log\r\n":      "orders plain log|jobs plain log|b plain log",
		`"orders"=log`:                     `"orders" plain log`,
		"a=https://h/x,jobs,tenant:42=log": "a plain https://h/x|jobs plain log|tenant:42 plain log",
		"tenant:42,tenant 43,a/b,me@x=log": "tenant:42 plain log|tenant 43 plain log|a/b plain log|me@x plain log",
	} {
		routes, problems := ParseChannels(s, environ{}.lookup, known)
		var got []string
		for _, r := range routes {
			got = append(got, r.Channel+" "+r.Mode+" "+r.Spec())
		}
		if len(problems) > 0 || strings.Join(got, "|") != want {
			t.Errorf("%s: %v %v", s, got, problems)
		}
	}
}

func TestHandlerInAVariableOfItsOwn(t *testing.T) {
	routes, problems := ParseChannels("orders,jobs,plain", environ{
		"ORDERS_HANDLER": "outbox:https://h/x?a=1,2", "JOBS_HANDLER": `'exec:./drain "two words" x'`,
	}.lookup, known)
	if len(problems) > 0 || len(routes) != 3 {
		t.Fatalf("%v %v", routes, problems)
	}
	for i, want := range []string{"outbox https://h/x?a=1,2 ORDERS_HANDLER", `plain exec:./drain "two words" x JOBS_HANDLER`, "plain log CHANNELS"} {
		if got := routes[i].Mode + " " + routes[i].Spec() + " " + routes[i].Variable; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if _, problems := ParseChannels("orders=log", environ{"ORDERS_HANDLER": "log"}.lookup, known); len(problems) != 1 || !strings.Contains(problems[0].Error(), "ORDERS_HANDLER; leave one of them out") {
		t.Errorf("both forms: %v", problems)
	}
}

// A mistake gets one line, and no line has anything that may be a secret.
func TestMistakesInChannels(t *testing.T) {
	for s, want := range map[string]string{
		"":                              "not set",
		`"orders"`:                      "docker's --env-file keeps",
		"'orders,jobs'":                 "docker's --env-file keeps",
		"orders\njobs":                  "line breaks",
		"orders;jobs=doorbell:log":      "commas, not by semicolons",
		"a=doorbell:outbox:log":         `channel "a" has two modes`,
		"a=outbox:doorbell:log":         `channel "a" has two modes`,
		"drain=doorbell":                `channel "drain" has no handler after the mode`,
		"a=":                            `channel "a" has no handler`,
		"a=doorbel:log":                 `did you mean "doorbell"?`,
		"a=htps://u:hunter2@h/":         `did you mean "https"?`,
		"a=hunter2":                     "neither a mode",
		"https://u:hunter2@h/":          "entry 1 is a URL",
		"a=https://h/x?a=1,2&t=hunter2": "entry 2 is not shown",
		"a=exec:./p --pw x,hunter2 y":   "entry 2 is not shown",
		"a,a":                           "listed twice",
		"a,":                            "entry 2 has no channel name",
		strings.Repeat("x", 64):         "has 64 bytes",
		"a\xff":                         "not valid UTF-8",
	} {
		_, problems := ParseChannels(s, environ{}.lookup, known)
		if len(problems) != 1 || !strings.Contains(problems[0].Error(), want) || !strings.HasPrefix(problems[0].Error(), "CHANNELS: ") || strings.Contains(problems[0].Error(), "\n") {
			t.Errorf("%q: %v, want one with %q", s, problems, want)
		}
		for _, p := range problems {
			if strings.Contains(p.Error(), "hunter2") {
				t.Errorf("%q: the secret is shown: %v", s, p)
			}
		}
	}
}

func TestWhatIsShownOfAHandler(t *testing.T) {
	for spec, want := range map[string]string{
		"https://u:hunter2@h:8/hunter2?t=hunter2": "plain https://h:8",
		"outbox:https://h/hunter2":                "outbox https://h",
		"https://u:hunter2%zz@h/":                 "plain https://...",
		"exec:./drain --password hunter2 x":       "plain exec:./drain (3 arguments)",
		`exec:"./my drain" 'hunter2 x'`:           "plain exec:./my drain (1 argument)",
		"exec:PASSWORD=hunter2 ./drain":           "plain exec",
		"exec:./drain 'hunter2":                   "plain exec",
		"https://u:12/hunter2@h/":                 "plain https://...",
		"https://hunter2/x@h/":                    "plain https://...",
		"https:hunter2":                           "plain https://...",
		"kafka:user:hunter2@b":                    "plain kafka",
		"append:/two words":                       "plain append:/two words",
		"doorbell:exec:./drain":                   "doorbell exec:./drain",
		"append:/var/log/journal":                 "plain append:/var/log/journal",
		"log":                                     "plain log",
	} {
		routes, problems := ParseChannels("a", environ{"A_HANDLER": spec}.lookup, Known{Handlers: append([]string{"kafka"}, known.Handlers...), Modes: known.Modes})
		if len(problems) > 0 || routes[0].Shown() != want {
			t.Errorf("%s: %v %v", spec, routes, problems)
		}
	}
}

func TestWords(t *testing.T) {
	for s, want := range map[string]string{
		"":                      "",
		"a  b\tc":               "a|b|c",
		`a 'b c' "d e"`:         "a|b c|d e",
		`"it's" 'say "x"'`:      `it's|say "x"`,
		`a\ b \" \\`:            `a b|"|\`,
		`"a\"b\\c\d" 'x\y'`:     `a"b\c\d|x\y`,
		`pre'fix'"ed" ''`:       "prefixed|",
		`$HOME * ~ $(x) "$(y)"`: "$HOME|*|~|$(x)|$(y)",
	} {
		words, err := Words(s)
		if got := strings.Join(words, "|"); err != nil || got != want {
			t.Errorf("%s: %q %v, want %q", s, got, err, want)
		}
	}
	for _, s := range []string{`a "b`, `'`, `a'b`} {
		if _, err := Words(s); err == nil {
			t.Errorf("%s: the open quote is no error", s)
		}
	}
}

func FuzzWords(f *testing.F) {
	f.Add(`a 'b c' "d\"e" \x`)
	f.Fuzz(func(t *testing.T, s string) {
		words, err := Words(s)
		if err != nil {
			return
		}
		// Quoted again they are the same words.
		var quoted []string
		for _, w := range words {
			quoted = append(quoted, "'"+strings.ReplaceAll(w, "'", `'\''`)+"'")
		}
		if again, err := Words(strings.Join(quoted, " ")); err != nil || !slices.Equal(again, words) {
			t.Errorf("%q became %q, and again %q: %v", s, words, again, err)
		}
	})
}

func TestMisspeltVariables(t *testing.T) {
	var global struct {
		Settings settings
		URL      string `env:"DATABASE_URL" file:"true"`
		List     string `env:"CHANNELS"`
		Ping     string `env:"PING_INTERVAL"`
		Addr     string `env:"HTTP_ADDR"`
		Table    string `env:"OUTBOX_TABLE"`
	}
	routes := []Route{{Channel: "orders"}, {Channel: "user-events"}}
	for name, want := range map[string]string{
		"CONCURENCY": "CONCURRENCY", "CHANNEL": "CHANNELS", "PING_INTERVALL": "PING_INTERVAL", "HANDLER_TIMOUT": "HANDLER_TIMEOUT",
		"OUTBOX_TABEL": "OUTBOX_TABLE", "DATABSE_URL": "DATABASE_URL", "ORDERS_CONCURENCY": "ORDERS_CONCURRENCY", "ORDER_CONCURRENCY": "ORDERS_CONCURRENCY",
		"USEREVENTS_HANDLER": "USER_EVENTS_HANDLER", "HTTP_ADDR_FILE": "HTTP_ADDR cannot come from a file",
		"SCHEDULE": "ORDERS_SCHEDULE", "HANDLER": "ORDERS_HANDLER", "ORDERS_OVERFLOWS": "ORDERS_OVERFLOW", "OVERFLAWS": "",
		"ORDERS_PING_INTERVAL": "it is for all channels", "USER_EVENTS_DATABASE_URL": "it is for all channels", "ORDERS_DATABASE_URL_FILE": "it is for all channels",
		"PATH": "", "HOME": "", "LANG": "", "PGHOST": "", "DATABASE_URL": "", "ORDERS_HANDLER": "", "BILLING_HANDLER_TIMEOUT": "", "BILLING_HANDLER": "no channel of that name", "SHLVL": "", "XDG_RUNTIME_DIR": "",
		"HOSTNAME": "", "TERM": "", "JOURNAL_STREAM": "", "INVOCATION_ID": "", "KUBERNETES_PORT": "", "HTTP_PROXY": "",
	} {
		warnings := Unknown([]string{name + "=hunter2"}, &global, &settings{}, routes)
		switch {
		case want == "" && len(warnings) > 0, want != "" && (len(warnings) != 1 || !strings.Contains(warnings[0], want) || !strings.HasPrefix(warnings[0], name+": ")):
			t.Errorf("%s: %v, want %q", name, warnings, want)
		case strings.Contains(strings.Join(warnings, ""), "hunter2"):
			t.Errorf("%s: the value is shown", name)
		}
	}
}

// TestNearest: as many letters may be wrong as are likely in a word of that length, one at least.
func TestNearest(t *testing.T) {
	known := []string{"OUTBOX_TABLE", "PING", "HANDLER_TIMEOUT", "WEBHOOK_SECRET_PREVIOUS"}
	for s, want := range map[string]string{
		// One letter left out, put in, replaced, exchanged with its neighbour; at the beginning, within and at the end.
		"UTBOX_TABLE": "OUTBOX_TABLE", "OUTBX_TABLE": "OUTBOX_TABLE", "OUTBOX_TABL": "OUTBOX_TABLE",
		"XOUTBOX_TABLE": "OUTBOX_TABLE", "OUTBOXX_TABLE": "OUTBOX_TABLE", "OUTBOX_TABLES": "OUTBOX_TABLE",
		"AUTBOX_TABLE": "OUTBOX_TABLE", "OUTBOX-TABLE": "OUTBOX_TABLE", "OUTBOX_TABLA": "OUTBOX_TABLE",
		"UOTBOX_TABLE": "OUTBOX_TABLE", "OUTBOX_TBALE": "OUTBOX_TABLE", "OUTBOX_TABEL": "OUTBOX_TABLE",
		"PIING": "PING", "PONG": "PING", "PNIG": "PING", "PIGN": "PING",
		// Two of them are one too many in a short word, and not in a long one; in a very long one three are not.
		"PIINGG": "", "PONK": "", "IPGN": "", "PNGI": "", "IPNGG": "", "OTBX_TBLE": "",
		"HANDLR_TIMOUT": "HANDLER_TIMEOUT", "HANDLERR_TIMEOUTS": "HANDLER_TIMEOUT", "HENDLER_TIMEUOT": "HANDLER_TIMEOUT",
		"AHNDLER_TIMEOTU": "HANDLER_TIMEOUT",
		"HNDLR_TIMOUT":    "", "AHNDLER_TMIEOTU": "", "WEBHOOOK_SECREET_PREVIOUSS": "WEBHOOK_SECRET_PREVIOUS", "WEBHOK_SECRT_PRVIOUS": "",
		// Too short to resemble anything, and right as it is.
		"PIN": "", "PNG": "", "PING": "", "": "",
	} {
		if got := nearest(s, known); got != want {
			t.Errorf("%q is taken for %q, want %q", s, got, want)
		}
	}
	if got := nearest("PINGS", []string{"PONGS", "PANGSX", "PING"}); got != "PONGS" {
		t.Errorf("the first of those that are as near is %q", got)
	}
	if got := nearest("HANDLER_TIMEOUT", []string{"HANDLER_TIME", "HANDLER_TIMEO", "HANDLER_TIMEUT"}); got != "HANDLER_TIMEUT" {
		t.Errorf("the nearest is %q", got)
	}
}

func TestBytes(t *testing.T) {
	for text, want := range map[string]Bytes{"1MB": 1 << 20, "64mb": 64 << 20, "2 GB": 2 << 30, "1500KB": 1500 << 10,
		"": -1, "64": -1, "MB": -1, "-1MB": -1, "1.5GB": -1, "1TB": -1, "9999999GB": -1, "0x10MB": -1} {
		var got Bytes
		if err := got.UnmarshalText([]byte(text)); err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q is %d, want %d", text, got, want)
		}
	}
}
