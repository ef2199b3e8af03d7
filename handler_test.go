package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestAppend shows how to test a handler without a server: make it as the program does, give it notifications,
// look at what it has done.
func TestAppend(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "journal")
	h, err := newAppend(path, Setup{})
	if err != nil {
		t.Fatal(err)
	}
	first := notify.Notification{Channel: "orders", Payload: "one\nline", Attempt: 1, Serial: 1}
	second := notify.Notification{Channel: "orders", Payload: "two", Attempt: 1, Serial: 2}
	for _, n := range []notify.Notification{first, second, second} { // the last is a repeat
		if err := h.Handle(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	var ids []string
	for line := range strings.Lines(testkit.ReadFile(t, path)) {
		var entry struct{ ID, Channel, Payload string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		ids = append(ids, entry.ID)
		if entry.Channel != "orders" || entry.Payload != map[string]string{first.ID(): first.Payload, second.ID(): second.Payload}[entry.ID] {
			t.Errorf("%+v", entry)
		}
	}
	if len(ids) != 3 || ids[0] == ids[1] || ids[1] != ids[2] {
		t.Errorf("ids %v: a repeat has the same one, others do not", ids)
	}

	// Payloads are nobody else's business.
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("others may use the journal: %v %v", info.Mode(), err)
	}

	if _, err := newAppend("", Setup{}); err == nil {
		t.Error("no file is accepted")
	}
	if _, err := newAppend(filepath.Join(t.TempDir(), "no", "such", "directory"), Setup{}); err == nil {
		t.Error("a file that cannot be written is accepted")
	}
}

// TestAppendAfterATornLine: what a full disk or a kill has cut short does not spoil the line after it.
func TestAppendAfterATornLine(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "journal")
	const torn = `{"channel":"orders","id":"1","payl`
	if err := os.WriteFile(path, []byte(torn), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := newAppend(path, Setup{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := h.Handle(t.Context(), notify.Notification{Channel: "orders", Attempt: 1, Serial: 1}); err != nil {
			t.Fatal(err)
		}
	}
	lines := strings.Split(testkit.ReadFile(t, path), "\n")
	if len(lines) != 4 || lines[0] != torn || !json.Valid([]byte(lines[1])) || lines[1] != lines[2] || lines[3] != "" {
		t.Errorf("the journal has %q", lines)
	}
}
