// Package benchside is what the sides of a benchmark have in common, so that
// all measure alike. Each side is a process of its own: it says "ready", and when
// it has heard or done everything it prints a Result and waits to be ended.
package benchside

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Env is the variable that holds a Task.
const Env = "PGLISTENER_BENCH"

// Task is what a side is to do.
type Task struct {
	Side     string // ours, or the name of a peer
	DSN      string
	Channels []string      // to hear; or the one channel of the outbox
	N        int           // how many notifications or jobs there will be
	Workers  int           // of the outbox or of River; 0: this is about notifications
	Work     time.Duration // what each takes
	URL      string        // feature: webhook
	Poll     time.Duration // how often River polls; 0 is its shortest
	Interval string        // CATCH_UP_INTERVAL; empty: its default
	Each     bool          // print a Result for each payload that carries its time, and never end
}

// Result is what a side has seen.
type Result struct {
	Seconds        float64 // from the first to the last
	P50, P99, P999 float64 // seconds from NOTIFY to handler, when payloads carry their time
	Max            float64 // likewise, the latest
	RateFirst      float64 // per second, in the first tenth of the time and in the last
	RateLast       float64
}

// FromEnv returns the Task of this process, if it is a side.
func FromEnv() (Task, bool) {
	var t Task
	s := os.Getenv(Env)
	if s == "" {
		return t, false
	}
	if err := json.Unmarshal([]byte(s), &t); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return t, true
}

// Counter counts until all have come. Count may be called from any goroutine.
type Counter struct {
	task        Task
	mu          sync.Mutex
	n           int
	first, last time.Time
	late        []float64
	perSecond   []int
	done        chan struct{}
}

// NewCounter makes a Counter for t.
func NewCounter(t Task) *Counter { return &Counter{task: t, done: make(chan struct{})} }

// Count takes one payload. One that begins with "t" carries the time when it was sent, in nanoseconds.
func (c *Counter) Count(payload string) {
	if c.task.Work > 0 {
		time.Sleep(c.task.Work)
	}
	timed := strings.HasPrefix(payload, "t")
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == 0 {
		c.first = time.Now()
	}
	c.n++
	if timed {
		sent, _ := strconv.ParseInt(payload[1:], 10, 64)
		late := time.Since(time.Unix(0, sent)).Seconds()
		if c.task.Each {
			_ = json.NewEncoder(os.Stdout).Encode(Result{Max: late})
			return
		}
		c.late = append(c.late, late)
	}
	if c.task.Workers > 0 && !c.task.Each {
		second := int(time.Since(c.first) / time.Second)
		for len(c.perSecond) <= second {
			c.perSecond = append(c.perSecond, 0)
		}
		c.perSecond[second]++
	}
	if c.n == c.task.N {
		c.last = time.Now()
		close(c.done)
	}
}

// Done is closed when all have come.
func (c *Counter) Done() <-chan struct{} { return c.done }

// Ready says that the side hears from now on.
func Ready() { fmt.Println("ready") }

// Finish waits until all have come, prints the Result, and waits until stdin is closed.
func (c *Counter) Finish() {
	<-c.done
	r := Result{Seconds: c.last.Sub(c.first).Seconds()}
	if len(c.late) > 0 {
		slices.Sort(c.late)
		at := func(q float64) float64 { return c.late[min(len(c.late)-1, int(q*float64(len(c.late))))] }
		r.P50, r.P99, r.P999, r.Max = at(0.5), at(0.99), at(0.999), at(1)
	}
	if tenth := len(c.perSecond) / 10; tenth > 0 {
		sum := func(s []int) (n float64) {
			for _, x := range s {
				n += float64(x)
			}
			return n / float64(len(s))
		}
		full := c.perSecond[1 : len(c.perSecond)-1] // the seconds at both ends are not whole
		r.RateFirst, r.RateLast = sum(full[:tenth]), sum(full[len(full)-tenth:])
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_, _ = bufio.NewReader(os.Stdin).ReadByte()
	os.Exit(0)
}
