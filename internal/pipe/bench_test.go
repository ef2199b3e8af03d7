//go:build unix

package pipe

import (
	"context"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/proc"
)

const benchPayload = `{"op":"update","table":"public.orders","key":{"id":4711},"new":{"id":4711,"state":"paid","total":"129.90"}}`

// BenchmarkPython is the Python program of docs/handlers.md, with 100 in flight. make bench measures it behind the outbox.
func BenchmarkPython(b *testing.B) {
	program := testkit.Program(b, "../../docs/handlers.md", "python")
	h, err := New(testkit.Python(b)+" "+program+" "+filepath.Join(b.TempDir(), "journal"), proc.Settings{}, 100, notify.Setup{Log: slog.New(slog.DiscardHandler), Grace: time.Second})
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
	var next atomic.Int64
	done := make(chan error, 100)
	b.ResetTimer()
	for range cap(done) {
		go func() {
			var err error
			for n := next.Add(1); n <= int64(b.N) && err == nil; n = next.Add(1) {
				err = h.Handle(ctx, notify.Notification{Channel: "orders", Payload: benchPayload, Serial: uint64(n), Attempt: 1})
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
	end()
	<-stopped
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
