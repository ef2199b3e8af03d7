package env

import (
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pglistener/pglistener/internal/pgconn"
)

func FuzzParseChannels(f *testing.F) {
	for _, s := range []string{"orders", "a=log,b=doorbell:exec:./x y", "=", ",", "a==", "a=plain:log", "a=doorbell:", "\xff", "a,a", strings.Repeat("x", 64)} {
		f.Add(s)
	}
	handlers, modes := []string{"log", "exec"}, []string{"plain", "doorbell"}
	f.Fuzz(func(t *testing.T, s string) {
		routes, problems := ParseChannels(s, func(string) (string, bool) { return "", false }, Known{handlers, modes})
		if len(problems) == 0 && len(routes) != strings.Count(s, ",")+1 {
			t.Errorf("%d entries without a complaint became %d channels", strings.Count(s, ",")+1, len(routes))
		}
		seen := map[string]bool{}
		for _, r := range routes {
			if r.Channel == "" || len(r.Channel) > pgconn.MaxIdentifier || !utf8.ValidString(r.Channel) || seen[r.Channel] || !slices.Contains(handlers, r.Handler) {
				t.Errorf("accepted %+v", r)
			}
			seen[r.Channel] = true
		}
	})
}
