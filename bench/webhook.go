// feature: webhook

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pglistener/pglistener/internal/benchside"
)

// hookPayload is what the rows hold, and what the bare client posts.
const hookPayload = `{"op":"update","table":"public.orders","key":{"id":4711},"new":{"id":4711,"state":"paid","total":"129.90"}}`

// receiver is a server that answers 204 to everything. It is this process, whichever client runs.
type receiver struct {
	url  string
	left atomic.Int64
	done chan time.Time // gets the time when none is left
}

func startReceiver() (*receiver, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &receiver{url: "http://" + l.Addr().String(), done: make(chan time.Time, 1)}
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			_, _ = io.Copy(io.Discard, req.Body)
			w.WriteHeader(http.StatusNoContent)
			if r.left.Add(-1) == 0 {
				r.done <- time.Now()
			}
		}))
	}()
	return r, nil
}

// webhook: the rows of an outbox through the program itself to a receiver that answers at once, against a program that
// does nothing but post.
func (b *bench) webhook() error {
	receiver, err := startReceiver()
	if err != nil {
		return err
	}
	for _, workers := range []int{1, 10, 100} {
		jobs := 40_000
		if workers == 1 {
			jobs = 15_000
		}
		rates := map[string][]float64{}
		for range 5 {
			if err := errors.Join(b.fill(jobs), b.exec("update outbox set payload = $1", hookPayload), b.exec("vacuum full analyze outbox"), b.exec("checkpoint")); err != nil {
				return err
			}
			receiver.left.Store(int64(jobs))
			began := time.Now()
			l, err := b.launch(b.server.DSN(), "bench=outbox:"+receiver.url, "LOG_LEVEL=error", fmt.Sprintf("CONCURRENCY=%d", workers),
				"WEBHOOK_SECRET=whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
			if err != nil {
				return err
			}
			err = b.awaitDrained(receiver)
			rates["ours"] = append(rates["ours"], float64(jobs)/time.Since(began).Seconds())
			l.end()
			if err != nil {
				return err
			}
			receiver.left.Store(int64(jobs))
			s, err := b.startSide(benchside.Task{Side: "http", URL: receiver.url, N: jobs, Workers: workers})
			if err != nil {
				return err
			}
			r, err := s.result()
			s.end()
			if err != nil {
				return err
			}
			<-receiver.done
			rates["http"] = append(rates["http"], float64(jobs)/r.Seconds)
		}
		b.compare(fmt.Sprintf("outbox to webhook, %d at once, against a bare net/http client", workers), rates["ours"], rates["http"], 0.6)
	}
	return nil
}

// awaitDrained waits until the receiver has had everything, and the outbox is empty.
func (b *bench) awaitDrained(r *receiver) error {
	select {
	case <-r.done:
	case <-time.After(2 * time.Minute):
		return fmt.Errorf("%d rows were never posted", r.left.Load())
	}
	return b.awaitEmpty()
}

// bareHTTP posts with net/http alone, from so many goroutines, over connections that are kept.
func bareHTTP(t benchside.Task) error {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = t.Workers, t.Workers
	client := &http.Client{Transport: transport}
	c := benchside.NewCounter(t)
	var left atomic.Int64
	left.Store(int64(t.N))
	var failed sync.Map
	benchside.Ready()
	for range t.Workers {
		go func() {
			for left.Add(-1) >= 0 {
				res, err := client.Post(t.URL, "application/json", strings.NewReader(hookPayload))
				if err != nil {
					failed.Store(err.Error(), true)
					return
				}
				_, _ = io.Copy(io.Discard, res.Body)
				res.Body.Close()
				c.Count("")
			}
		}()
	}
	c.Finish()
	return nil
}
