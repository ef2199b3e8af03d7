package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
	"github.com/sethvargo/go-envconfig"
)

// Config is the one list of variables. The tag env has the name and the default,
// usage the meaning, as -h prints them. Of a variable with a file tag, NAME_FILE
// may name a file that holds the value.
type Config struct {
	DatabaseURL     string        `env:"DATABASE_URL" file:"true" usage:"connection string, URL or key=value; if empty, the standard PG* variables"`
	Channels        string        `env:"CHANNELS" usage:"required; comma-separated channel[=[mode:]handler]; modes: plain, doorbell, outbox; handlers: log, append:FILE, exec:PROGRAM [ARG...], http://..., https://..."`
	PingInterval    time.Duration `env:"PING_INTERVAL,default=10s" usage:"silence after which the server is pinged"`
	PingTimeout     time.Duration `env:"PING_TIMEOUT,default=5s" usage:"bound on any single answer: dial, handshake, LISTEN, pong, probe"`
	ProbeInterval   time.Duration `env:"PROBE_INTERVAL,default=1m" usage:"how often delivery is proven by a NOTIFY from a second connection; 0 turns it off"`
	ReconnectMin    time.Duration `env:"RECONNECT_MIN,default=100ms" usage:"first pause between attempts to connect; it doubles, with jitter"`
	ReconnectMax    time.Duration `env:"RECONNECT_MAX,default=2s" usage:"longest pause between attempts to connect"`
	StartTimeout    time.Duration `env:"START_TIMEOUT,default=0" usage:"give up when not listening by then; 0 retries for ever"`
	QueueSize       int           `env:"QUEUE_SIZE,default=10000" usage:"waiting notifications per channel"`
	Overflow        string        `env:"OVERFLOW,default=block" usage:"when a queue is full: block (stop reading, the server buffers) or drop (discard, log, catch up)"`
	Concurrency     int           `env:"CONCURRENCY,default=1" usage:"handlers at once per channel; 1 keeps the order"`
	HandlerTimeout  time.Duration `env:"HANDLER_TIMEOUT,default=30s" usage:"time limit of one attempt"`
	HandlerAttempts int           `env:"HANDLER_ATTEMPTS,default=5" usage:"attempts before a notification is logged as an error and given up"`
	CatchUpInterval time.Duration `env:"CATCH_UP_INTERVAL,default=5m" usage:"how often doorbell handlers run without being rung; 0 turns it off"`
	OutboxTable     string        `env:"OUTBOX_TABLE,default=outbox" usage:"table of the outbox channels, NAME or SCHEMA.NAME"`
	OutboxAttempts  int           `env:"OUTBOX_ATTEMPTS,default=20" usage:"attempts before a row of the outbox is kept as failed"`
	WebhookSecret   string        `env:"WEBHOOK_SECRET" file:"true" usage:"signs POSTs as Standard Webhooks do: whsec_..."`
	ShutdownTimeout time.Duration `env:"SHUTDOWN_TIMEOUT,default=20s" usage:"how long SIGTERM waits for what was received to be handled"`
	HTTPAddr        string        `env:"HTTP_ADDR" usage:"address for /livez, /readyz and /metrics, such as :8080; if empty, nothing listens"`
	LogLevel        string        `env:"LOG_LEVEL,default=info" usage:"debug, info, warn or error"`
	LogFormat       string        `env:"LOG_FORMAT,default=text" usage:"text or json, on stderr"`

	routes []route
	level  slog.Level
}

// route is one entry of CHANNELS.
type route struct {
	channel string
	mode    string // "plain" or "doorbell"
	handler string // name in the handler table
	arg     string // what follows the name and a colon
}

// maxChannel is NAMEDATALEN-1: LISTEN cuts a longer name in silence and pg_notify
// rejects it, so such a channel would never hear anything (DESIGN fact 16).
const maxChannel = 63

