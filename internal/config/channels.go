package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/pglistener/pglistener/internal/pgconn"
)

// Route is one entry of CHANNELS.
type Route struct {
	Channel string
	Mode    string // plain, unless one of the modes stands before the handler
	Handler string // a name in the handler table; log if there is none
	Arg     string // what follows the name and a colon
}

// Spec is the handler as it is written in CHANNELS.
func (r Route) Spec() string { return strings.TrimSuffix(r.Handler+":"+r.Arg, ":") }

// Warning is about a channel that is allowed and hardly ever meant; "" is none.
func (r Route) Warning() string {
	folded := strings.ToLower(r.Channel)
	if folded == r.Channel {
		return ""
	}
	return fmt.Sprintf("CHANNELS: channel %q has upper-case letters: NOTIFY %s without double quotes reaches %q instead",
		r.Channel, r.Channel, folded)
}

// ParseChannels reads CHANNELS: comma-separated channel[=[mode:]handler]. handlers
// and modes are the names that are known. It returns the entries that are right,
// and an error for each that is not.
func ParseChannels(s string, handlers, modes []string) (routes []Route, problems []error) {
	if strings.TrimSpace(s) == "" {
		return nil, []error{errors.New("not set; name the channels to listen on, such as CHANNELS=orders,jobs=doorbell:log")}
	}
	seen := map[string]bool{}
	for i, entry := range strings.Split(s, ",") {
		r, err := parseEntry(entry, handlers, modes)
		switch {
		case r.Channel == "":
			err = fmt.Errorf("entry %d has no channel name", i+1)
		case seen[r.Channel]:
			err = fmt.Errorf("channel %q is listed twice", r.Channel)
		}
		seen[r.Channel] = true
		if err != nil {
			problems = append(problems, err)
			continue
		}
		routes = append(routes, r)
	}
	return routes, problems
}

func parseEntry(entry string, handlers, modes []string) (Route, error) {
	channel, spec, given := strings.Cut(entry, "=")
	r := Route{Channel: strings.TrimSpace(channel), Mode: "plain", Handler: "log"}
	if given {
		r.Handler, r.Arg, _ = strings.Cut(strings.TrimSpace(spec), ":")
		if slices.Contains(modes, r.Handler) {
			r.Mode = r.Handler
			r.Handler, r.Arg, _ = strings.Cut(r.Arg, ":")
		}
	}
	switch {
	case len(r.Channel) > pgconn.MaxIdentifier:
		return r, fmt.Errorf("channel %q has %d bytes; PostgreSQL allows %d", r.Channel, len(r.Channel), pgconn.MaxIdentifier)
	case !utf8.ValidString(r.Channel) || strings.ContainsRune(r.Channel, 0):
		return r, fmt.Errorf("channel %q is not valid UTF-8", r.Channel)
	case r.Handler == "" && r.Mode == "plain":
		return r, fmt.Errorf("channel %q has no handler after the %q", r.Channel, "=")
	case r.Handler == "":
		return r, fmt.Errorf("channel %q has no handler after the mode: %s:log or another", r.Channel, r.Mode)
	case !slices.Contains(handlers, r.Handler):
		return r, fmt.Errorf("channel %q: %q is neither a mode (%s) nor a handler (%s)", r.Channel, r.Handler, strings.Join(modes, ", "), strings.Join(handlers, ", "))
	}
	return r, nil
}
