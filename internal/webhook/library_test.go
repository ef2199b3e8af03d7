package webhook

import (
	"bufio"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// nodeReceiver starts testdata/receiver.js, which verifies with the library of Standard Webhooks for
// JavaScript, and returns its URL.
func nodeReceiver(t *testing.T, secret string) string {
	t.Helper()
	module, err := filepath.Abs("../../bin/npm/node_modules/standardwebhooks")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("node", "testdata/receiver.js", module, secret)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait()
	})
	port, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return "http://127.0.0.1:" + strings.TrimSpace(port)
}

// TestStandardWebhooksLibraryVerifies: a receiver that another language's library makes accepts what we sign,
// and nothing else; while secrets change it may know the old one or the new one.
func TestStandardWebhooksLibraryVerifies(t *testing.T) {
	t.Parallel()
	if out, err := exec.Command("sh", "testdata/install.sh").CombinedOutput(); err != nil {
		testkit.Skip(t, "cannot install the library: "+err.Error()+": "+string(out))
	}
	oldSecret, newSecret := secretOf("a"), secretOf("b")
	knowsNew := nodeReceiver(t, newSecret)
	for _, c := range []struct{ name, receiver, secret, refusal string }{
		{"before", nodeReceiver(t, oldSecret), oldSecret, ""},
		{"while they change", knowsNew, oldSecret + "," + newSecret, ""},
		{"the new one first", knowsNew, newSecret + " " + oldSecret, ""},
		{"after", knowsNew, newSecret, ""},
		{"another secret", knowsNew, oldSecret, "No matching signature found"},
		{"no secret", knowsNew, "", "Missing required headers"},
	} {
		h := hook(t, c.receiver, Settings{Secret: c.secret})
		for _, payload := range []string{`{"order": 1, "name": "naïve ☃"}`, "text, no JSON", "", strings.Repeat("long ", 100_000)} {
			err := h.Handle(t.Context(), notify.Notification{Key: "event-1", Payload: payload})
			if c.refusal == "" && err != nil || c.refusal != "" && (err == nil || !strings.Contains(err.Error(), c.refusal)) {
				t.Errorf("%s, %.20q: %v", c.name, payload, err)
			}
		}
	}
}
