package webhook

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
	"time"
)

// verdict is how long Check waits for a server to refuse the client certificate, or the want of one: in TLS 1.3
// that comes after the handshake.
const verdict = 500 * time.Millisecond

// errNoRequest ends the request of Check before it is written.
var errNoRequest = errors.New("no request is sent")

// Check implements notify.Checker: it connects as a request would, through the proxy where there is one and
// with the certificates, and sends no request.
func (h *handler) Check(ctx context.Context) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	accepted, accept := context.WithCancel(ctx)
	defer accept()
	t := h.current(ctx).transport.Clone()
	defer t.CloseIdleConnections()

	var connected atomic.Bool
	dial := t.DialContext
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &mutedConn{c, &connected, accepted.Done()}, nil
	}
	if t.TLSClientConfig == nil {
		t.TLSClientConfig = &tls.Config{}
	}
	t.TLSClientConfig.ClientSessionCache = onTicket(accept)
	text := "accepts connections"
	timer := time.AfterFunc(time.Hour, accept)
	defer timer.Stop()
	req := h.request.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		connected.Store(true)
		c, encrypted := info.Conn.(*tls.Conn)
		if !encrypted {
			accept()
			return
		}
		timer.Reset(verdict)
		s := c.ConnectionState()
		text = fmt.Sprintf("accepts connections with %s; its certificate is valid until %s", tls.VersionName(s.Version), s.PeerCertificates[0].NotAfter.Format(time.DateOnly))
	}}))
	if proxy, _ := t.Proxy(req); proxy != nil {
		text += " (through the proxy " + proxy.Host + ")"
	}
	res, err := t.RoundTrip(req)
	if err == nil {
		res.Body.Close()
		err = errors.New("answered before it was asked")
	}
	if !errors.Is(err, errNoRequest) {
		return "", fmt.Errorf("%s: %w", h.shown, hint(err))
	}
	return h.shown + " " + text, nil
}

// mutedConn is a connection on which nothing is sent any more once connected is true.
type mutedConn struct {
	net.Conn
	connected *atomic.Bool
	accepted  <-chan struct{}
}

func (c *mutedConn) Write(b []byte) (int, error) {
	if c.connected.Load() {
		<-c.accepted
		return 0, errNoRequest
	}
	return c.Conn.Write(b)
}

// onTicket is a tls.ClientSessionCache that keeps nothing. It is called when the server sends a ticket, which it
// does once it has accepted the client's certificate.
type onTicket func()

func (onTicket) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (f onTicket) Put(_ string, s *tls.ClientSessionState) {
	if s != nil {
		f()
	}
}

// hint adds to an error of a connection what to do about it.
func hint(err error) error {
	var network *net.OpError
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return fmt.Errorf("%w; set WEBHOOK_CA_FILE to a PEM file of the authority that has signed it", err)
	case errors.As(err, &network) && network.Op == "remote error":
		return fmt.Errorf("%w; the receiver refuses the client certificate, or wants one: see WEBHOOK_CERT_FILE and WEBHOOK_KEY_FILE", err)
	case errors.As(err, new(tls.RecordHeaderError)), errors.Is(err, http.ErrSchemeMismatch):
		return fmt.Errorf("%w; there is no TLS at this port: write http://", err)
	}
	return err
}
