//go:build unix

package testkit

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// Logs collects a program's JSON log, and lets a test wait for a line of it.
type Logs struct {
	mu      sync.Mutex
	partial []byte
	text    bytes.Buffer
	lines   []Line
	changed chan struct{}
}

// Line is one line of a JSON log.
type Line map[string]any

// NewLogs makes empty Logs, which are printed when the test fails, if there is one.
func NewLogs(t testing.TB) *Logs {
	l := &Logs{changed: make(chan struct{})}
	if t == nil {
		return l
	}
	t.Cleanup(func() {
		if t.Failed() {
			l.mu.Lock()
			defer l.mu.Unlock()
			text := l.text.String()
			t.Logf("log:\n%s", text[max(0, len(text)-20_000):])
		}
	})
	return l
}

// message is the line's message; a line that is JSON need not be of our log.
func (l Line) message() string {
	s, _ := l["msg"].(string)
	return s
}

// Logger returns a logger that writes to the Logs, at every level.
func (l *Logs) Logger() *slog.Logger {
	return slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Write implements io.Writer.
func (l *Logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	l.partial = append(l.partial, p...)
	for {
		line, rest, ok := bytes.Cut(l.partial, []byte("\n"))
		if !ok {
			break
		}
		var parsed Line
		if json.Unmarshal(line, &parsed) != nil {
			parsed = Line{"msg": string(line)} // what is said before the log is set up
		}
		l.lines = append(l.lines, parsed)
		l.partial = rest
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return len(p), nil
}

// All returns the lines so far whose message begins with msg.
func (l *Logs) All(msg string) []Line {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.matching(msg)
}

func (l *Logs) matching(msg string) []Line {
	var out []Line
	for _, line := range l.lines {
		if strings.HasPrefix(line.message(), msg) {
			out = append(out, line)
		}
	}
	return out
}

// Wait waits for the nth line, counted from 1, whose message begins with msg.
func (l *Logs) Wait(t testing.TB, msg string, n int) Line {
	t.Helper()
	deadline := time.After(Patience)
	for {
		l.mu.Lock()
		found, changed := l.matching(msg), l.changed
		l.mu.Unlock()
		if len(found) >= n {
			return found[n-1]
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("no %q in the log %d times, only %d", msg, n, len(found))
		}
	}
}

// String is everything so far.
func (l *Logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
