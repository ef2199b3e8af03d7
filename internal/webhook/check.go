package webhook

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// Check implements notify.Checker: it connects as a request would, with the certificates, and sends no request. A receiver that
// wants a client certificate says so here only up to TLS 1.2. Of a proxy nothing is asked but to accept the connection.
func (h *handler) Check(ctx context.Context) (string, error) {
	t, u, text := h.current(ctx).transport, h.request.URL, h.shown+" accepts connections"
	encrypted := u.Scheme == "https"
	if proxy, _ := t.Proxy(h.request); proxy != nil {
		u, encrypted, text = proxy, false, h.shown+" would be reached through the proxy "+proxy.Host
	}
	port := map[string]string{"http": "80", "https": "443", "socks5": "1080"}[u.Scheme]
	dial := t.DialContext
	if encrypted {
		dial = (&tls.Dialer{Config: t.TLSClientConfig}).DialContext
	}
	c, err := dial(ctx, "tcp", net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), port)))
	if err != nil {
		return "", fmt.Errorf("%s: %w", h.shown, hint(err))
	}
	defer c.Close()
	if secure, ok := c.(*tls.Conn); ok {
		s := secure.ConnectionState()
		text += fmt.Sprintf(" with %s; its certificate is valid until %s",
			tls.VersionName(s.Version), s.PeerCertificates[0].NotAfter.UTC().Format(time.DateOnly))
	}
	return text, nil
}

// refused says whether the receiver has ended the TLS handshake, or what follows it, with an alert: that is not about any one
// request.
func refused(err error) bool {
	var network *net.OpError
	return errors.As(err, &network) && network.Op == "remote error"
}

// hint adds to an error of a connection what to do about it.
func hint(err error) error {
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return fmt.Errorf("%w; set WEBHOOK_CA_FILE to a PEM file of the authority that has signed it", err)
	case refused(err):
		return fmt.Errorf("%w; the receiver refuses the client certificate, or wants one: see WEBHOOK_CERT_FILE and WEBHOOK_KEY_FILE", err)
	case errors.As(err, new(tls.RecordHeaderError)), errors.Is(err, http.ErrSchemeMismatch):
		return fmt.Errorf("%w; there is no TLS at this port: write http://", err)
	}
	return err
}
