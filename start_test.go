package main

import (
	"strings"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The tests of the start: what cannot work ends it with one clear line.

func TestHopelessStartsEndAtOnce(t *testing.T) {
	t.Parallel()
	a := testkit.NewAuthority(t)
	root := a.File()
	good := testkit.TLSServer(t, a, time.Now().Add(time.Hour))
	expired := testkit.TLSServer(t, a, time.Now().Add(-time.Hour))
	dsn := testkit.AppDSN(good.Addr(), root)
	for name, c := range map[string]struct{ dsn, want string }{
		"wrong password":      {strings.Replace(dsn, "p%40ss", "hunter2", 1), "password in DATABASE_URL is wrong"},
		"unknown role":        {strings.Replace(good.DSN(), "postgres@", "nobody@", 1), "pg_hba.conf"},
		"unknown database":    {strings.Replace(good.DSN(), "/postgres?", "/nowhere?", 1), "database name"},
		"expired certificate": {testkit.AppDSN(expired.Addr(), root), "certificate"},
		"unknown authority":   {testkit.AppDSN(good.Addr(), testkit.NewAuthority(t).File()), "certificate"},
		"wrong host name":     {strings.Replace(dsn, "localhost", "127.0.0.1", 1), "certificate"},
		"TLS required":        {strings.Replace(strings.Replace(dsn, "verify-full", "disable", 1), "&sslrootcert="+root, "", 1), "pg_hba.conf"},
		"no TLS there":        {testkit.WithParams(ownServerOnce(t), "sslmode", "require"), "sslmode=disable"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := runProgram(t, fast(c.dsn, testkit.ChannelName(t)))
			p.exit(t, cli.Failed, testkit.Patience)
			var plain []string
			for line := range strings.Lines(p.String()) {
				if strings.HasPrefix(line, "pglistener: ") {
					plain = append(plain, line)
				}
			}
			if len(plain) != 1 || !strings.Contains(plain[0], c.want) {
				t.Errorf("want one line with %q, got %q", c.want, plain)
			}
			for _, secret := range []string{"hunter2", "p@ss", "p%40ss"} {
				if strings.Contains(p.String(), secret) {
					t.Error("the password is shown")
				}
			}
		})
	}
}

// ownServerOnce is the DSN of a server without TLS.
func ownServerOnce(t *testing.T) string { return testkit.OwnServer(t).DSN() }

func TestRunningListenerOutlivesWhatIsHopelessAtTheStart(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	s := testkit.OwnServer(t)
	db := testkit.Open(t, s.DSN())
	testkit.Exec(t, db, "create role app login")
	dsn := strings.Replace(s.DSN(), "postgres@", "app@", 1)
	r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
	testkit.Exec(t, db, "alter role app nologin")
	testkit.Exec(t, db, "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'")
	r.Wait(t, "connection attempt failed", 2)
	testkit.Exec(t, db, "alter role app login")
	r.Wait(t, "reconnected", 1)
	testkit.SendOn(t, db, channel, "after")
	r.expect(t, "after")
}

func TestStartTimeout(t *testing.T) {
	t.Parallel()
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	proxy.Mute(true)
	p := runProgram(t, fast(dsn, testkit.ChannelName(t), vars{"START_TIMEOUT": "1500ms"}))
	p.exit(t, cli.Failed, 1500*time.Millisecond+2*time.Second)
	if !strings.Contains(p.String(), "START_TIMEOUT (1.5s)") || !strings.Contains(p.String(), "i/o timeout") {
		t.Errorf("it says: %s", p)
	}
}

func TestStartTimeoutIsOverOnceListening(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	r := start(t, fast(testkit.DSN(t), channel+"=test", vars{"START_TIMEOUT": "1s"}), nil).listening(t)
	time.Sleep(1200 * time.Millisecond) // that nothing happens is the point
	testkit.Send(t, channel, "after")
	r.expect(t, "after")
}
