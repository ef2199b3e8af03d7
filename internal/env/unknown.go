package env

import (
	"fmt"
	"slices"
	"strings"
)

// Unknown returns a warning for each variable of environ that nobody reads and that resembles one that somebody does: those of
// target, and those of channel, which may have a channel's prefix. No value is shown.
func Unknown(environ []string, target, channel any, routes []Route) (warnings []string) {
	known := names(target, "")
	for _, r := range routes {
		known = append(append(known, names(channel, Prefix(r.Channel))...), Prefix(r.Channel)+"HANDLER")
	}
	for _, v := range slices.Sorted(slices.Values(environ)) {
		name, value, _ := strings.Cut(v, "=")
		base, isFile := strings.CutSuffix(name, "_FILE")
		near := nearest(name, known)
		if near == "" && len(routes) > 0 && slices.Contains(known, Prefix(routes[0].Channel)+name) {
			near = Prefix(routes[0].Channel) + name
		}
		switch {
		case value == "" || slices.Contains(known, name):
		case slices.ContainsFunc(routes, func(r Route) bool { return slices.Contains(known, strings.TrimPrefix(name, Prefix(r.Channel))) }):
			warnings = append(warnings, name+": nobody reads this variable; without the channel's name before it, it is for all channels")
		case isFile && slices.Contains(known, base):
			warnings = append(warnings, fmt.Sprintf("%s: nobody reads this variable; %s cannot come from a file", name, base))
		case near != "":
			warnings = append(warnings, fmt.Sprintf("%s: nobody reads this variable; did you mean %s?", name, near))
		case strings.HasSuffix(name, "_HANDLER"):
			warnings = append(warnings, name+": nobody reads this variable: CHANNELS has no channel of that name")
		}
	}
	return warnings
}

// names are those under which the variables of target are read with a prefix, or without one.
func names(target any, prefix string) (all []string) {
	for _, v := range Variables(target) {
		if prefix != "" || v.field.Tag.Get("only") != "channel" {
			all = append(all, prefix+v.Name)
		}
		if v.File {
			all = append(all, prefix+v.Name+"_FILE")
		}
	}
	return all
}

// nearest is the one of words that s is most likely to be a misspelling of, or "".
func nearest(s string, words []string) string {
	for wrong := 1; len(s) >= 4 && wrong <= 1+len(s)/12; wrong++ { // so many letters may be
		if i := slices.IndexFunc(words, func(w string) bool { return w != s && within(s, w, wrong) }); i >= 0 {
			return words[i]
		}
	}
	return ""
}

// within says whether b can be made of a by putting in, leaving out, replacing or exchanging with their neighbour up to n letters. Its
// time grows with the power of n, which is small unless both are long.
func within(a, b string, n int) bool {
	for a != "" && b != "" && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	switch {
	case a == "" || b == "" || n == 0 || max(len(a)-len(b), len(b)-len(a)) > n: // then they are too far apart
		return len(a)+len(b) <= n
	case len(a) > 1 && len(b) > 1 && a[0] == b[1] && a[1] == b[0] && within(a[2:], b[2:], n-1):
		return true
	}
	return within(a[1:], b, n-1) || within(a, b[1:], n-1) || within(a[1:], b[1:], n-1)
}
