package env

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pglistener/pglistener/internal/pgconn"
)

// FuzzParseChannels takes any value, and any that follows a secret in a URL or among the arguments of a program.
func FuzzParseChannels(f *testing.F) {
	for _, s := range []string{"orders", "a=log,b=doorbell:exec:./x y", "=", ",", "a==", "a=plain:log", "a=doorbell:", "\xff", "a,a", strings.Repeat("x", 64),
		"?a=1,2&token=", ",b=nope,", ",hunter2=", "x,hunter2;y", "\n", `" 'x`, "@h,", ",log=log,z=", ",c://", `",x"`} {
		f.Add(s, s)
	}
	f.Add(",b=nop"+strings.Repeat("\xb2", 3000)+"e,", ",b=nope,") // no word is like it, and it takes no time to say so
	f.Fuzz(func(t *testing.T, s, more string) {
		parse := func(s string) []Route {
			routes, problems := ParseChannels(s, environ{}.lookup, known)
			if len(problems) == 0 && len(routes) != strings.Count(s, ",")+1 {
				t.Errorf("%q: %d entries without a complaint became %d channels", s, strings.Count(s, ",")+1, len(routes))
			}
			for _, p := range problems {
				if strings.ContainsAny(p.Error(), "\r\n") || !strings.HasPrefix(p.Error(), "CHANNELS: ") {
					t.Errorf("%q: not one line that begins with the variable: %q", s, p)
				}
			}
			seen := map[string]bool{}
			for _, r := range routes {
				if r.Channel == "" || len(r.Channel) > pgconn.MaxIdentifier || !utf8.ValidString(r.Channel) || seen[r.Channel] || !slices.Contains(known.Handlers, r.Handler) {
					t.Errorf("%q: accepted %+v", s, r)
				}
				seen[r.Channel] = true
				r.Warnings(nil, 0, 0)
			}
			return routes
		}
		parse(s)
		for _, before := range []string{"https://h/", "outbox:http://h:80?", "https://user:", "doorbell:exec:./p --password=", "htps://", "kafka:user:"} {
			text := "orders=" + before + s + "hunter2" + more
			_, problems := ParseChannels(text, environ{}.lookup, known)
			for _, p := range problems {
				if strings.Contains(strings.ToLower(p.Error()), "hunter2") {
					t.Errorf("%q: shows the secret: %v", text, p)
				}
			}
			for _, r := range parse(text) {
				if r.Channel == "orders" && !strings.HasPrefix(before, "https://user:") && strings.Contains(strings.ToLower(r.Shown()), "hunter2") {
					t.Errorf("%q: shows the secret: %s", text, r.Shown())
				}
			}
		}
	})
}

// What belongs behind the equals sign is no part of a name.
func TestHandlerBeforeTheEqualsSign(t *testing.T) {
	known := Known{Handlers: []string{"log", "exec"}, Modes: []string{"plain", "outbox"}}
	for _, s := range []string{"orders:outbox=exec:cat", "orders:log", "orders:exec=x"} {
		if _, problems := ParseChannels(s, func(string) (string, bool) { return "", false }, known); len(problems) != 1 || !strings.Contains(problems[0].Error(), "write CHANNEL=[MODE:]HANDLER") {
			t.Errorf("%s: %v", s, problems)
		}
	}
	if _, problems := ParseChannels("tenant:7=log", func(string) (string, bool) { return "", false }, known); problems != nil {
		t.Errorf("a colon in a name: %v", problems)
	}
}

// What a comma cuts off a handler is not shown, whatever it looks like; and it is said what to do.
func TestPiecesOfHandlersAreNotShown(t *testing.T) {
	const hidden = "entry 2 is not shown, for it may be the rest of a handler before it, and one with a comma goes into a variable such as ORDERS_HANDLER: it "
	for s, want := range map[string]string{
		"orders=https://h/x?a=1,2&token=hunter2":             hidden + "has neither a mode",
		"orders=exec:./p --password hunter2,x y":             hidden + "has no name of a channel",
		"orders=https://h/?t=1,hunter2=":                     hidden + "has no handler after the",
		"orders=https://h/?t=1,hunter2=x":                    hidden + "has neither a mode",
		"orders=https://h/?t=1,2=log,hunter2=x":              "entry 3 is not shown",
		"orders=https://h/?t=1,hunter2=htps":                 hidden + `has no handler or mode that is known; did you mean "https"?`,
		"orders=https://u:12,hunter2@h/":                     hidden + "has no name of a channel",
		"orders=exec:./p --password x,hunter2=":              hidden + "has no handler after the",
		"orders=exec:./p 'hunter2,x y'":                      hidden + "has no name of a channel",
		"orders=exec:PASSWORD=1,hunter2=x":                   hidden + "has neither a mode",
		"orders=https://h/,orders":                           hidden + "is listed twice",
		"orders=https://h/," + strings.Repeat("hunter2", 10): hidden + "has 70 bytes",
		"https://h/?token=hunter2":                           "the channel of entry 1 is a URL",
		"me:hunter2@host=x":                                  "the channel of entry 1 has neither",
		"orders=https://h/x;hunter2":                         "commas, not by semicolons",
		"orders=https://h/x,hunter2\ny":                      "line breaks",
		"orders=hunter2":                                     `channel "orders" has neither`,
		// After a handler without arguments nothing can be a piece of it.
		"a=exec:./p,orders=drian":            `channel "orders" has neither`,
		"a=append:/var/log/x.log,orders=nay": `channel "orders" has neither`,
		"a=doorbell:log,orders=drian":        `channel "orders" has neither`,
		"long,orders=drian":                  `channel "orders" has neither`,
	} {
		_, problems := ParseChannels(s, environ{"LONG_HANDLER": "https://h/x?a=1,2"}.lookup, known)
		if len(problems) != 1 || !strings.HasPrefix(problems[0].Error(), "CHANNELS: ") || !strings.Contains(problems[0].Error(), want) || strings.Contains(strings.ToLower(problems[0].Error()), "hunter2") {
			t.Errorf("%s:\n%v\nwant\n%s", s, problems, want)
		}
	}
	for _, s := range []string{"https://u:hunter2@h/x,hunter2=x", "u:hunter2@h=nope,hunter2=x", "a=nope," + strings.Repeat("x", 64)} {
		_, problems := ParseChannels(s, environ{}.lookup, known)
		if text := errors.Join(problems...).Error(); strings.Contains(text, "hunter2") || strings.Contains(text, "xxx") || !strings.Contains(text, "\n") {
			t.Errorf("%s: %v", s, problems)
		}
	}
}
