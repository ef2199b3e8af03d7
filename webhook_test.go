// feature: webhook outbox

package main

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

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
