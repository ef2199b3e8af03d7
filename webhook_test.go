package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// hook makes the http handler for a receiver.
func hook(t *testing.T, address string, more vars) *webhook {
	t.Helper()
	scheme, rest, _ := strings.Cut(address, ":")
	h, err := newWebhook(scheme)(rest, env{cfg: testConfig(t, more)})
	if err != nil {
		t.Fatal(err)
	}
	return h.(*webhook)
}

// receiver answers every POST and remembers it.
type receiver struct {
	*httptest.Server
	mu       sync.Mutex
	requests []*http.Request
	bodies   []string
}

func newReceiver(t *testing.T, answer http.HandlerFunc) *receiver {
	t.Helper()
	r := &receiver{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		r.mu.Lock()
		r.requests, r.bodies = append(r.requests, req), append(r.bodies, string(body))
		r.mu.Unlock()
		answer(w, req)
	}))
	t.Cleanup(r.Close)
	return r
}

func status200(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) }

func TestWebhookRequest(t *testing.T) {
	t.Parallel()
	r := newReceiver(t, status200)
	h := hook(t, r.URL+"/in?x=1", nil)
	for _, c := range []struct{ payload, contentType string }{
		{`{"id": 1}`, "application/json"},
		{`not json`, "text/plain; charset=utf-8"},
		{``, "text/plain; charset=utf-8"},
		{`"naïve"`, "application/json"},
	} {
		n := Notification{Channel: "a b\n", Payload: c.payload, Attempt: 3, id: "42"}
		if err := h.Handle(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		req, body := r.requests[len(r.requests)-1], r.bodies[len(r.bodies)-1]
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
	h := hook(t, "https://localhost/", vars{"WEBHOOK_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"})
	h.now = func() time.Time { return time.Unix(1614265330, 0) }
	header := http.Header{}
	h.sign(header, Notification{id: "msg_p5jXN8AQM9LWM0D4loKWxJek", Payload: `{"test": 2432232314}`})
	if got, want := header.Get("webhook-signature"), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if header.Get("webhook-timestamp") != "1614265330" || header.Get("webhook-id") != "msg_p5jXN8AQM9LWM0D4loKWxJek" {
		t.Errorf("%v", header)
	}
}

func TestWebhookAnswers(t *testing.T) {
	t.Parallel()
	redirected := newReceiver(t, status200)
	for _, c := range []struct {
		status    int
		header    string
		ok        bool
		permanent bool
		after     time.Duration
	}{
		{status: 200, ok: true}, {status: 204, ok: true}, {status: 299, ok: true},
		{status: 408}, {status: 425}, {status: 500}, {status: 503}, {status: 599},
		{status: 429, header: "7", after: 7 * time.Second},
		{status: 503, header: time.Now().Add(30 * time.Second).UTC().Format(http.TimeFormat), after: 25 * time.Second},
		{status: 503, header: "99999999", after: time.Hour},
		{status: 503, header: "-5"}, {status: 503, header: "soon"},
		{status: 400, permanent: true}, {status: 401, permanent: true}, {status: 404, permanent: true}, {status: 410, permanent: true},
		{status: 302, permanent: true}, {status: 307, permanent: true},
	} {
		r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", redirected.URL)
			if c.header != "" {
				w.Header().Set("Retry-After", c.header)
			}
			w.WriteHeader(c.status)
			if c.status != 204 {
				_, _ = io.WriteString(w, strings.Repeat("because ", 1000))
			}
		})
		err := hook(t, r.URL, nil).Handle(t.Context(), Notification{})
		if (err == nil) != c.ok || isPermanent(err) != c.permanent {
			t.Errorf("%d: %v, permanent %v", c.status, err, isPermanent(err))
		}
		if after := retryAfter(err); after < c.after || after > c.after+10*time.Second {
			t.Errorf("%d %q: again after %v, want %v", c.status, c.header, after, c.after)
		}
		if err != nil && (!strings.Contains(err.Error(), fmt.Sprintf("status %d", c.status)) || !strings.Contains(err.Error(), "because") || len(err.Error()) > 500) {
			t.Errorf("%d: %.600v", c.status, err)
		}
	}
	if len(redirected.requests) > 0 {
		t.Error("a redirect was followed")
	}
}

