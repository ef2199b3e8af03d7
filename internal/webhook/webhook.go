// Package webhook is the handlers http://... and https://...: it POSTs each
// notification to a URL, with the headers of the Standard Webhooks specification.
package webhook

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
)

// Settings are the variables of a webhook.
type Settings struct {
	Secret string `env:"WEBHOOK_SECRET" file:"true" usage:"signs POSTs as Standard Webhooks do: whsec_..."`
}

// Bounds on what is read of an answer, to reuse the connection and to show in an error.
const (
	maxAnswer   = 64 << 10
	shownAnswer = 300
)

// handler POSTs each notification to a URL.
type handler struct {
	url    string
	shown  string // url without user, password and query, for errors
	secret []byte // nil: not signed
	client *http.Client
	now    func() time.Time
}

// New makes the handler of a URL. concurrency is how many requests there may be
// at once: so many connections are kept. No error shows the URL or the secret.
func New(address string, s Settings, concurrency int) (notify.Handler, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Hostname() == "" {
		// Not the error itself: the URL may hold a password.
		scheme, _, _ := strings.Cut(address, ":")
		return nil, fmt.Errorf("not a valid URL (not shown: it may hold a password); write %s://host/path", scheme)
	}
	secret, err := parseSecret(s.Secret)
	if err != nil {
		return nil, fmt.Errorf("WEBHOOK_SECRET: %w", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = concurrency
	transport.MaxResponseHeaderBytes = 64 << 10
	return &handler{
		url:    u.String(),
		shown:  u.Scheme + "://" + u.Host + u.EscapedPath(),
		secret: secret,
		client: &http.Client{
			Transport: transport,
			// A redirected POST may become a GET, or end where nobody meant to send it.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		now: time.Now,
	}, nil
}

// Handle implements notify.Handler: it POSTs n and returns nil for any 2xx. What may succeed later (no
// connection, 408, 425, 429, 5xx) is an error, with the server's Retry-After if
// it has sent one; every other answer is a Permanent one. ctx bounds it all.
func (h *handler) Handle(ctx context.Context, n notify.Notification) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, strings.NewReader(n.Payload))
	if err != nil {
		return notify.Permanent(fmt.Errorf("%s: the request cannot be made", h.shown))
	}
	h.sign(req.Header, n)
	res, err := h.client.Do(req)
	if err != nil {
		var outer *url.Error // has the whole URL in its text
		if errors.As(err, &outer) {
			err = outer.Err
		}
		return fmt.Errorf("%s: %w", h.shown, err)
	}
	defer res.Body.Close()
	answer, _ := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if res.StatusCode/100 == 2 {
		return nil
	}
	err = fmt.Errorf("%s: status %d: %q", h.shown, res.StatusCode, notify.Cut(strings.TrimSpace(string(answer)), shownAnswer))
	switch {
	case res.StatusCode == http.StatusRequestTimeout, res.StatusCode == http.StatusTooEarly,
		res.StatusCode == http.StatusTooManyRequests, res.StatusCode/100 == 5:
		return notify.RetryAfter(err, h.retryAfter(res.Header.Get("Retry-After")))
	}
	return notify.Permanent(err)
}

// sign sets the headers: the id is the same at every attempt, so that the
// receiver can drop repeats; the time is that of this attempt.
func (h *handler) sign(header http.Header, n notify.Notification) {
	id, timestamp := n.ID(), strconv.FormatInt(h.now().Unix(), 10)
	contentType := "text/plain; charset=utf-8"
	if json.Valid([]byte(n.Payload)) {
		contentType = "application/json"
	}
	header.Set("Content-Type", contentType)
	header.Set("User-Agent", "pglistener")
	header.Set("Webhook-Id", id)
	header.Set("Webhook-Timestamp", timestamp)
	header.Set("Pglistener-Channel", url.PathEscape(n.Channel)) // any text may be a channel's name
	header.Set("Pglistener-Attempt", strconv.Itoa(n.Attempt))
	if h.secret != nil {
		mac := hmac.New(sha256.New, h.secret)
		_, _ = io.WriteString(mac, id+"."+timestamp+"."+n.Payload)
		header.Set("Webhook-Signature", "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	}
}

// retryAfter reads the header: seconds, or a date.
func (h *handler) retryAfter(value string) time.Duration {
	if seconds, err := strconv.Atoi(value); err == nil {
		return time.Duration(max(0, min(seconds, 3600))) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(0, min(at.Sub(h.now()), time.Hour))
	}
	return 0
}

// parseSecret reads WEBHOOK_SECRET: whsec_ and the key in base64, as the
// specification has it. Its error does not show the value.
func parseSecret(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	encoded, ok := strings.CutPrefix(s, "whsec_")
	key, err := base64.StdEncoding.DecodeString(encoded)
	if !ok || err != nil || len(key) < 24 || len(key) > 64 {
		return nil, errors.New("must be whsec_ and 24 to 64 bytes in base64; make one: echo whsec_$(head -c 32 /dev/urandom | base64)")
	}
	return key, nil
}
