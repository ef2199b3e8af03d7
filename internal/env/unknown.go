package env

import (
	"fmt"
	"slices"
	"strings"
)

// Collisions returns an error for each two channels whose variables have the same prefix, if one of them is set.
func Collisions(routes []Route, set []string) (problems []error) {
	first := map[string]string{}
	for _, r := range routes {
		p := Prefix(r.Channel)
		other, taken := first[p]
		if !taken {
			first[p] = r.Channel
			continue
		}
		if i := slices.IndexFunc(set, func(name string) bool { return strings.HasPrefix(name, p) }); i >= 0 {
			problems = append(problems, fmt.Errorf("%s: it is for channel %q as well as for %q; rename one of the channels", set[i], other, r.Channel))
		}
	}
	return problems
}

// Unknown returns a warning for each variable of environ that nobody reads and that resembles one that somebody does: those of
// target, and those of channel, which may have a channel's prefix. No value is shown.
func Unknown(environ []string, target, channel any, routes []Route) (warnings []string) {
	known, perChannel := names(target), append(names(channel), "HANDLER")
	var prefixes []string
	for _, r := range routes {
		p := Prefix(r.Channel)
		prefixes = append(prefixes, p)
		for _, name := range perChannel {
			known = append(known, p+name)
		}
	}
	slices.Sort(environ)
	for _, v := range environ {
		name, _, _ := strings.Cut(v, "=")
		if slices.Contains(known, name) {
			continue
		}
		near := nearest(name, known)
		if base, isFile := strings.CutSuffix(name, "_FILE"); isFile && slices.Contains(known, base) {
			warnings = append(warnings, fmt.Sprintf("%s: nobody reads this variable; %s cannot come from a file", name, base))
			continue
		}
		for _, each := range perChannel {
			// Another program may have a HANDLER_TIMEOUT of its own: the prefix has to resemble one of ours.
			if prefix, ok := strings.CutSuffix(name, each); ok && near == "" && prefix != "" {
				if p := nearest(prefix, prefixes); p != "" {
					near = p + each
				}
			}
		}
		if near != "" {
			warnings = append(warnings, fmt.Sprintf("%s: nobody reads this variable; did you mean %s?", name, near))
		}
	}
	return warnings
}

func names(target any) (all []string) {
	for _, v := range Variables(target) {
		if all = append(all, v.Name); v.File {
			all = append(all, v.Name+"_FILE")
		}
	}
	return all
}

// nearest is the one of words that s is most likely to be a misspelling of, or "".
func nearest(s string, words []string) string {
	best, most := "", 1+len(s)/8 // so many letters may be wrong
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
