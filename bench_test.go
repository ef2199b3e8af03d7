// feature: outbox

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/benchside"
	"github.com/pglistener/pglistener/internal/logs"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/outbox"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The benchmarks measure ratios, both sides in one run, by turns: an absolute time on a shared machine means
// little. make bench measures the same against peers; there this test binary is our side, for the program
// itself is no package to import.

// benchMain is our side of make bench, if this process is that.
func benchMain() {
	t, ok := benchside.FromEnv()
	if !ok {
		return
	}
	c := benchside.NewCounter(t)
	handler := notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		c.Count(n.Payload)
		return nil
	})
	v := vars{"DATABASE_URL": t.DSN, "CHANNELS": strings.Join(t.Channels, "=bench,") + "=bench"}
	if t.Workers > 0 {
		v["CHANNELS"], v["CONCURRENCY"] = t.Channels[0]+"=outbox:bench", fmt.Sprint(t.Workers)
	}
	if t.Interval != "" {
		v["CATCH_UP_INTERVAL"] = t.Interval
	}
	l := benchListener(v, handler)
	if t.Workers > 0 {
		benchside.Ready()
	}
	go func() { _, _ = l.Run(context.Background()) }()
	if t.Workers == 0 {
		awaitReady(l)
		benchside.Ready()
	}
	c.Finish()
}

func benchListener(v vars, h notify.Handler) *Listener {
	handlers := with("bench", h)
	cfg, problems := loadConfig(v.lookup, handlers, modes())
	log := logs.New(cfg.Log, io.Discard)
	channels, wrong := makeChannels(cfg, handlers, modes(), log)
	if problems = append(problems, wrong...); len(problems) > 0 {
		panic(problems)
	}
	return NewListener(cfg.dsn(), cfg.Listener, channels, log)
}

func awaitReady(l *Listener) {
	for l.Ready() != nil {
		time.Sleep(time.Millisecond)
	}
}

// bareLoop is what everybody writes: range over lib/pq's channel.
func bareLoop(tb testing.TB, dsn string, channels []string, each func(payload string)) (stop func()) {
	tb.Helper()
	l := pq.NewListener(dsn, time.Second, time.Second, nil)
	for _, c := range channels {
		if err := l.Listen(c); err != nil {
			tb.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := range l.Notify {
			if n != nil {
				each(n.Extra)
			}
		}
	}()
	return func() {
		l.Close()
		<-done
	}
}

// ourLoop is this program's Listener with the same handler.
func ourLoop(tb testing.TB, dsn string, channels []string, each func(payload string)) (stop func()) {
	tb.Helper()
	l := benchListener(vars{"DATABASE_URL": dsn, "CHANNELS": strings.Join(channels, "=bench,") + "=bench"},
		notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
			each(n.Payload)
			return nil
		}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = l.Run(ctx)
	}()
	awaitReady(l)
	return func() {
		cancel()
		<-done
	}
}

type loop func(tb testing.TB, dsn string, channels []string, each func(payload string)) (stop func())

// throughput is how long it takes one side to hear n notifications of size bytes.
func throughput(tb testing.TB, side loop, channel string, n, size int) time.Duration {
	tb.Helper()
	done := make(chan struct{})
	count := 0
	stop := side(tb, testkit.DSN(tb), []string{channel}, func(string) {
		if count++; count == n {
			close(done)
		}
	})
	defer stop()
	began := time.Now()
	// Several transactions, so that the server has begun to send before all are queued.
	const per = 20_000
	for sent := 0; sent < n; sent += per {
		_, err := testkit.DB(tb).Exec("select pg_notify($1, lpad(i::text, $2, '0')) from generate_series($3::int, $4::int) i",
			channel, size, sent+1, min(sent+per, n))
		if err != nil {
			tb.Fatal(err)
		}
	}
	<-done
	return time.Since(began)
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// BenchmarkThroughput reports ours / bare: 1 is as fast as lib/pq's bare loop.
func BenchmarkThroughput(b *testing.B) {
	for _, c := range []struct {
		name    string
		n, size int
	}{{"30B", 300_000, 30}, {"2kB", 50_000, 2000}} {
		b.Run(c.name, func(b *testing.B) {
			var ours, bare []time.Duration
			for b.Loop() {
				bare = append(bare, throughput(b, bareLoop, "bench_bare", c.n, c.size))
				ours = append(ours, throughput(b, ourLoop, "bench_ours", c.n, c.size))
			}
			b.ReportMetric(float64(median(bare))/float64(median(ours)), "ours/bare")
			b.ReportMetric(float64(c.n)/median(ours).Seconds(), "notifications/s")
		})
	}
}

// BenchmarkOutbox reports jobs per second at some numbers of workers.
func BenchmarkOutbox(b *testing.B) {
	for _, workers := range []int{1, 10, 100} {
		b.Run(fmt.Sprint(workers), func(b *testing.B) {
			const n = 50_000
			var took []time.Duration
			for b.Loop() {
				b.StopTimer()
				if _, err := testkit.DB(b).Exec("drop table if exists bench_outbox"); err != nil {
					b.Fatal(err)
				}
				sql, _ := outbox.Schema("bench_outbox")
				if _, err := testkit.DB(b).Exec(sql); err != nil {
					b.Fatal(err)
				}
				if _, err := testkit.DB(b).Exec("insert into bench_outbox (channel) select 'bench_outbox' from generate_series(1, $1)", n); err != nil {
					b.Fatal(err)
				}
				if _, err := testkit.DB(b).Exec("vacuum analyze bench_outbox"); err != nil {
					b.Fatal(err)
				}
				c := benchside.NewCounter(benchside.Task{N: n})
				l := benchListener(vars{"DATABASE_URL": testkit.DSN(b), "OUTBOX_TABLE": "bench_outbox", "CHANNELS": "bench_outbox=outbox:bench", "CONCURRENCY": fmt.Sprint(workers)},
					notify.HandlerFunc(func(context.Context, notify.Notification) error {
						c.Count("")
						return nil
					}))
				b.StartTimer()
				ctx, cancel := context.WithCancel(context.Background())
				began := time.Now()
				go func() {
					<-c.Done()
					took = append(took, time.Since(began))
					cancel()
				}()
				_, _ = l.Run(ctx)
			}
			b.ReportMetric(n/median(took).Seconds(), "jobs/s")
		})
	}
}
