//go:build unix

package pipe

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/proc"
)

const benchPayload = `{"op":"update","table":"public.orders","key":{"id":4711},"new":{"id":4711,"state":"paid","total":"129.90"}}`

// benchProgram is the least that a worker in Python does.
const benchProgram = `
import json, sys
for line in sys.stdin:
    event = json.loads(line)
    print(json.dumps({"id": event["id"], "ok": True}), flush=True)
`

// eachOf calls f b.N times from 100 goroutines.
func eachOf(b *testing.B, f func(number int64) error) {
	var next atomic.Int64
	done := make(chan error, 100)
	b.ResetTimer()
	for range cap(done) {
		go func() {
			var err error
			for n := next.Add(1); n <= int64(b.N) && err == nil; n = next.Add(1) {
				err = f(n)
			}
			done <- err
		}()
	}
	for range cap(done) {
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
}

func benchFile(b *testing.B) string {
	path := filepath.Join(b.TempDir(), "bench.py")
	if err := os.WriteFile(path, []byte(benchProgram), 0o644); err != nil {
		b.Fatal(err)
	}
	return path
}

// BenchmarkPython is the Python program as a pipe, with 100 in flight.
func BenchmarkPython(b *testing.B) {
	h, err := New([]string{python(), benchFile(b)}, proc.Settings{}, 100, notify.Setup{Log: slog.New(slog.DiscardHandler), Grace: time.Second})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	stop, end := context.WithCancel(ctx)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		h.(notify.Runner).Run(stop, ctx)
	}()
	if err := h.Handle(ctx, notify.Notification{Key: "first"}); err != nil {
		b.Fatal(err)
	}
	eachOf(b, func(n int64) error {
		return h.Handle(ctx, notify.Notification{Channel: "orders", Payload: benchPayload, Serial: uint64(n), Attempt: 1})
	})
	end()
	<-stopped
}

// BenchmarkExecPython is the same program, started once for each notification.
func BenchmarkExecPython(b *testing.B) {
	path, python := benchFile(b), python() // and not what looks for it, which is slow
	eachOf(b, func(n int64) error {
		cmd := proc.Command(context.Background(), time.Second, python, path)
		line := appendRequest(nil, "x", &notify.Notification{Channel: "orders", Payload: benchPayload, Serial: uint64(n), Attempt: 1})
		cmd.Stdin, cmd.Stdout = strings.NewReader(string(line)), io.Discard
		return cmd.Run()
	})
}

// BenchmarkWire is what the two lines of a notification cost here.
func BenchmarkWire(b *testing.B) {
	n := notify.Notification{Channel: "orders", Payload: benchPayload, Key: "0198f2a4-4711-7000-8000-000000000000", Attempt: 1, CreatedAt: time.Unix(0, 0)}
	h := &handler{}
	b.ReportAllocs()
	var line []byte
	for b.Loop() {
		line = appendRequest(line[:0], n.Key, &n)
		if _, problem, err := h.understand([]byte(`{"id": "0198f2a4-4711-7000-8000-000000000000", "ok": true}` + "\n")); problem != "" || err != nil {
			b.Fatal(problem)
		}
	}
}
