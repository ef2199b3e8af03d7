package webhook

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// hook makes the http handler for a receiver.
func hook(t *testing.T, address string, s Settings) *handler {
	t.Helper()
	h, err := New(address, s, nil, 1, notify.Setup{Log: testkit.NewLogs(t).Logger(), LogPayloads: true})
	if err != nil {
		t.Fatal(err)
	}
	return h.(*handler)
}

func TestWebhookRequest(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, testkit.Accept)
	h := hook(t, r.URL+"/in?x=1", Settings{})
	for _, c := range []struct{ payload, contentType string }{
		{`{"id": 1}`, "application/json"},
		{`not json`, "text/plain; charset=utf-8"},
		{``, "text/plain; charset=utf-8"},
		{`"naïve"`, "application/json"},
	} {
		n := notify.Notification{Channel: "a b\n", Payload: c.payload, Attempt: 3, Key: "42"}
		if err := h.Handle(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		req, body := r.Last()
		if req.Method != http.MethodPost || req.URL.String() != "/in?x=1" || body != c.payload {
			t.Errorf("%s %s %q", req.Method, req.URL, body)
		}
		for name, want := range map[string]string{
			"Content-Type": c.contentType, "webhook-id": "42", "Pglistener-Channel": "a%20b%0A", "Pglistener-Attempt": "3", "webhook-signature": "",
		} {
			if got := req.Header.Get(name); got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
		if req.Header.Get("webhook-timestamp") == "" {
			t.Error("no timestamp")
		}
	}
}

// TestWebhookSignature is the example of the Standard Webhooks specification.
func TestWebhookSignature(t *testing.T) {
	t.Parallel()
	h := hook(t, "https://localhost/", Settings{Secret: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"})
	h.now = func() time.Time { return time.Unix(1614265330, 0) }
	req := &http.Request{}
	h.current(t.Context()).fill(req, notify.Notification{Key: "msg_p5jXN8AQM9LWM0D4loKWxJek", Payload: `{"test": 2432232314}`}, h.now())
	header := req.Header
	if got, want := header.Get("webhook-signature"), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if header.Get("webhook-timestamp") != "1614265330" || header.Get("webhook-id") != "msg_p5jXN8AQM9LWM0D4loKWxJek" {
		t.Errorf("%v", header)
	}
}

func TestWebhookAnswers(t *testing.T) {
	t.Parallel()
	redirected := testkit.NewReceiver(t, testkit.Accept)
	for _, c := range []struct {
		status      int
		header      string
		ok          bool
		permanent   bool
		unavailable bool
		after       time.Duration
	}{
		{status: 200, ok: true}, {status: 204, ok: true}, {status: 299, ok: true},
		{status: 408}, {status: 425}, {status: 500}, {status: 501}, {status: 599},
		{status: 429, header: "7", unavailable: true, after: 7 * time.Second},
		{status: 502, unavailable: true}, {status: 504, unavailable: true},
		{status: 503, header: time.Now().Add(30 * time.Second).UTC().Format(http.TimeFormat), unavailable: true, after: 25 * time.Second},
		{status: 503, header: "99999999", unavailable: true, after: time.Hour},
		{status: 503, header: "-5", unavailable: true}, {status: 503, header: "soon", unavailable: true},
		{status: 500, header: "7", after: 7 * time.Second},
		// A deploy or a rotated key can mend these; only 410 is meant for good.
		{status: 400}, {status: 401}, {status: 403}, {status: 404}, {status: 302}, {status: 307},
		{status: 410, permanent: true},
	} {
		r := testkit.NewReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", redirected.URL)
			if c.header != "" {
				w.Header().Set("Retry-After", c.header)
			}
			w.WriteHeader(c.status)
			if c.status != 204 {
				_, _ = io.WriteString(w, strings.Repeat("because ", 1000))
			}
		})
		err := hook(t, r.URL, Settings{}).Handle(t.Context(), notify.Notification{})
		if (err == nil) != c.ok || notify.IsPermanent(err) != c.permanent || notify.IsUnavailable(err) != c.unavailable {
			t.Errorf("%d: %v, permanent %v, unavailable %v", c.status, err, notify.IsPermanent(err), notify.IsUnavailable(err))
		}
		if after := notify.RetryDelay(err); after < c.after || after > c.after+10*time.Second {
			t.Errorf("%d %q: again after %v, want %v", c.status, c.header, after, c.after)
		}
		if err != nil && (!strings.Contains(err.Error(), fmt.Sprintf("status %d", c.status)) || !strings.Contains(err.Error(), "because") || len(err.Error()) > 500) {
			t.Errorf("%d: %.600v", c.status, err)
		}
	}
	if len(redirected.Requests()) > 0 {
		t.Error("a redirect was followed")
	}
}

func TestWebhookNetworkErrors(t *testing.T) {
	t.Parallel()
	refused := "http://u:hunter2@" + testkit.FreshAddress(t) + "/path?token=hunter2"
	err := hook(t, refused, Settings{}).Handle(t.Context(), notify.Notification{})
	if err == nil || !notify.IsUnavailable(err) || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "path") || !strings.Contains(err.Error(), "dial tcp") {
		t.Errorf("refused: %v", err)
	}
	// Accepted and never answered: the time limit ends it.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	err = hook(t, "http://"+l.Addr().String(), Settings{}).Handle(ctx, notify.Notification{})
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 5*time.Second || notify.IsUnavailable(err) {
		t.Errorf("silent: %v after %v, unavailable %v", err, time.Since(began), notify.IsUnavailable(err))
	}
	// It dies when it has read the request: that may be the payload's fault.
	dies := testkit.NewReceiver(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	if err := hook(t, dies.URL, Settings{}).Handle(t.Context(), notify.Notification{}); err == nil || notify.IsUnavailable(err) {
		t.Errorf("dies: %v, unavailable %v", err, notify.IsUnavailable(err))
	}
	// It goes away before it has all of the request.
	leaves, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer leaves.Close()
	go func() {
		if c, err := leaves.Accept(); err == nil {
			_, _ = c.Read(make([]byte, 1))
			c.Close()
		}
	}()
	if err := hook(t, "http://"+leaves.Addr().String(), Settings{}).Handle(t.Context(), notify.Notification{Payload: strings.Repeat("x", 32<<20)}); !notify.IsUnavailable(err) {
		t.Errorf("leaves: %v", err)
	}
	// Its certificate is nobody's: no request is written, whatever the payload.
	tls := httptest.NewTLSServer(http.HandlerFunc(testkit.Accept))
	tls.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	defer tls.Close()
	if err := hook(t, tls.URL, Settings{}).Handle(t.Context(), notify.Notification{}); !notify.IsUnavailable(err) || !strings.Contains(err.Error(), "set WEBHOOK_CA_FILE") {
		t.Errorf("certificate: %v", err)
	}
	// An answer without end is read up to a bound, and no longer than the time limit.
	endless := testkit.NewReceiver(t, func(w http.ResponseWriter, req *http.Request) {
		w.WriteHeader(http.StatusBadGateway)
		for req.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 32<<10)); err != nil {
				return
			}
		}
	})
	if err := hook(t, endless.URL, Settings{}).Handle(t.Context(), notify.Notification{}); err == nil || len(err.Error()) > 2000 {
		t.Errorf("endless: %.200v", err)
	}
}

