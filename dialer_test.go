package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/pgtest"
)

// authority is a certificate authority for a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	a.cert, a.key = a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// issue makes a certificate, signed by itself if the authority has none yet.
func (a *authority) issue(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	if c.NotAfter.IsZero() {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent, signer := c, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// file writes the authority's certificate and returns its path, for sslrootcert.
func (a *authority) file() string {
	a.t.Helper()
	path := filepath.Join(a.t.TempDir(), "root.crt")
	if err := os.WriteFile(path, certPEM(a.cert), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// tlsServer starts a server that takes only TLS with SCRAM, from the user app with the password
// p@ss/word, and has a certificate for localhost that is valid until notAfter.
func tlsServer(t *testing.T, a *authority, notAfter time.Time) *pgtest.Server {
	t.Helper()
	s := ownServer(t)
	cert, key := a.issue(&x509.Certificate{DNSNames: []string{"localhost"}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: notAfter})
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	execSQL(t, testDB(t, s.DSN()), "create role app login password 'p@ss/word'")
	for _, err := range []error{
		s.WriteFile("server.crt", os.O_TRUNC, certPEM(cert)),
		s.WriteFile("server.key", os.O_TRUNC, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})),
		s.WriteFile("pg_hba.conf", os.O_TRUNC, []byte("hostssl all app all scram-sha-256\nhost all postgres 127.0.0.1/32 trust\n")),
		s.Append("postgresql.conf", "ssl = on"),
		s.Stop(),
		s.Start(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// appDSN is how the user app reaches a tlsServer at addr, a host:port of which the host is replaced by localhost.
func appDSN(addr, root string) string {
	_, port, _ := net.SplitHostPort(addr)
	return "postgres://app:p%40ss%2Fword@localhost:" + port + "/postgres?sslmode=verify-full&sslrootcert=" + root
}

func TestTLSVerifyFullAndSCRAM(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	a := newAuthority(t)
	s := tlsServer(t, a, time.Now().Add(time.Hour))
	proxy, err := pgtest.NewProxy(s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	db := testDB(t, s.DSN())
	r := start(t, fast(appDSN(proxy.Addr(), a.file()), channel+"=test"), nil).listening(t)
	notifyOn(t, db, channel, "secret")
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
	channel := channelName(t)
	dsn, proxy := proxied(t, sharedDSN)
	free, err := pgtest.FreePort() // nothing listens there
	if err != nil {
		t.Fatal(err)
	}
	dead := net.JoinHostPort("127.0.0.1", strconv.Itoa(free))
	_, port, _ := net.SplitHostPort(proxy.Addr())
	dsn = strings.Replace(dsn, proxy.Addr(), "127.0.0.1,127.0.0.1", 1)
	dsn = withParams(dsn, "port", strconv.Itoa(free)+","+port, "target_session_attrs", "read-write")
	r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
	notify(t, channel, "through the second")
	r.expect(t, "through the second")
	proxy.Refuse(true)
	proxy.Reset()
	if line := r.wait(t, "connection attempt failed", 1); !strings.Contains(line["error"].(string), dead) {
		t.Errorf("the error does not name each host: %v", line)
	}
	proxy.Refuse(false)
	r.wait(t, "reconnected", 1)
	notify(t, channel, "again")
	r.expect(t, "again")
}

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	if sharedServer == nil {
		skip(t, "needs the unix socket of a local server; TEST_DATABASE_URL is set")
	}
	channel := channelName(t)
	dsn := "host=" + sharedServer.SocketDir() + " port=" + strconv.Itoa(sharedServer.Port) + " user=postgres dbname=postgres"
	r := start(t, fast(dsn, channel+"=test"), nil).listening(t)
	notify(t, channel, "hello")
	r.expect(t, "hello")
}

func TestConnectTimeoutOfTheDSNHolds(t *testing.T) {
	t.Parallel()
	dsn, proxy := proxied(t, sharedDSN)
	proxy.Mute(true)
	r := start(t, fast(withParams(dsn, "connect_timeout", "1"), channelName(t)+"=test", vars{"PING_TIMEOUT": "1h"}), nil)
	line := r.wait(t, "connection attempt failed", 1)
	if !strings.Contains(line["error"].(string), "timeout") {
		t.Errorf("unexpected cause: %v", line)
	}
	// And once connected it is lifted.
	proxy.Mute(false)
	r.listening(t)
	time.Sleep(1500 * time.Millisecond) // that nothing happens is the point
	if lines := r.all("disconnected"); len(lines) > 0 {
		t.Errorf("disconnected: %v", lines)
	}
}

// TestPingThatIsRefused needs a server that answers an empty query with an error. PostgreSQL
// cannot be made to, a pooler that has lost its server does; lib/pq panics (fact 9).
func TestPingThatIsRefused(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go refusePings(c)
		}
	}()
	r := start(t, fast(pgtest.DSN(l.Addr().String()), channelName(t)+"=test", vars{"PING_INTERVAL": "100ms"}), nil)
	r.wait(t, "ping failed", 1)
	r.wait(t, "reconnected", 1)
}

// refusePings speaks as much of the protocol as lib/pq's Listener needs.
func refusePings(c net.Conn) {
	defer c.Close()
	message := func(kind byte, body string) {
		b := append([]byte{kind}, binary.BigEndian.AppendUint32(nil, uint32(len(body)+4))...)
		_, _ = c.Write(append(b, body...))
	}
	var length [4]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return
	}
	if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(length[:]))-4); err != nil {
		return
	}
	message('R', "\x00\x00\x00\x00")
	message('Z', "I")
	pings := 0
	for {
		var head [5]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		body := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
		if _, err := io.ReadFull(c, body); err != nil || head[0] == 'X' {
			return
		}
		if string(body) == "\x00" {
			if pings++; pings > 1 { // the first one is register's
				message('E', "SERROR\x00C08P01\x00Mno server\x00\x00")
			} else {
				message('I', "")
			}
		} else {
			message('C', "LISTEN\x00")
		}
		message('Z', "I")
	}
}
