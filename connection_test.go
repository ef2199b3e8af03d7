package main

import (
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/pgtest"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

func TestTLSVerifyFullAndSCRAM(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	a := testkit.NewAuthority(t)
	s := testkit.TLSServer(t, a, time.Now().Add(time.Hour))
	proxy, err := pgtest.NewProxy(s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	db := testkit.Open(t, s.DSN())
	r := start(t, fast(testkit.AppDSN(proxy.Addr(), a.File()), channel+"=test"), nil).listening(t)
	testkit.SendOn(t, db, channel, "secret")
	r.expect(t, "secret")
	// The bounds hold inside TLS too.
	proxy.Silence()
	silenced := time.Now()
	deaf := r.heardAgain(t, db, channel).Sub(silenced)
	if bound := testInterval + testTimeout + time.Second; deaf > bound {
		t.Errorf("deaf for %v, more than %v", deaf, bound)
	}
	if strings.Contains(r.String(), "word") {
		t.Error("the password is in the log")
	}
}

func TestSeveralHosts(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	free, err := pgtest.FreePort() // nothing listens there
	if err != nil {
		t.Fatal(err)
	}
	dead := net.JoinHostPort("127.0.0.1", strconv.Itoa(free))
	_, port, _ := net.SplitHostPort(proxy.Addr())
	dsn = strings.Replace(dsn, proxy.Addr(), "127.0.0.1,127.0.0.1", 1)
	dsn = testkit.WithParams(dsn, "port", strconv.Itoa(free)+","+port, "target_session_attrs", "read-write")
	r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
	testkit.Send(t, channel, "through the second")
	r.expect(t, "through the second")
	proxy.Refuse(true)
	proxy.Reset()
	if line := r.Wait(t, "connection attempt failed", 1); !strings.Contains(line["error"].(string), dead) {
		t.Errorf("the error does not name each host: %v", line)
	}
	proxy.Refuse(false)
	r.Wait(t, "reconnected", 1)
	testkit.Send(t, channel, "again")
	r.expect(t, "again")
}

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn := "host=" + testkit.LocalServer(t).SocketDir() + " port=" + strconv.Itoa(testkit.LocalServer(t).Port) + " user=postgres dbname=postgres"
	r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
	testkit.Send(t, channel, "hello")
	r.expect(t, "hello")
}

func TestConnectTimeoutOfTheDSNHolds(t *testing.T) {
	t.Parallel()
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	proxy.Mute(true)
	r := start(t, fast(testkit.WithParams(dsn, "connect_timeout", "1"), testkit.ChannelName(t)+"=test", vars{"PING_TIMEOUT": "1h"}), nil)
	line := r.Wait(t, "connection attempt failed", 1)
	if !strings.Contains(line["error"].(string), "timeout") {
		t.Errorf("unexpected cause: %v", line)
	}
	// And once connected it is lifted.
	proxy.Mute(false)
	r.listening(t)
	time.Sleep(1500 * time.Millisecond) // that nothing happens is the point
	if lines := r.All("disconnected"); len(lines) > 0 {
		t.Errorf("disconnected: %v", lines)
	}
}

// TestPingThatIsRefused needs a server that answers an empty query with an error. PostgreSQL cannot be made to,
// a pooler that has lost its server does; lib/pq panics (fact 9).
func TestPingThatIsRefused(t *testing.T) {
	t.Parallel()
	addr := testkit.FakeServer(t, func(send testkit.Sender) func(string) {
		pings := 0
		return func(text string) {
			switch {
			case text != "":
				send('C', "LISTEN\x00")
			case pings == 0: // register's
				send('I', "")
			default:
				send('E', "SERROR\x00C08P01\x00Mno server\x00\x00")
			}
			if text == "" {
				pings++
			}
		}
	})
	r := start(t, fast(pgtest.DSN(addr), testkit.ChannelName(t)+"=test", vars{"PING_INTERVAL": "100ms"}), nil)
	r.Wait(t, "ping failed", 1)
	r.Wait(t, "reconnected", 1)
}