func TestWebhookReusesConnections(t *testing.T) {
	t.Parallel()
	var connections atomic.Int64
	r := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "thanks") }))
	r.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			connections.Add(1)
		}
	}
	r.Start()
	defer r.Close()
	h := hook(t, r.URL, Settings{})
	for range 20 {
		if err := h.Handle(t.Context(), notify.Notification{}); err != nil {
			t.Fatal(err)
		}
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections for 20 requests", n)
	}
}

// As many connections as CONCURRENCY allows are kept, more than net/http keeps by itself.
func TestWebhookKeepsAllConnections(t *testing.T) {
	t.Parallel()
	const concurrency = 120
	var connections, waiting atomic.Int64
	rounds := [2]chan struct{}{make(chan struct{}), make(chan struct{})}
	r := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		n := waiting.Add(1) // all must be here at once
		round := rounds[(n-1)/concurrency]
		if n%concurrency == 0 {
			close(round)
		}
		select {
		case <-round:
		case <-req.Context().Done():
		}
	}))
	r.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			connections.Add(1)
		}
	}
	r.Start()
	defer r.Close()
	h, err := New(r.URL, Settings{}, nil, concurrency, notify.Setup{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	for range rounds {
		var all sync.WaitGroup
		for range concurrency {
			all.Go(func() {
				if err := h.Handle(ctx, notify.Notification{}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	if n := connections.Load(); n != concurrency {
		t.Errorf("%d connections", n)
	}
}

// With LOG_PAYLOADS=false no answer stands in an error, for it may repeat the payload.
func TestWebhookAnswerIsKeptOut(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no hunter2 here", http.StatusBadRequest) })
	h, err := New(r.URL, Settings{}, nil, 1, notify.Setup{Log: testkit.NewLogs(t).Logger()})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Handle(t.Context(), notify.Notification{}); err == nil || strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), "status 400") {
		t.Errorf("%v", err)
	}
}

// TestNonsenseIsKeptOut: net/http quotes an answer that is not HTTP.
func TestNonsenseIsKeptOut(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			if req, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				_, _ = io.Copy(c, req.Body)
			}
			c.Close()
		}
	}()
	for _, shown := range []bool{false, true} {
		h, err := New("http://"+l.Addr().String(), Settings{}, nil, 1, notify.Setup{Log: testkit.NewLogs(t).Logger(), LogPayloads: shown})
		if err != nil {
			t.Fatal(err)
		}
		err = h.Handle(t.Context(), notify.Notification{Payload: "hunter2\r\n\r\n"})
		if err == nil || strings.Contains(err.Error(), "hunter2") != shown || !strings.Contains(err.Error(), "no valid answer") || notify.IsUnavailable(err) {
			t.Errorf("shown %v: %v", shown, err)
		}
	}
}

func TestWebhookLeavesALineAtDebug(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, testkit.Accept)
	lg := testkit.NewLogs(t)
	h, err := New(r.URL, Settings{}, nil, 1, notify.Setup{Log: lg.Logger()})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Handle(t.Context(), notify.Notification{Key: "7", Attempt: 2}); err != nil {
		t.Fatal(err)
	}
	if line := lg.Wait(t, "delivered", 1); line["level"] != "DEBUG" || line["id"] != "7" || line["attempt"] != 2.0 || line["status"] != 202.0 {
		t.Errorf("%v", line)
	}
}
