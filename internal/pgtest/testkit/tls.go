//go:build unix

package testkit

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/pgtest"
)

// Authority is a certificate authority for a test.
type Authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes one.
func NewAuthority(t *testing.T) *Authority {
	t.Helper()
	a := &Authority{t: t}
	a.cert, a.key = a.Issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// Issue makes a certificate, signed by itself if the authority has none yet.
func (a *Authority) Issue(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
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

// File writes the authority's certificate and returns its path, for sslrootcert.
func (a *Authority) File() string {
	a.t.Helper()
	path := filepath.Join(a.t.TempDir(), "root.crt")
	if err := os.WriteFile(path, CertPEM(a.cert), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// CertPEM is a certificate as PEM.
func CertPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// TLSServer starts a server that takes only TLS with SCRAM, from the user app with the password
// p@ss/word, and has a certificate for localhost that is valid until notAfter.
func TLSServer(t *testing.T, a *Authority, notAfter time.Time) *pgtest.Server {
	t.Helper()
	s := OwnServer(t)
	cert, key := a.Issue(&x509.Certificate{DNSNames: []string{"localhost"}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: notAfter})
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	Exec(t, Open(t, s.DSN()), "create role app login password 'p@ss/word'")
	for _, err := range []error{
		s.WriteFile("server.crt", os.O_TRUNC, CertPEM(cert)),
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

// AppDSN is how the user app reaches a TLSServer at addr, a host:port of which the host is replaced by localhost.
func AppDSN(addr, root string) string {
	_, port, _ := net.SplitHostPort(addr)
	return "postgres://app:p%40ss%2Fword@localhost:" + port + "/postgres?sslmode=verify-full&sslrootcert=" + root
}