// loadConfig reads the configuration through lookup, which is os.LookupEnv but
// for tests; table has the handlers that CHANNELS may name. It returns every
// problem at once, one error each, beginning with the name of the variable and
// free of secrets.
func loadConfig(lookup func(string) (string, bool), table map[string]newHandler) (*Config, []error) {
	c := &Config{}
	problems := c.decode(lookup)
	report := func(name, format string, args ...any) {
		problems = append(problems, fmt.Errorf(name+": "+format, args...))
	}

	if c.DatabaseURL == "" && !anySet(lookup, "PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE") {
		if !mentions(problems, "DATABASE_URL") {
			report("DATABASE_URL", "not set, nor any of PGHOST, PGDATABASE, PGSERVICE; set it to postgres://user:password@host:port/database")
		}
	} else if name, err := checkDSN(c.DatabaseURL); err != nil {
		report(name, "%w", err)
	}

	var err error
	if c.routes, err = parseChannels(c.Channels, table); err != nil {
		for _, err := range split(err) {
			report("CHANNELS", "%w", err)
		}
	}

	for _, d := range []struct {
		name  string
		value time.Duration
		zero  bool // 0 means something
	}{
		{"PING_INTERVAL", c.PingInterval, false},
		{"PING_TIMEOUT", c.PingTimeout, false},
		{"RECONNECT_MIN", c.ReconnectMin, false},
		{"RECONNECT_MAX", c.ReconnectMax, false},
		{"PROBE_INTERVAL", c.ProbeInterval, true},
		{"START_TIMEOUT", c.StartTimeout, true},
		{"HANDLER_TIMEOUT", c.HandlerTimeout, false},
		{"CATCH_UP_INTERVAL", c.CatchUpInterval, true},
		{"SHUTDOWN_TIMEOUT", c.ShutdownTimeout, false},
	} {
		if d.value < 0 || d.value == 0 && !d.zero {
			report(d.name, "%v is not positive; write a duration such as 10s", d.value)
		}
	}
	if c.ReconnectMin > c.ReconnectMax {
		report("RECONNECT_MIN", "%v is more than RECONNECT_MAX, which is %v", c.ReconnectMin, c.ReconnectMax)
	}
	for _, n := range []struct {
		name  string
		value int
	}{
		{"QUEUE_SIZE", c.QueueSize},
		{"CONCURRENCY", c.Concurrency},
		{"HANDLER_ATTEMPTS", c.HandlerAttempts},
		{"OUTBOX_ATTEMPTS", c.OutboxAttempts},
	} {
		if n.value < 1 {
			report(n.name, "%d is less than 1", n.value)
		}
	}
	for _, e := range []struct {
		name, value string
		allowed     []string
	}{
		{"OVERFLOW", c.Overflow, []string{"block", "drop"}},
		{"LOG_LEVEL", c.LogLevel, []string{"debug", "info", "warn", "error"}},
		{"LOG_FORMAT", c.LogFormat, []string{"text", "json"}},
	} {
		if !slices.Contains(e.allowed, e.value) {
			report(e.name, "%q is not one of %s", e.value, strings.Join(e.allowed, ", "))
		}
	}
	_ = c.level.UnmarshalText([]byte(c.LogLevel)) // checked just above
	return c, problems
}

// decode fills the tagged fields. envconfig stops at the first value it cannot
// decode, so it is run again without that one until it is content.
func (c *Config) decode(lookup func(string) (string, bool)) []error {
	var problems []error
	bad := map[string]bool{}
	for {
		var last string
		err := envconfig.ProcessWith(context.Background(), &envconfig.Config{
			Target: c,
			// Values already there are defaults or good: without this, a second
			// run would keep what the first one set and never see a default.
			DefaultOverwrite: true,
			Lookuper: envconfig.LookuperFunc(func(name string) (string, bool) {
				last = name
				if bad[name] {
					return "", false
				}
				value, err := lookupValue(lookup, name)
				if err != nil {
					problems, bad[name] = append(problems, err), true
				}
				return value, value != ""
			}),
		})
		if err == nil {
			return problems
		}
		if bad[last] {
			return append(problems, err) // not the value's fault: a bug in the struct's tags
		}
		bad[last] = true
		value, _ := lookup(last)
		hint := "a whole number"
		if f, _ := fieldOf(last); f.Type == reflect.TypeFor[time.Duration]() {
			hint = "a duration such as 500ms, 10s or 1m30s"
		}
		problems = append(problems, fmt.Errorf("%s: %q is not %s", last, value, hint))
	}
}