func TestWebhookNetworkErrors(t *testing.T) {
	t.Parallel()
	refused := "http://u:hunter2@" + freshAddress(t) + "/path?token=hunter2"
	err := hook(t, refused, nil).Handle(t.Context(), Notification{})
	if err == nil || isPermanent(err) || strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), "/path: dial tcp") {
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
	err = hook(t, "http://"+l.Addr().String(), nil).Handle(ctx, Notification{})
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 5*time.Second {
		t.Errorf("silent: %v after %v", err, time.Since(began))
	}
	// An answer without end is read up to a bound, and no longer than the time limit.
	endless := newReceiver(t, func(w http.ResponseWriter, req *http.Request) {
		w.WriteHeader(http.StatusBadGateway)
		for req.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 32<<10)); err != nil {
				return
			}
		}
	})
	if err := hook(t, endless.URL, nil).Handle(t.Context(), Notification{}); err == nil || len(err.Error()) > 2000 {
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
	h := hook(t, r.URL, nil)
	for range 20 {
		if err := h.Handle(t.Context(), Notification{}); err != nil {
			t.Fatal(err)
		}
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections for 20 requests", n)
	}
}

func TestWebhookConfiguration(t *testing.T) {
	t.Parallel()
	const dsn = "postgres://localhost/x"
	for name, c := range map[string]struct {
		vars vars
		want string
	}{
		"no host":    {vars{"CHANNELS": "a=http:"}, `CHANNELS: channel "a": not a valid URL`},
		"bad escape": {vars{"CHANNELS": "a=https://u:hunter2%zz@host/"}, `CHANNELS: channel "a": not a valid URL`},
		"secret":     {vars{"CHANNELS": "a=https://host/", "WEBHOOK_SECRET": "hunter2"}, "WEBHOOK_SECRET: must be whsec_"},
		"short":      {vars{"CHANNELS": "a=https://host/", "WEBHOOK_SECRET": "whsec_aHVudGVyMg=="}, "WEBHOOK_SECRET: must be whsec_"},
		"in outbox":  {vars{"CHANNELS": "a=outbox:http:"}, `CHANNELS: channel "a": not a valid URL`},
		"no inner":   {vars{"CHANNELS": "a=outbox:nope"}, `CHANNELS: channel "a": outbox needs a handler`},
		"table":      {vars{"CHANNELS": "a=outbox:log", "OUTBOX_TABLE": "a.b.c"}, `OUTBOX_TABLE: "a.b.c" is not a table name`},
	} {
		c.vars["DATABASE_URL"] = dsn
		out := problemsOf(t, c.vars)
		if !strings.Contains(out, c.want) || strings.Contains(out, "hunter2") || strings.Contains(out, "aHVudGVyMg") || strings.Count(out, "\n") != 1 {
			t.Errorf("%s: want one line with %q, got %q", name, c.want, out)
		}
	}
}

// The whole way: from an insert to a receiver that fails at first, with the program itself.
func TestOutboxToWebhook(t *testing.T) {
	t.Parallel()
	tab, channel := outboxTable(t, sharedDB), channelName(t)
	var failures atomic.Int64
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
		if failures.Add(1) == 1 {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	secret := "whsec_" + base64.StdEncoding.EncodeToString([]byte(strings.Repeat("k", 32)))
	p := runProgram(t, fast(sharedDSN, channel+"=outbox:"+strings.Replace(r.URL, "http://", "http://user:hunter2@", 1), sending(tab, vars{"WEBHOOK_SECRET": secret})))
	p.wait(t, "listening", 1)
	id := insert(t, sharedDB, tab, channel, `{"order": 1}`)
	emptied(t, sharedDB, tab)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.requests) != 2 {
		t.Fatalf("%d requests", len(r.requests))
	}
	for i, req := range r.requests {
		if req.Header.Get("webhook-id") != fmt.Sprint(id) || req.Header.Get("Pglistener-Attempt") != fmt.Sprint(i+1) || req.Header.Get("webhook-signature") == "" {
			t.Errorf("attempt %d: %v", i+1, req.Header)
		}
		if user, password, _ := req.BasicAuth(); user != "user" || password != "hunter2" {
			t.Error("the URL's user was not sent")
		}
	}
	if strings.Contains(p.String(), "hunter2") || strings.Contains(p.String(), secret) {
		t.Error("a secret is in the log")
	}
	line := p.wait(t, "handler failed; the row will be tried again", 1)
	if !strings.Contains(line["error"].(string), "status 503") {
		t.Errorf("%v", line)
	}
}

// A plain notification whose answer is final is given up at once.
func TestPermanentErrorIsNotRetried(t *testing.T) {
	t.Parallel()
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusUnprocessableEntity)
		_, _ = io.WriteString(w, "no such order")
	})
	w := newTestWorker(t, hook(t, r.URL, nil), false, limits{})
	w.give(t, "x")
	w.finish(t)
	line := w.wait(t, "gave up", 1)
	if len(r.requests) != 1 || line["attempts"] != 1.0 || !strings.Contains(line["error"].(string), "no such order") {
		t.Errorf("%d requests, %v", len(r.requests), line)
	}
}
