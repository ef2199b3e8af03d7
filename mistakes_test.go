// feature: outbox execcmd webhook health

package main

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestLikelyMistakes runs the program as a new user might, with the fifteen likeliest mistakes, and looks for
// the one line that says what is wrong and what to do.
func TestLikelyMistakes(t *testing.T) {
	t.Parallel()
	a := testkit.NewAuthority(t)
	withTLS := testkit.TLSServer(t, a, time.Now().Add(time.Hour))
	tlsDSN := testkit.AppDSN(withTLS.Addr(), a.File())
	standby := testkit.StandbyOf(t, testkit.OwnServer(t))
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() })
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	refusing := testkit.NewReceiver(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "who are you", http.StatusForbidden) })
	private := outboxTable(t, testkit.DB(t))
	role := "m" + strconv.FormatInt(time.Now().UnixNano(), 36)
	testkit.Exec(t, testkit.DB(t), "create role "+role+" login password 'x'")
	t.Cleanup(func() { _, _ = testkit.DB(t).Exec("drop role " + role) })
	channel := testkit.ChannelName(t)
	const runs = -1 // it goes on

	for name, c := range map[string]struct {
		vars vars
		code int
		want []string // all in one line
	}{
		"no variable set":         {vars{}, cli.Usage, []string{"DATABASE_URL: not set", "postgres://user:password@host"}},
		"wrong password":          {fast(strings.Replace(tlsDSN, "p%40ss", "nope", 1), channel), cli.Failed, []string{"password authentication failed", "password in DATABASE_URL is wrong"}},
		"unknown parameter":       {fast(testkit.DSN(t)+"&connection_limit=5", channel), cli.Failed, []string{"connection_limit", "parameter in DATABASE_URL, the server does not know it"}},
		"wrong database":          {fast(strings.Replace(testkit.DSN(t), "/postgres?", "/nowhere?", 1), channel), cli.Failed, []string{"nowhere", "check the database name"}},
		"wrong port":              {fast("postgres://postgres@"+testkit.FreshAddress(t)+"/postgres?sslmode=disable", channel), runs, []string{"connection attempt failed", "refused", "check host and port"}},
		"TLS required":            {fast(strings.Replace(withTLS.DSN(), "postgres@", "app@", 1), channel), cli.Failed, []string{"no encryption", "sslmode"}},
		"certificate unknown":     {fast(testkit.AppDSN(withTLS.Addr(), testkit.NewAuthority(t).File()), channel), cli.Failed, []string{"certificate", "sslrootcert"}},
		"port of a pooler":        {probing(testkit.Bouncer(t, testkit.LocalServer(t), "transaction"), channel), runs, []string{"pooler in transaction mode", "session-mode port"}},
		"standby":                 {fast(standby.DSN(), channel), runs, []string{"cannot execute LISTEN during recovery", "waiting until it is promoted"}},
		"channel in upper case":   {fast(testkit.DSN(t), "Orders"), runs, []string{`"Orders" has upper-case letters`, `reaches \"orders\"`}},
		"no comma":                {fast(testkit.DSN(t), channel+" jobs"), runs, []string{"has a blank or a quote in it", "commas separate channels"}},
		"program not executable":  {fast(testkit.DSN(t), channel+"=exec:"+plain), cli.Usage, []string{"may not be executed", "chmod +x"}},
		"program missing":         {fast(testkit.DSN(t), channel+"=exec:drian"), cli.Usage, []string{`"drian" is not in PATH`}},
		"webhook refuses":         {fast(testkit.DSN(t), channel+"=doorbell:"+refusing.URL), runs, []string{"gave up", "status 403", "who are you"}},
		"table missing":           {fast(testkit.DSN(t), channel+"=outbox:log", vars{"OUTBOX_TABLE": "no_such_table"}), runs, []string{"outbox cannot be read", "no_such_table", "-outbox-schema | psql"}},
		"no privilege on a table": {fast(testkit.WithUser(testkit.DSN(t), role, "x"), channel+"=outbox:log", sending(private)), runs, []string{"permission denied", "grant select, insert, update, delete on"}},
		"address in use":          {fast(testkit.DSN(t), channel, vars{"HTTP_ADDR": taken.Addr().String()}), cli.Failed, []string{"HTTP_ADDR", "address already in use"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := runProgram(t, c.vars)
			testkit.Eventually(t, "no line says "+strings.Join(c.want, ", and ")+" in:\n", func() bool {
				for line := range strings.Lines(p.String()) {
					all := true
					for _, want := range c.want {
						all = all && strings.Contains(strings.ReplaceAll(line, `\"`, `"`), strings.ReplaceAll(want, `\"`, `"`))
					}
					if all {
						return true
					}
				}
				return false
			})
			if c.code == runs {
				p.signal(t, syscall.SIGTERM)
				p.exit(t, cli.OK, stopBound)
			} else {
				p.exit(t, c.code, testkit.Patience)
			}
		})
	}
}