// lookupValue returns the value of a variable, from NAME_FILE where that is
// allowed and set. An empty variable counts as unset.
func lookupValue(lookup func(string) (string, bool), name string) (string, error) {
	value, _ := lookup(name)
	if f, ok := fieldOf(name); !ok || f.Tag.Get("file") == "" {
		return value, nil
	}
	path, _ := lookup(name + "_FILE")
	if path == "" {
		return value, nil
	}
	if value != "" {
		return "", fmt.Errorf("%s_FILE: %s is set too; set one of them", name, name)
	}
	data, err := readSmall(path)
	if err != nil {
		return "", fmt.Errorf("%s_FILE: %w", name, err)
	}
	value = strings.TrimRight(string(data), "\r\n")
	if value == "" {
		return "", fmt.Errorf("%s_FILE: %q is empty", name, path)
	}
	return value, nil
}

// readSmall reads a file that holds one value, so that a wrong path cannot fill the memory.
func readSmall(path string) ([]byte, error) {
	const limit = 64 << 10
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && len(data) > limit {
		err = fmt.Errorf("%q is larger than %d bytes", path, limit)
	}
	return data, err
}

// parseChannels reads CHANNELS and returns the entries that are right. Its error joins one for each that is not.
func parseChannels(s string, table map[string]newHandler) ([]route, error) {
	if strings.TrimSpace(s) == "" {
		return nil, errors.Join(errors.New("not set; name the channels to listen on, such as CHANNELS=orders,jobs=doorbell:exec:./drain"))
	}
	var routes []route
	var problems []error
	report := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	seen := map[string]bool{}
	for i, entry := range strings.Split(s, ",") {
		channel, spec, given := strings.Cut(entry, "=")
		channel, spec = strings.TrimSpace(channel), strings.TrimSpace(spec)
		r := route{channel: channel, mode: "plain", handler: "log"}
		if given {
			r.handler, r.arg, _ = strings.Cut(spec, ":")
			if r.handler == "plain" || r.handler == "doorbell" {
				r.mode = r.handler
				r.handler, r.arg, _ = strings.Cut(r.arg, ":")
			}
		}
		_, known := table[r.handler]
		switch {
		case channel == "":
			report("entry %d has no channel name", i+1)
		case len(channel) > maxChannel:
			report("channel %q has %d bytes; PostgreSQL allows %d", channel, len(channel), maxChannel)
		case !utf8.ValidString(channel) || strings.ContainsRune(channel, 0):
			report("channel %q is not valid UTF-8", channel)
		case seen[channel]:
			report("channel %q is listed twice", channel)
		case r.handler == "":
			report("channel %q has no handler after the %q", channel, "=")
		case !known:
			report("channel %q: %q is neither a mode (plain, doorbell, outbox) nor a handler (%s)",
				channel, r.handler, strings.Join(slices.Sorted(maps.Keys(table)), ", "))
		default:
			routes = append(routes, r)
		}
		seen[channel] = true
	}
	return routes, errors.Join(problems...)
}

// warnings are about what is allowed and hardly ever meant.
func (c *Config) warnings() []string {
	var out []string
	for _, r := range c.routes {
		if strings.ToLower(r.channel) != r.channel {
			out = append(out, fmt.Sprintf("CHANNELS: channel %q has upper-case letters: NOTIFY %s without double quotes reaches %q instead",
				r.channel, r.channel, strings.ToLower(r.channel)))
		}
	}
	return out
}

// runtimeParameter is what lib/pq sends to the server as a setting because it does not know the key.
var runtimeParameter = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

var errBadDSN = errors.New("not a valid connection string (not shown: it may hold a password); " +
	"write postgres://user:password@host:port/database?sslmode=..., with any of % @ : / ? # and blanks in the password percent-encoded")

