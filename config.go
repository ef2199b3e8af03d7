package main

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/config"
	"github.com/pglistener/pglistener/internal/logs"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/queue"
)

// Config is every variable: its own, and those that the packages declare.
type Config struct {
	DatabaseURL string `env:"DATABASE_URL" file:"true" usage:"connection string, URL or key=value; if empty, the standard PG* variables"`
	Channels    string `env:"CHANNELS" usage:"required; comma-separated channel[=[mode:]handler]"`

	Listener Settings
	Channel  ChannelSettings
	Features FeatureSettings
	Log      logs.Settings

	LogPayloads bool `env:"LOG_PAYLOADS,default=true" usage:"false keeps payloads, and what receivers answer, out of the log and last_error"`

	routes []config.Route
	lookup config.Lookuper
}

// Setup is what a handler may need from the program around it.
type Setup struct {
	notify.Setup
	Settings ChannelSettings
	Spec     string                 // the handler as it is written in CHANNELS
	IsSet    func(name string) bool // whether a variable of the channel is set
	DSN      string                 // of the database, for a handler that needs one
	Timeout  time.Duration          // PING_TIMEOUT: how long any single answer of it may take
}

// loadConfig reads the configuration through lookup. handlers and modes have what CHANNELS may name. It returns every
// problem at once, one error each, beginning with the name of the variable and free of secrets.
func loadConfig(lookup config.Lookuper, handlers map[string]newHandler, modes map[string]wrap) (*Config, []error) {
	c := &Config{lookup: lookup}
	problems := config.Decode(c, lookup)
	report := func(name, format string, args ...any) {
		problems = append(problems, fmt.Errorf(name+": "+format, args...))
	}
	complained := func(name string) bool {
		return slices.ContainsFunc(problems, func(err error) bool { return strings.HasPrefix(err.Error(), name) })
	}

	if name, err := config.CheckDSN(c.DatabaseURL, lookup); err != nil && !complained("DATABASE_URL") {
		report(name, "%w", err)
	}
	var wrong []error
	c.routes, wrong = config.ParseChannels(c.Channels, sortedKeys(handlers), sortedKeys(modes))
	for _, err := range wrong {
		report("CHANNELS", "%w", err)
	}
	if l := c.Listener; l.ReconnectMin > l.ReconnectMax && !complained("RECONNECT_") {
		report("RECONNECT_MIN", "%v is more than RECONNECT_MAX, which is %v", l.ReconnectMin, l.ReconnectMax)
	}
	return c, problems
}

// dsn is the connection string with the name that pg_stat_activity shows unless the user chose one.
func (c *Config) dsn() string { return config.WithApplicationName(c.DatabaseURL, "pglistener") }

// setup is what the handler of a route is given.
func (c *Config) setup(r config.Route, log *slog.Logger) Setup {
	return Setup{
		Setup:    notify.Setup{Channel: r.Channel, Log: log.With("channel", r.Channel), Grace: c.Listener.grace(), LogPayloads: c.LogPayloads},
		Settings: c.Channel,
		Spec:     r.Spec(),
		IsSet:    func(name string) bool { value, _ := c.lookup(name); return value != "" },
		DSN:      c.dsn(),
		Timeout:  c.Listener.PingTimeout,
	}
}

// makeChannels makes the handlers of all routes, and what the Listener needs to know of them. It returns an error for
// each that cannot be made.
func makeChannels(cfg *Config, handlers map[string]newHandler, modes map[string]wrap, log *slog.Logger) (channels []Channel, problems []error) {
	for _, r := range cfg.routes {
		s := cfg.setup(r, log)
		q := queue.Options{Settings: s.Settings.Queue, Limits: s.Settings.Limits, Secret: !cfg.LogPayloads}
		h, err := handlers[r.Handler](r.Arg, s)
		if err == nil {
			h, err = modes[r.Mode](h, s, &q)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("CHANNELS: channel %q: %w", r.Channel, err))
			continue
		}
		channels = append(channels, Channel{Name: r.Channel, Handler: h, Queue: q})
	}
	return channels, problems
}

func sortedKeys[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }
