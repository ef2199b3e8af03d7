package env

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/pglistener/pglistener/internal/pgconn"
)

// Route is one entry of CHANNELS.
type Route struct {
	Channel string
	Mode    string // plain, unless one of the modes stands before the handler
	Handler string // a name in the handler table; log if there is none
	Arg     string // what follows the name and a colon

	Variable string // where the handler is written: CHANNELS or NAME_HANDLER
}

// Spec is the handler as it is written in CHANNELS.
func (r Route) Spec() string { return strings.TrimSuffix(r.Handler+":"+r.Arg, ":") }

// Shown is the mode and the handler without what may be a secret: of a URL the scheme and the host, of a command the
// program, of append the file, of others the name.
func (r Route) Shown() string {
	shown := r.Handler
	switch words, err := Words(r.Arg); {
	case strings.HasPrefix(r.Handler, "http"):
		shown += "://..."
		// Where the user or password has a slash, what looks like the host is a piece of them.
		if u, err := url.Parse(r.Spec()); err == nil && u.Host != "" && !strings.Contains(u.Path+u.RawQuery+u.Fragment, "@") {
			shown = u.Scheme + "://" + u.Host
		}
	case r.Handler == "append":
		shown = r.Spec()
	case isCommand(r.Handler) && err == nil && len(words) > 0 && !strings.Contains(words[0], "="): // as in PASSWORD=x ./program
		if shown += ":" + words[0]; len(words) > 1 {
			shown += strings.Replace(fmt.Sprintf(" (%d arguments)", len(words)-1), "(1 arguments", "(1 argument", 1)
		}
	}
	return r.Mode + " " + shown
}

func isCommand(handler string) bool { return handler == "exec" || handler == "pipe" }

// Warnings are about what is allowed and hardly ever meant. timeout is the channel's HANDLER_TIMEOUT, stop is SHUTDOWN_TIMEOUT.
func (r Route) Warnings(lookup Lookuper, timeout, stop time.Duration) (all []string) {
	if folded := strings.ToLower(r.Channel); folded != r.Channel {
		all = append(all, fmt.Sprintf("CHANNELS: channel %q has upper-case letters: NOTIFY %s without double quotes reaches %q instead",
			r.Channel, r.Channel, folded))
	}
	if strings.ContainsAny(r.Channel, " \t'\"") {
		all = append(all, fmt.Sprintf("CHANNELS: the name of channel %q has a blank or a quote in it: commas separate channels", r.Channel))
	}
	// The defaults are so on purpose: most handlers are quick, and what stops a service waits for half a minute.
	if timeout > stop && (IsSet(lookup, r.Channel, "HANDLER_TIMEOUT") || IsSet(lookup, "", "SHUTDOWN_TIMEOUT")) {
		all = append(all, fmt.Sprintf("HANDLER_TIMEOUT of channel %q is %v, longer than SHUTDOWN_TIMEOUT, which is %v: a stop cuts handlers short that take longer", r.Channel, timeout, stop))
	}
	return all
}

// Known are the names that CHANNELS may have.
type Known struct{ Handlers, Modes []string }

// ParseChannels reads CHANNELS: comma-separated channel[=[mode:]handler]; a handler may stand in NAME_HANDLER instead. It returns
// the entries that are right, and an error for each that is not, beginning with the variable's name. No error shows a handler,
// which may hold a secret.
func ParseChannels(s string, lookup Lookuper, known Known) (routes []Route, problems []error) {
	if err := separators(s); err != nil {
		return nil, []error{fmt.Errorf("CHANNELS: %w", err)}
	}
	seen, open := map[string]bool{}, false // open: what follows may be a piece of a handler that has a comma
	for i, entry := range strings.Split(s, ",") {
		channel, spec, given := strings.Cut(entry, "=")
		channel, spec = strings.TrimSpace(channel), strings.TrimSpace(spec)
		variable, long := "CHANNELS", Prefix(channel)+"HANDLER"
		err := channelName(channel)
		if value, _ := lookup(long); err == nil && Unquote(value) != "" && given {
			err = fmt.Errorf("has a handler here and in %s; leave one of them out", long)
		} else if err == nil && Unquote(value) != "" {
			variable, spec, given = long, Unquote(value), true
		}
		if _, after, _ := strings.Cut(channel, ":"); err == nil && slices.Contains(slices.Concat(known.Modes, known.Handlers), after) {
			err = errors.New("has the handler before the equals sign: write CHANNEL=[MODE:]HANDLER")
		}
		r, bad := parseHandler(spec, given, known)
		r.Channel, r.Variable = channel, variable
		switch {
		case err != nil:
		case seen[channel]:
			err = errors.New("is listed twice")
		case open && !given && !simple.MatchString(channel):
			err = errors.New("has no name of a channel")
		default:
			err = bad
		}
		seen[channel] = true
		who := fmt.Sprintf("channel %q", channel)
		switch {
		case open && variable == "CHANNELS":
			who = fmt.Sprintf("entry %d is not shown, for it may be the rest of a handler before it, and one with a comma goes into a variable such as ORDERS_HANDLER: it", i+1)
		case channel == "":
			who = fmt.Sprintf("entry %d", i+1)
		case !simple.MatchString(channel) || len(channel) > pgconn.MaxIdentifier:
			who = fmt.Sprintf("the channel of entry %d", i+1)
		}
		if err == nil {
			routes = append(routes, r)
		} else {
			problems = append(problems, fmt.Errorf("%s: %s %w", variable, who, err))
		}
		// Nothing secret can follow a file or a program without arguments.
		harmless := r.Arg == "" || variable != "CHANNELS" || (isCommand(r.Handler) || r.Handler == "append") && !strings.ContainsAny(r.Arg, " \t'\"\\=")
		open = open || !harmless || strings.ContainsAny(channel, "@?&%") || strings.Contains(channel, "://")
	}
	return routes, problems
}

