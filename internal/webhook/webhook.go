// Package webhook is the handlers http://... and https://...: it POSTs each notification to a URL, with the headers of the
// Standard Webhooks specification.
package webhook

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
)

// net/http itself logs bytes that come on an idle connection: what a receiver says, past LOG_PAYLOADS and past the writer that never
// blocks.
func init() { log.SetOutput(io.Discard) }

// Bounds on what is read of an answer, to reuse the connection and to show in an error.
const (
	maxAnswer   = 64 << 10
	shownAnswer = 300
)

// handler POSTs each notification to a URL.
type handler struct {
	// These never change.
	request     *http.Request // what all requests have in common; the URL is without its user
	shown       string        // the URL's scheme and host, for errors: the rest may be a secret
	basic       string        // the header Authorization of the URL's user; empty where it has none
	hidden      []string      // the secrets in the URL
	concurrency int
	setup       notify.Setup
	reread      func() (Settings, error) // nil: the variables do not change
	now         func() time.Time

	inUse  atomic.Pointer[prepared]
	looked atomic.Int64 // when the files were last looked at, in Unix nanoseconds

	looking chan struct{} // holds a token while somebody looks, who owns seen
	seen    view          // what the last look saw
}

// New makes the handler of a URL. concurrency is how many requests there may be at once: so many connections are kept.
// reread, which may be nil, returns s as it is by now, for what came from a file that has changed. It is called by one goroutine
// at a time and once a second at most (a few times more when something has changed), and only while there are requests. No error
// shows the URL or a secret.
func New(address string, s Settings, reread func() (Settings, error), concurrency int, setup notify.Setup) (notify.Handler, error) {
	request, err := http.NewRequest(http.MethodPost, address, nil)
	if err != nil || request.URL.Hostname() == "" {
		return nil, errors.New("not a valid URL (not shown: it may hold a password); write https://host/path")
	}
	h := &handler{
		request: request, shown: request.URL.Scheme + "://" + request.URL.Host, hidden: wordsOf(address),
		concurrency: concurrency, setup: setup, reread: reread, now: time.Now, looking: make(chan struct{}, 1),
	}
	if user := request.URL.User; user != nil {
		password, _ := user.Password()
		encoded := base64.StdEncoding.EncodeToString([]byte(user.Username() + ":" + password))
		h.basic, h.hidden, request.URL.User = "Basic "+encoded, append(h.hidden, encoded), nil
	}
	h.seen = view{settings: s, files: contents(s)}
	p, err := h.prepare(h.seen, nil)
	if err != nil {
		return nil, err
	}
	h.inUse.Store(p)
	return h, nil
}

// wordsOf returns the words of a URL but its scheme, as written and as meant: any of them may be secret.
func wordsOf(address string) []string {
	_, written, _ := strings.Cut(address, "://")
	meant, _ := url.QueryUnescape(written)
	return strings.FieldsFunc(written+" "+meant, func(r rune) bool { return strings.ContainsRune(" /?&=:@", r) })
}

// Handle implements notify.Handler: it POSTs n and returns nil for any 2xx. A receiver that cannot be reached, or answers 429,
// 502, 503 or 504, is unavailable; the error has its Retry-After, if it has sent one. 410 is permanent. Every other answer, and
// no answer to a request that has been written, is the notification's own failure. ctx bounds it all. No error shows a secret,
// even if the answer does.
func (h *handler) Handle(ctx context.Context, n notify.Notification) error {
	p := h.current(ctx)
	var written atomic.Bool
	req := h.request.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest: func(w httptrace.WroteRequestInfo) { written.Store(w.Err == nil) },
	}))
	p.fill(req, n, h.now())
	res, err := p.transport.RoundTrip(req) // not Client.Do, which would follow redirects
	if err != nil {
		return h.unanswered(ctx, err, written.Load(), p)
	}
	defer res.Body.Close()
	answer := io.LimitReader(res.Body, maxAnswer)
	if res.StatusCode/100 == 2 {
		_, _ = io.Copy(io.Discard, answer)
		h.setup.Log.Debug("delivered", "id", n.ID(), "attempt", n.Attempt, "status", res.StatusCode)
		return nil
	}
	err = fmt.Errorf("%s: status %d", h.shown, res.StatusCode)
	if text, _ := io.ReadAll(answer); h.setup.LogPayloads {
		err = fmt.Errorf("%w: %q", err, p.show(string(text)))
	}
	switch res.StatusCode {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		err = notify.Unavailable(err)
	case http.StatusGone:
		return notify.Permanent(err)
	}
	return notify.RetryAfter(err, h.retryAfter(res.Header.Get("Retry-After")))
}

// unanswered returns what Handle returns for a request without an answer. net/http quotes an answer that is not HTTP, and it may
// repeat the request.
func (h *handler) unanswered(ctx context.Context, err error, written bool, p *prepared) error {
	if !written || refused(err) {
		return notify.Unavailable(fmt.Errorf("%s: %w", h.shown, hint(err)))
	}
	var network net.Error
	switch {
	case errors.As(err, &network), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, context.Cause(ctx)):
		return fmt.Errorf("%s: %w", h.shown, err)
	case h.setup.LogPayloads:
		return fmt.Errorf("%s: no valid answer: %s", h.shown, p.show(err.Error()))
	}
	return fmt.Errorf("%s: no valid answer (not shown: it may repeat the payload)", h.shown)
}

// fill completes req: its body, and the headers. The id is the same at every attempt, so that the receiver can drop repeats; the
// timestamp is that of this attempt.
func (p *prepared) fill(req *http.Request, n notify.Notification, now time.Time) {
	id, timestamp := n.ID(), strconv.FormatInt(now.Unix(), 10)
	signed := []byte(id + "." + timestamp + "." + n.Payload)
	body := signed[len(signed)-len(n.Payload):]

	req.Body = http.NoBody
	if req.ContentLength = int64(len(body)); len(body) > 0 {
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
		req.Body, _ = req.GetBody()
	}
	req.Header = make(http.Header, len(p.header)+8)
	maps.Copy(req.Header, p.header)
	contentType := "text/plain; charset=utf-8"
	if json.Valid(body) {
		contentType = "application/json"
	}
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Webhook-Id", id)
	req.Header.Set("Webhook-Timestamp", timestamp)
	req.Header.Set("Pglistener-Channel", url.PathEscape(n.Channel)) // any text may be a channel's name
	req.Header.Set("Pglistener-Attempt", strconv.Itoa(n.Attempt))
	for name, at := range map[string]time.Time{"Pglistener-Created-At": n.CreatedAt, "Pglistener-Run-At": n.RunAt} {
		if !at.IsZero() {
			req.Header.Set(name, at.UTC().Format(time.RFC3339Nano))
		}
	}
	var signatures []string
	for _, pool := range p.macs {
		mac := pool.Get().(hash.Hash)
		mac.Reset()
		mac.Write(signed)
		signatures = append(signatures, "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
		pool.Put(mac)
	}
	if len(signatures) > 0 {
		req.Header.Set("Webhook-Signature", strings.Join(signatures, " "))
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
