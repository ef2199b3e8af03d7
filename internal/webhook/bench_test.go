package webhook

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
)

// receiverEnv makes the test binary a receiver, so that the benchmarks measure a client alone.
const receiverEnv = "WEBHOOK_BENCH_RECEIVER"

func TestMain(m *testing.M) {
	if os.Getenv(receiverEnv) == "" {
		os.Exit(m.Run())
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() { // it ends with the benchmark, whose end of the pipe is stdin
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Printf("http://%s\n", l.Addr())
	panic(http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_, _ = io.Copy(io.Discard, req.Body)
		w.WriteHeader(http.StatusNoContent)
	})))
}

// startReceiver starts one in a process of its own, and returns its URL.
func startReceiver(b *testing.B) string {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), receiverEnv+"=yes")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { stdin.Close(); _ = cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	return strings.TrimSpace(line)
}

const benchPayload = `{"op":"update","table":"public.orders","key":{"id":4711},"new":{"id":4711,"state":"paid","total":"129.90"}}`

// bare is what a program without the handler would do: the same POST with net/http alone.
func bare(address string, concurrency int) func() error {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = concurrency, concurrency
	client := &http.Client{Transport: transport}
	return func() error {
		res, err := client.Post(address, "application/json", strings.NewReader(benchPayload))
		if err != nil {
			return err
		}
		defer res.Body.Close()
		_, err = io.Copy(io.Discard, res.Body)
		return err
	}
}

// signed is the handler, with one secret.
func signed(b *testing.B, address string, concurrency int) func() error {
	h, err := New(address, Settings{Secret: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}, nil, concurrency, notify.Setup{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	var serial atomic.Uint64
	return func() error {
		return h.Handle(b.Context(), notify.Notification{
			Channel: "orders", Payload: benchPayload, Attempt: 1, Serial: serial.Add(1), CreatedAt: time.Unix(1_700_000_000, 123_456_000),
		})
	}
}

// repeat posts n times, from so many goroutines at once.
func repeat(b *testing.B, n, concurrency int, post func() error) time.Duration {
	var left atomic.Int64
	left.Store(int64(n))
	var all sync.WaitGroup
	began := time.Now()
	for range concurrency {
		all.Go(func() {
			for left.Add(-1) >= 0 {
				if err := post(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	return time.Since(began)
}

// BenchmarkWebhook measures the handler, and by turns with it a bare client of net/http. "of-bare" is the ratio
// of the rates; ns/op and allocs/op are the handler's own.
func BenchmarkWebhook(b *testing.B) { benchmark(b, true) }

// BenchmarkBare is the bare client alone, for a profile.
func BenchmarkBare(b *testing.B) { benchmark(b, false) }

func benchmark(b *testing.B, withHandler bool) {
	address := startReceiver(b)
	for _, concurrency := range []int{1, 10, 100} {
		b.Run(fmt.Sprint(concurrency), func(b *testing.B) {
			b.ReportAllocs()
			peer := bare(address, concurrency)
			post := peer
			if withHandler {
				post = signed(b, address, concurrency)
			}
			repeat(b, 2*concurrency, concurrency, peer) // the connections
			repeat(b, 2*concurrency, concurrency, post)
			var ours, theirs time.Duration
			const turns = 20
			b.ResetTimer()
			for i := range turns {
				n := b.N*(i+1)/turns - b.N*i/turns
				ours += repeat(b, n, concurrency, post)
				b.StopTimer()
				if withHandler {
					theirs += repeat(b, n, concurrency, peer)
				}
				b.StartTimer()
			}
			if withHandler {
				b.ReportMetric(theirs.Seconds()/ours.Seconds(), "of-bare")
			}
		})
	}
}
