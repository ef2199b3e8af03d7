package main

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/env"
	"github.com/pglistener/pglistener/internal/logs"
	"github.com/pglistener/pglistener/internal/memory"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/queue"
	"github.com/pglistener/pglistener/internal/workers"
)

// Config is every variable: its own, and those that the packages declare.
type Config struct {
	DatabaseURL string `env:"DATABASE_URL" file:"true" usage:"connection string, URL or key=value; if empty, the standard PG* variables"`
	Channels    string `env:"CHANNELS" quotes:"keep" usage:"required; comma-separated channel[=[mode:]handler]"`

	Listener Settings
	Channel  ChannelSettings
	Features FeatureSettings
	Log      logs.Settings

	QueueMemory env.Bytes `env:"QUEUE_MEMORY,default=64MB" usage:"bound on what waits in all queues together, and on rows that are claimed ahead; 1MB at least, such as 64MB or 1GB"`

	LogPayloads bool `env:"LOG_PAYLOADS,default=true" usage:"false keeps payloads, and what receivers answer, out of the log and last_error"`

	memory     *memory.Budget
	routes     []env.Route
	lookup     env.Lookuper
	perChannel map[string]ChannelSettings // by channel, and
	set        map[string][]string        // the variables that are set for it alone
}

// Setup is what a handler may need from the program around it.
type Setup struct {
	notify.Setup
	Settings ChannelSettings
	Spec     string        // the handler as it is written in CHANNELS
	Lookup   env.Lookuper  // the environment
	DSN      string        // of the database, for a handler that needs one
	Timeout  time.Duration // PING_TIMEOUT: how long any single answer of it may take
	Memory   int64         // how many bytes may wait
}

// loadConfig reads the configuration through lookup. handlers and modes have what CHANNELS may name. It returns every problem at
// once, one error each, beginning with the name of the variable and free of secrets.
func loadConfig(lookup env.Lookuper, handlers map[string]newHandler, modes map[string]wrap) (*Config, []error) {
	c := &Config{lookup: lookup}
	problems := env.Decode(c, lookup)
	complained := func(name string) bool {
		return slices.ContainsFunc(problems, func(err error) bool { return strings.HasPrefix(err.Error(), name) })
	}
	if name, err := env.CheckDSN(c.DatabaseURL, lookup); err != nil && !complained("DATABASE_URL") {
		problems = append(problems, fmt.Errorf("%s: %w", name, err))
	}
	routes, wrong := env.ParseChannels(c.Channels, lookup, env.Known{Handlers: sortedKeys(handlers), Modes: sortedKeys(modes)})
	c.routes, problems = routes, append(problems, wrong...)
	c.memory = memory.New(int64(c.QueueMemory), len(routes))
	c.perChannel, c.set, wrong = env.DecodeChannels(c.Channel, routes, lookup)
	problems = append(problems, wrong...)
	if l := c.Listener; l.ReconnectMin > l.ReconnectMax && !complained("RECONNECT_") {
		problems = append(problems, fmt.Errorf("RECONNECT_MIN: %v is more than RECONNECT_MAX, which is %v", l.ReconnectMin, l.ReconnectMax))
	}
	return c, problems
}

// warnings are about what is allowed and hardly ever meant, and about variables of environ that nobody reads.
func (c *Config) warnings(environ []string) (all []string) {
	for _, r := range c.routes {
		all = append(all, r.Warnings(c.lookup, c.perChannel[r.Channel].Timeout, c.Listener.ShutdownTimeout)...)
		if level := c.Log.Level; r.Handler == "log" && (level == "warn" || level == "error") {
			all = append(all, fmt.Sprintf("LOG_LEVEL: it is %s, at which the handler log of channel %q writes nothing; set it to info if these lines matter", level, r.Channel))
		}
	}
	return append(all, env.Unknown(environ, c, &ChannelSettings{}, c.routes)...)
}

// dsn is the connection string with what holds unless the user chose otherwise.
func (c *Config) dsn() string { return env.WithDefaults(c.DatabaseURL, "pglistener") }

// setup is what the handler of a route is given.
func (c *Config) setup(r env.Route, log *slog.Logger) Setup {
	return Setup{
		Setup:    notify.Setup{Channel: r.Channel, Log: log.With("channel", r.Channel), Grace: c.Listener.grace(), LogPayloads: c.LogPayloads},
		Settings: c.perChannel[r.Channel], Spec: r.Spec(), Lookup: c.lookup,
		DSN: c.dsn(), Timeout: c.Listener.PingTimeout, Memory: c.memory.Share(),
	}
}

// makeChannels makes the handlers of all routes, and what the Listener needs to know of them. It returns an error for each that
// cannot be made.
func makeChannels(cfg *Config, handlers map[string]newHandler, modes map[string]wrap, log *slog.Logger) (channels []Channel, problems []error) {
	pool := new(workers.Pool)
	for _, r := range cfg.routes {
		s := cfg.setup(r, log)
		q := queue.Options{Settings: s.Settings.Queue, Limits: s.Settings.Limits, Secret: !cfg.LogPayloads, Memory: cfg.memory, Go: pool.Go}
		h, err := handlers[r.Handler](r.Arg, s)
		if err == nil {
			h, err = modes[r.Mode](h, s, &q)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: channel %q: %w", r.Variable, r.Channel, err))
			continue
		}
		channels = append(channels, Channel{Name: r.Channel, Handler: h, Queue: q})
	}
	return channels, problems
}

func sortedKeys[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }
