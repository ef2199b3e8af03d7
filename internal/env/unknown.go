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
		case isFile && slices.Contains(known, base):
			warnings = append(warnings, fmt.Sprintf("%s: nobody reads this variable; %s cannot come from a file", name, base))
		case near != "":
			warnings = append(warnings, fmt.Sprintf("%s: nobody reads this variable; did you mean %s?", name, near))
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
	best, most := "", 1+len(s)/12 // so many letters may be wrong
	if len(s) < 4 {
		return ""
	}
	for _, w := range words {
		if d := distance(s, w); d > 0 && d <= most && (best == "" || d < distance(s, best)) {
			best = w
		}
	}
	return best
}

// distance is how many letters have to be put in, left out, replaced or exchanged with their neighbour to make b of a.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		for j := range rows[i] {
			if i == 0 || j == 0 {
				rows[i][j] = i + j
				continue
			}
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
