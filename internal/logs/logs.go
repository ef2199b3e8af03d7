// Package logs makes the program's logger.
package logs

import (
	"io"
	"log/slog"
)

// Settings are the variables of the log.
type Settings struct {
	Level  string `env:"LOG_LEVEL,default=info" oneof:"debug info warn error" usage:"debug, info, warn or error"`
	Format string `env:"LOG_FORMAT,default=text" oneof:"text json" usage:"text or json, on stderr"`
}

// New makes a logger that writes to w as the settings say; unknown words mean the defaults.
func New(s Settings, w io.Writer) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(s.Level))
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration { // JSON would have it in nanoseconds
			return slog.String(a.Key, a.Value.Duration().String())
		}
		return a
	}}
	if s.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