// checkDSN returns why a connection string can never work, and the variable to
// blame. lib/pq's own error holds the string, password and all, and a string it
// accepts may yet carry pieces of a password where they would be shown as a
// host, a database or a setting; none of these is ever printed (DESIGN fact 4).
func checkDSN(dsn string) (name string, err error) {
	if _, err := pq.NewConfig(""); err != nil {
		if os.Getenv("PGSERVICE") != "" {
			return "PGSERVICE", errors.New("the service file cannot be read or has no such service (its text is not shown because it may hold a password)")
		}
		// Speaks of PG* variables by name; PGPASSWORD is never part of it, for it cannot be wrong.
		return "PG*", errors.New(strings.TrimPrefix(err.Error(), "pq: "))
	}
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		return "DATABASE_URL", errBadDSN
	}
	for key := range cfg.Runtime {
		if !runtimeParameter.MatchString(key) {
			return "DATABASE_URL", errBadDSN
		}
	}
	if u, err := url.Parse(dsn); err == nil && strings.HasPrefix(u.Scheme, "postgres") {
		// A "/", "?" or "#" in a password ends the host part early.
		beforeQuery, _, _ := strings.Cut(dsn, "?")
		if u.Fragment != "" || strings.Contains(beforeQuery, "@") && u.User == nil || strings.Count(u.EscapedPath(), "/") > 1 {
			return "DATABASE_URL", errBadDSN
		}
		for key := range u.Query() {
			if !runtimeParameter.MatchString(key) {
				return "DATABASE_URL", errBadDSN
			}
		}
	}
	return "", nil
}

// dsn is the connection string with the name that pg_stat_activity shows unless the user chose one.
func (c *Config) dsn() string {
	const key, value = "fallback_application_name", "pglistener"
	if !strings.HasPrefix(c.DatabaseURL, "postgres://") && !strings.HasPrefix(c.DatabaseURL, "postgresql://") {
		return key + "=" + value + " " + c.DatabaseURL
	}
	separator := "?"
	if strings.Contains(c.DatabaseURL, "?") {
		separator = "&"
	}
	return c.DatabaseURL + separator + key + "=" + value
}

// limits are the bounds on each channel's handlers.
func (c *Config) limits() limits {
	return limits{
		queue: c.QueueSize, drop: c.Overflow == "drop", concurrency: c.Concurrency,
		timeout: c.HandlerTimeout, attempts: c.HandlerAttempts,
		retry: backoff{min: 500 * time.Millisecond, max: 30 * time.Second},
	}
}

// logger writes to w as LOG_LEVEL and LOG_FORMAT say.
func (c *Config) logger(w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration { // JSON would have it in nanoseconds
			return slog.String(a.Key, a.Value.Duration().String())
		}
		return a
	}}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// printVariables writes the table of variables, made from Config.
func printVariables(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for f := range variables() {
		name, value := variable(f)
		fmt.Fprintf(tw, "  %s\t%s\t%s\n", name, value, f.Tag.Get("usage"))
		if f.Tag.Get("file") != "" {
			fmt.Fprintf(tw, "  %s_FILE\t\ta file that holds %s\n", name, name)
		}
	}
	tw.Flush()
}

// variables yields the fields of Config that are read from the environment.
func variables() func(yield func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		t := reflect.TypeFor[Config]()
		for i := range t.NumField() {
			if f := t.Field(i); f.Tag.Get("env") != "" && !yield(f) {
				return
			}
		}
	}
}

// variable returns the name and the default of a field of Config.
func variable(f reflect.StructField) (name, value string) {
	name, options, _ := strings.Cut(f.Tag.Get("env"), ",")
	return name, strings.TrimPrefix(options, "default=")
}

func fieldOf(name string) (reflect.StructField, bool) {
	for f := range variables() {
		if n, _ := variable(f); n == name {
			return f, true
		}
	}
	return reflect.StructField{}, false
}

func anySet(lookup func(string) (string, bool), names ...string) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		value, _ := lookup(name)
		return value != ""
	})
}

// mentions says whether a variable has been complained of already.
func mentions(problems []error, name string) bool {
	return slices.ContainsFunc(problems, func(err error) bool { return strings.HasPrefix(err.Error(), name) })
}
