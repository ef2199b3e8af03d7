package webhook

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// tlsReceiver starts a receiver with a certificate of a. It counts the requests.
func tlsReceiver(t *testing.T, a *testkit.Authority, http2 bool, change func(*tls.Config)) (address string, requests *atomic.Int64) {
	t.Helper()
	requests = new(atomic.Int64)
	r := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if requests.Add(1); (req.ProtoMajor == 2) != http2 {
			w.WriteHeader(http.StatusHTTPVersionNotSupported)
		}
	}))
	cert, err := tls.X509KeyPair(pair(t, a))
	if err != nil {
		t.Fatal(err)
	}
	r.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	if change != nil {
		change(r.TLS)
	}
	r.EnableHTTP2 = http2
	r.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	r.StartTLS()
	t.Cleanup(r.Close)
	return r.URL, requests
}

// trusting are the settings of one who trusts a, with a certificate of client where that is not nil.
func trusting(t *testing.T, a, client *testkit.Authority) Settings {
	t.Helper()
	s := Settings{CAFile: a.File()}
	if client != nil {
		cert, key := pair(t, client)
		s.CertFile, s.KeyFile = write(t, "cert", cert), write(t, "key", key)
	}
	return s
}

func TestCheck(t *testing.T) {
	t.Parallel()
	authority, other := testkit.NewAuthority(t), testkit.NewAuthority(t)
	plain := testkit.NewReceiver(t, testkit.Accept)
	wants := func(version uint16) func(*tls.Config) {
		return func(c *tls.Config) {
			c.ClientAuth, c.ClientCAs, c.MaxVersion = tls.RequireAndVerifyClientCert, pool(t, authority), version
		}
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	const refusal = "refuses the client certificate, or wants one: see WEBHOOK_CERT_FILE and WEBHOOK_KEY_FILE"
	for name, c := range map[string]struct {
		http2    bool
		change   func(*tls.Config)
		settings Settings
		want     string // with "accepts connections" there is no error
	}{
		"TLS":                   {false, nil, trusting(t, authority, nil), "accepts connections with TLS 1.3; its certificate is valid until 20"},
		"HTTP/2":                {true, nil, trusting(t, authority, nil), "accepts connections with TLS 1.3"},
		"TLS 1.2":               {false, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, trusting(t, authority, nil), "accepts connections with TLS 1.2"},
		"no tickets":            {false, func(c *tls.Config) { c.SessionTicketsDisabled = true }, trusting(t, authority, nil), "accepts connections with TLS 1.3"},
		"unknown authority":     {false, nil, trusting(t, other, nil), "set WEBHOOK_CA_FILE to a PEM file"},
		"not even the system's": {true, nil, Settings{}, "set WEBHOOK_CA_FILE to a PEM file"},
		"certificate":           {false, wants(tls.VersionTLS13), trusting(t, authority, authority), "accepts connections with TLS 1.3"},
		"certificate, HTTP/2":   {true, wants(tls.VersionTLS13), trusting(t, authority, authority), "accepts connections with TLS 1.3"},
		"certificate, TLS 1.2":  {false, wants(tls.VersionTLS12), trusting(t, authority, authority), "accepts connections with TLS 1.2"},
		"no certificate, 1.2":   {false, wants(tls.VersionTLS12), trusting(t, authority, nil), refusal},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address, requests := tlsReceiver(t, authority, c.http2, c.change)
			checkOf(t, name, address, c.settings, c.want)
			if requests.Load() != 0 {
				t.Error("a request was sent")
			}
		})
	}
	checkOf(t, "plain", plain.URL, Settings{}, "accepts connections")
	checkOf(t, "no TLS there", strings.Replace(plain.URL, "http:", "https:", 1), Settings{}, "there is no TLS at this port: write http://")
	checkOf(t, "refused", "http://"+testkit.FreshAddress(t), Settings{}, "connection refused")
	if len(plain.Requests()) != 0 {
		t.Error("a request was sent")
	}

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if text, err := hook(t, "https://"+silent.Addr().String(), Settings{}).Check(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent: %q, %v", text, err)
	}
}

func checkOf(t *testing.T, name, address string, s Settings, want string) {
	t.Helper()
	address = strings.Replace(address, "://", "://u:hunter2@", 1) + "/hunter2?hunter2"
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	text, err := hook(t, address, s).Check(ctx)
	shown := text
	if err != nil {
		shown = err.Error()
	}
	if (err == nil) != strings.HasPrefix(want, "accepts connections") || !strings.Contains(shown, want) || strings.ContainsAny(shown, "\n") || strings.Contains(shown, "hunter2") {
		t.Errorf("%s: want %q, got %q, %v", name, want, text, err)
	}
}

// A receiver that refuses our certificate would refuse any notification, although in TLS 1.3 it says so only
// after the request has been written.
func TestRefusedCertificateIsUnavailable(t *testing.T) {
	t.Parallel()
	authority := testkit.NewAuthority(t)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		address, _ := tlsReceiver(t, authority, false, func(c *tls.Config) {
			c.ClientAuth, c.ClientCAs, c.MaxVersion = tls.RequireAndVerifyClientCert, pool(t, authority), version
		})
		if err := hook(t, address, trusting(t, authority, authority)).Handle(t.Context(), notify.Notification{}); err != nil {
			t.Error(err)
		}
		err := hook(t, address, trusting(t, authority, nil)).Handle(t.Context(), notify.Notification{})
		if !notify.IsUnavailable(err) || !strings.Contains(err.Error(), "see WEBHOOK_CERT_FILE") {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
	}
}

// A firewall may forget a connection without a word. With HTTP/2 all requests use the same one, so it must be
// found out, and left, long before HANDLER_TIMEOUT has cost each of them an attempt.
func TestSilentHTTP2ConnectionIsLeft(t *testing.T) {
	t.Parallel()
	authority := testkit.NewAuthority(t)
	address, requests := tlsReceiver(t, authority, true, nil)
	proxy, err := pgtest.NewProxy(strings.TrimPrefix(address, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	h := hook(t, "https://"+proxy.Addr(), trusting(t, authority, nil))
	pings := h.current(t.Context()).transport.HTTP2
	if pings.SendPingTimeout <= 0 || pings.PingTimeout <= 0 || pings.SendPingTimeout+pings.PingTimeout > 30*time.Second {
		t.Errorf("%+v", pings)
	}
	pings.SendPingTimeout, pings.PingTimeout = 50*time.Millisecond, time.Second
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	for range 3 {
		if err := h.Handle(ctx, notify.Notification{}); err != nil {
			t.Fatal(err)
		}
	}
	if proxy.Dialed() != 1 {
		t.Fatalf("%d connections, so it is not HTTP/2", proxy.Dialed())
	}
	proxy.Silence()
	if err := h.Handle(ctx, notify.Notification{}); err == nil || ctx.Err() != nil {
		t.Fatalf("nobody answered: %v", err)
	}
	if err := h.Handle(ctx, notify.Notification{}); err != nil || requests.Load() != 4 {
		t.Errorf("%v after %d requests", err, requests.Load())
	}
}

// pool is a's certificate.
func pool(t *testing.T, authorities ...*testkit.Authority) *x509.CertPool {
	t.Helper()
	p := x509.NewCertPool()
	for _, a := range authorities {
		p.AppendCertsFromPEM([]byte(testkit.ReadFile(t, a.File())))
	}
	return p
}
