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
)

// TestLikelyMistakes runs the program as a new user might, with the fifteen likeliest
// mistakes, and looks for the one line that says what is wrong and what to do.
func TestLikelyMistakes(t *testing.T) {
	t.Parallel()
	if sharedServer == nil {
		skip(t, "needs local servers to make mistakes with; TEST_DATABASE_URL is set")
	}
	a := newAuthority(t)
	withTLS := tlsServer(t, a, time.Now().Add(time.Hour))
	tlsDSN := appDSN(withTLS.Addr(), a.file())
	standby := standbyOf(t, ownServer(t))
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() })
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	refusing := newReceiver(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "who are you", http.StatusForbidden) })
	private := outboxTable(t, sharedDB)
	role := "m" + strconv.FormatInt(time.Now().UnixNano(), 36)
	execSQL(t, sharedDB, "create role "+role+" login password 'x'")
	t.Cleanup(func() { _, _ = sharedDB.Exec("drop role " + role) })
	channel := channelName(t)
	const runs = -1 // it goes on

	for name, c := range map[string]struct {
		vars vars
		code int
		want []string // all in one line
	}{
		"no variable set":         {vars{}, exitUsage, []string{"DATABASE_URL: not set", "postgres://user:password@host"}},
		"wrong password":          {fast(strings.Replace(tlsDSN, "p%40ss", "nope", 1), channel), exitFailed, []string{"password authentication failed", "password in DATABASE_URL is wrong"}},
		"wrong database":          {fast(strings.Replace(sharedDSN, "/postgres?", "/nowhere?", 1), channel), exitFailed, []string{"nowhere", "check the database name"}},
		"wrong port":              {fast("postgres://postgres@"+freshAddress(t)+"/postgres?sslmode=disable", channel), runs, []string{"connection attempt failed", "refused", "check host and port"}},
		"TLS required":            {fast(strings.Replace(withTLS.DSN(), "postgres@", "app@", 1), channel), exitFailed, []string{"no encryption", "sslmode"}},
		"certificate unknown":     {fast(appDSN(withTLS.Addr(), newAuthority(t).file()), channel), exitFailed, []string{"certificate", "sslrootcert"}},
		"port of a pooler":        {probing(bouncer(t, sharedServer, "transaction"), channel), runs, []string{"pooler in transaction mode", "session-mode port"}},
		"standby":                 {fast(standby.DSN(), channel), runs, []string{"cannot execute LISTEN during recovery", "waiting until it is promoted"}},
		"channel in upper case":   {fast(sharedDSN, "Orders"), runs, []string{`"Orders" has upper-case letters`, `reaches \"orders\"`}},
		"program not executable":  {fast(sharedDSN, channel+"=exec:"+plain), exitUsage, []string{"may not be executed", "chmod +x"}},
		"program missing":         {fast(sharedDSN, channel+"=exec:drian"), exitUsage, []string{`"drian" is not in PATH`}},
		"webhook refuses":         {fast(sharedDSN, channel+"=doorbell:"+refusing.URL), runs, []string{"gave up", "status 403", "who are you"}},
		"table missing":           {fast(sharedDSN, channel+"=outbox:log", vars{"OUTBOX_TABLE": "no_such_table"}), runs, []string{"outbox cannot be read", "no_such_table", "-outbox-schema | psql"}},
		"no privilege on a table": {fast(withUser(sharedDSN, role, "x"), channel+"=outbox:log", sending(private)), runs, []string{"permission denied", "grant select, update, delete on"}},
		"address in use":          {fast(sharedDSN, channel, vars{"HTTP_ADDR": taken.Addr().String()}), exitFailed, []string{"HTTP_ADDR", "address already in use"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := runProgram(t, c.vars)
			eventually(t, "no line says "+strings.Join(c.want, ", and ")+" in:\n", func() bool {
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
				p.exit(t, exitOK, stopBound)
			} else {
				p.exit(t, c.code, patience)
			}
		})
	}
}
