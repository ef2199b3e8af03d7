//go:build unix

package pipe

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pglistener/pglistener/internal/notify"
)

// What is written is a line, is what encoding/json would read back, and holds nothing that a library takes for the end of a line.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{"", "plain", "a\"b\\c/d\n\r\t\x00\x1f\x7f", "ü€\U0001f600", "\u2028\u2029\u0085", "\xff\xc3\x28a\xe2\x28", "\ufffd"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		line := string(appendRequest(nil, "id", &notify.Notification{Channel: s, Payload: s, Attempt: 2}))
		text, ok := strings.CutSuffix(line, "\n")
		if !ok || strings.ContainsAny(text, "\n\r\v\f\u0085\u2028\u2029\x00") || !utf8.ValidString(line) {
			t.Fatalf("no line of text: %q", line)
		}
		var got, want struct {
			ID, Channel, Payload string
			Attempt              int
		}
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		reference, _ := json.Marshal(map[string]any{"id": "id", "channel": s, "payload": s, "attempt": 2})
		if err := json.Unmarshal(reference, &want); err != nil || got != want {
			t.Fatalf("%+v, want %+v", got, want)
		}
	})
}