var (
	simple     = regexp.MustCompile(`^[\pL_][\pL\pN_.$-]*$`) // a name that is no piece of a URL or a command
	lineBreak  = regexp.MustCompile(`[^,\s]\s*[\r\n]\s*[^,\s]`)
	plainNames = regexp.MustCompile(`^[\w.-]+(=\S*)?([;\s]+[\w.-]+(=\S*)?)+$`)
)

// separators finds a list that is written as if for another program.
func separators(s string) error {
	trimmed := strings.TrimSpace(s)
	switch n := len(trimmed); {
	case n == 0:
		return errors.New("not set; name the channels to listen on, such as CHANNELS=orders,jobs=doorbell:log")
	case n > 1 && (trimmed[0] == '"' || trimmed[0] == '\'') && trimmed[n-1] == trimmed[0]:
		return errors.New("the value has quotes around it, which docker's --env-file keeps: write it without")
	case lineBreak.MatchString(trimmed):
		return errors.New("the value has line breaks: put commas between channels")
	case plainNames.MatchString(s) && strings.Contains(s, ";"):
		return errors.New("channels are separated by commas, not by semicolons; a handler that has one goes into a variable such as ORDERS_HANDLER")
	}
	return nil
}

// channelName returns what is wrong with the name of a channel.
func channelName(channel string) error {
	switch {
	case channel == "":
		return errors.New("has no channel name")
	case strings.Contains(channel, "://"):
		return errors.New("is a URL; write CHANNEL=URL")
	case len(channel) > pgconn.MaxIdentifier:
		return fmt.Errorf("has %d bytes; PostgreSQL allows %d", len(channel), pgconn.MaxIdentifier)
	case !utf8.ValidString(channel) || strings.ContainsRune(channel, 0):
		return errors.New("is not valid UTF-8")
	}
	return nil
}

// parseHandler reads [mode:]handler[:arg]. Its error follows the name of the channel.
func parseHandler(spec string, given bool, known Known) (Route, error) {
	r := Route{Mode: "plain", Handler: "log"}
	if !given {
		return r, nil
	}
	modes := 0
	for rest := spec; ; modes++ {
		r.Handler, r.Arg, _ = strings.Cut(rest, ":")
		if !slices.Contains(known.Modes, r.Handler) {
			break
		}
		r.Mode, rest = r.Handler, r.Arg
	}
	switch {
	case modes > 1:
		return r, errors.New("has two modes; it can have one")
	case r.Handler == "" && modes == 0:
		return r, fmt.Errorf("has no handler after the %q", "=")
	case r.Handler == "":
		return r, fmt.Errorf("has no handler after the mode: %s:log or another", r.Mode)
	case !slices.Contains(known.Handlers, r.Handler):
		all := append(slices.Clone(known.Modes), known.Handlers...)
		if near := nearest(r.Handler, all); near != "" {
			return r, fmt.Errorf("has no handler or mode that is known; did you mean %q?", near)
		}
		return r, fmt.Errorf("has neither a mode (%s) nor a handler (%s) after the %q", strings.Join(known.Modes, ", "), strings.Join(known.Handlers, ", "), "=")
	}
	return r, nil
}

// Words splits s into words as a shell does, without expanding anything: blanks separate them, '...' takes everything as it is,
// "..." everything but \ before " and \, and \ outside quotes takes the character after it.
func Words(s string) (words []string, err error) {
	var word []byte
	quote, inWord := byte(0), false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case quote != 0 && c == quote:
			quote = 0
		case c == '\\' && quote != '\'' && i+1 < len(s) && (quote == 0 || s[i+1] == '"' || s[i+1] == '\\'):
			i++
			word, inWord = append(word, s[i]), true
		case quote == 0 && (c == '\'' || c == '"'):
			quote, inWord = c, true
		case quote == 0 && strings.IndexByte(" \t\r\n", c) >= 0:
			if inWord {
				words, word, inWord = append(words, string(word)), nil, false
			}
		default:
			word, inWord = append(word, c), true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("a quote %c is not closed", quote)
	}
	if inWord {
		words = append(words, string(word))
	}
	return words, nil
}
