// feature: webhook outbox

package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

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
		"no inner":   {vars{"CHANNELS": "a=outbox:nope"}, `CHANNELS: channel "a" has neither a mode (doorbell, outbox, plain) nor a handler`},
		"table":      {vars{"CHANNELS": "a=outbox:log", "OUTBOX_TABLE": "a.b.c"}, `OUTBOX_TABLE: "a.b.c" is not a table name`},
	} {
		c.vars["DATABASE_URL"] = dsn
		out := problemsOf(t, c.vars)
		if !strings.Contains(out, c.want) || strings.Contains(out, "hunter2") || strings.Contains(out, "aHVudGVyMg") || strings.Count(out, "\n") != 1 {
			t.Errorf("%s: want one line with %q, got %q", name, c.want, out)
		}
	}
}

// A channel's own secret stays its own when the file is read again while it runs, and a new one comes into use.
func TestOwnSecretOfAChannelIsReadAgain(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	file := filepath.Join(t.TempDir(), "secret")
	write := func(key string) {
		t.Helper()
		secret := "whsec_" + base64.StdEncoding.EncodeToString([]byte(key))
		if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	oldKey, newKey := strings.Repeat("o", 32), strings.Repeat("n", 32)
	write(oldKey)
	r := testkit.NewReceiver(t, testkit.Accept)
	start(t, fast(testkit.DSN(t), channel+"="+r.URL, vars{strings.ToUpper(channel) + "_WEBHOOK_SECRET_FILE": file}), nil).listening(t)
	sent := 0
	signedWith := func(key string) bool { // the next request is
		t.Helper()
		testkit.Send(t, channel, "payload")
		sent++
		testkit.Eventually(t, "no request", func() bool { return len(r.Requests()) >= sent })
		req, body := r.Last()
		mac := hmac.New(sha256.New, []byte(key))
		fmt.Fprintf(mac, "%s.%s.%s", req.Header.Get("webhook-id"), req.Header.Get("webhook-timestamp"), body)
		return req.Header.Get("webhook-signature") == "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil))
	}
	// The settings are read again once a second while there are requests.
	for began := time.Now(); time.Since(began) < 1500*time.Millisecond; {
		if !signedWith(oldKey) {
			t.Fatalf("request %d is not signed with the channel's secret", sent)
		}
	}
	write(newKey)
	testkit.Eventually(t, "the new secret does not come into use", func() bool { return signedWith(newKey) })
	if !signedWith(newKey) {
		t.Error("the new secret does not stay in use")
	}
}

// As many connections are kept as there may be requests at once: CONCURRENCY.
func TestWebhookKeepsConnections(t *testing.T) {
	t.Parallel()
	const atOnce, rounds = 10, 5
	channel := testkit.ChannelName(t)
	var waiting sync.WaitGroup // for all of a round to be there
	r := testkit.NewReceiver(t, func(http.ResponseWriter, *http.Request) {
		waiting.Done()
		waiting.Wait()
	})
	l := start(t, fast(testkit.DSN(t), channel+"="+r.URL, vars{"CONCURRENCY": strconv.Itoa(atOnce)}), nil).listening(t)
	for round := 1; round <= rounds; round++ {
		waiting.Add(atOnce)
		testkit.Exec(t, testkit.DB(t), "select pg_notify($1, i::text) from generate_series(1, $2) i", channel, atOnce)
		testkit.Eventually(t, "not all were handled", func() bool { return l.stat("pglistener_items_total", channel) == float64(round*atOnce) })
	}
	connections := map[string]bool{} // by the port they come from
	for _, req := range r.Requests() {
		connections[req.RemoteAddr] = true
	}
	// One that is not back in time costs another.
	if n := len(connections); n < atOnce || n > 2*atOnce {
		t.Errorf("%d connections for %d requests at once", n, atOnce)
	}
}

// The whole way: from an insert to a receiver that fails at first, with the program itself.
func TestOutboxToWebhook(t *testing.T) {
	t.Parallel()
	tab, channel := outboxTable(t, testkit.DB(t)), testkit.ChannelName(t)
	var failures atomic.Int64
	r := testkit.NewReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
		if failures.Add(1) == 1 {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	secret := "whsec_" + base64.StdEncoding.EncodeToString([]byte(strings.Repeat("k", 32)))
	p := runProgram(t, fast(testkit.DSN(t), channel+"=outbox:"+strings.Replace(r.URL, "http://", "http://user:hunter2@", 1), sending(tab, vars{"WEBHOOK_SECRET": secret})))
	p.Wait(t, "listening", 1)
	id := insert(t, testkit.DB(t), tab, channel, `{"order": 1}`)
	emptied(t, testkit.DB(t), tab)
	requests := r.Requests()
	if len(requests) != 2 {
		t.Fatalf("%d requests", len(requests))
	}
	for i, req := range requests {
		if req.Header.Get("webhook-id") != id || req.Header.Get("Pglistener-Attempt") != fmt.Sprint(i+1) || req.Header.Get("webhook-signature") == "" {
			t.Errorf("attempt %d: %v", i+1, req.Header)
		}
		if user, password, _ := req.BasicAuth(); user != "user" || password != "hunter2" {
			t.Error("the URL's user was not sent")
		}
	}
	if strings.Contains(p.String(), "hunter2") || strings.Contains(p.String(), secret) {
		t.Error("a secret is in the log")
	}
	line := p.Wait(t, "handler failed; the row will be tried again", 1)
	if !strings.Contains(line["error"].(string), "status 503") {
		t.Errorf("%v", line)
	}
}
