// Package outbox is the mode outbox: a notification on the channel is only a hint; the work is the rows of a table, and every row
// is handled at least once, whatever is killed (DESIGN section 6).
package outbox

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/retry"
)

// Settings are the variables of an outbox channel.
type Settings struct {
	Table string `env:"OUTBOX_TABLE,default=outbox" usage:"table of the outbox channels, NAME or SCHEMA.NAME"`
	// With the pauses between them 110 attempts take three days.
	Attempts int `env:"OUTBOX_ATTEMPTS,default=110" max:"100000" usage:"attempts before a row of the outbox is kept as failed; 110 take three days"`
}

// Options say how an Outbox works.
type Options struct {
	Settings
	call.Limits
	DSN     string        // of the database
	Timeout time.Duration // of every answer of the server
	Memory  int64         // how many bytes of payloads may be claimed ahead; 16 MB if zero

	// Next returns the next time of a schedule after now; nominal is the time of the run before. The zero time means never.
	// Without it rows that have a schedule fail.
	Next func(schedule string, nominal, now time.Time) (time.Time, error)
	// Schedule is that of the one row that the channel always has; "" if it has none.
	Schedule string
}

// Outbox drains the rows of one channel. It is a notify.Handler of which Handle and CatchUp only wake it; Run does the work.
type Outbox struct {
	channel string
	handler notify.Handler // asked for what else it can do
	handle  call.Func      // makes a call of it
	log     *slog.Logger
	store   store
	pool    *Pool
	options Options
	margin  time.Duration // how long a claimed row may wait before it is begun
	retry   retry.Backoff

	wake chan struct{} // capacity 1: there may be something due

	// These are used by the claimer's goroutine only.
	kept  time.Time // when it last made sure of the row of NAME_SCHEDULE
	scan  scan
	slack time.Duration // by how much the next claim lasts longer: it may wait for a connection, and its rows may take long to come
	hire  func()        // starts a worker

	mu       sync.Mutex    // guards what follows
	buffer   []job         // claimed, not begun; in order
	ready    *sync.Cond    // of mu: the buffer has grown, or the end has come
	stopping bool          // begin nothing more
	workers  int           // goroutines: no more than there has been work for at once
	idle     int           // of them, those that wait for work
	running  int           // handlers
	low      int           // when the buffer is down to this, more is claimed
	results  []result      // not yet written
	locked   []result      // of rows that an open transaction holds
	stale    []job         // claimed and not begun: to be given back
	written  chan struct{} // capacity 1: there are results
	taken    chan struct{} // capacity 1: the buffer has shrunk
	handling time.Duration // how long a handler takes, as a moving average
	size     int           // of a payload, likewise
	breaker  retry.Breaker
	failures retry.Failures // of the handler
	counts   counts
	calls    call.Stats
	health   health
	labels   []string // of its own figures
}

// job is a claimed row.
type job struct {
	id       int64
	event    string // the idempotency key
	payload  string
	attempts int // 0: of its schedule the first time is yet to be found
	schedule string
	keyed    bool   // its result is written by end
	xmin     string // changes when somebody else changes the row
	until    string // its leased_until, which no other claim has
	lost     bool   // its last lease ended, and the outcome was never written
	created  time.Time
	runAt    time.Time
	due      time.Time // since when it has been due, failures apart: the nominal time of a schedule
	try      bool      // claimed to find out whether the receiver is back
	claimed  time.Time // by our own clock, which never runs further than the lease; later by what that has of slack
}

// result is what became of a job.
type result struct {
	job
	err error // nil: done
}

// prefetch bounds what is claimed ahead.
const (
	prefetchTime = 50 * time.Millisecond // of work, so that a row hardly waits where another replica could take it
	prefetchRows = 2000
	rowBytes     = 512 // that a row takes besides its payload
)

// New makes an Outbox that gives the rows of its channel to h, through the connections of pool. Call Run once; it releases the
// pool.
func New(h notify.Handler, pool *Pool, options Options, setup notify.Setup) (*Outbox, error) {
	t, err := parseTable(options.Table)
	if err != nil {
		return nil, err
	}
	db, err := pool.acquire(setup.Channel, options.DSN, options.Timeout)
	if err != nil {
		return nil, err
	}
	o := &Outbox{
		channel: setup.Channel, handler: h, handle: h.Handle, log: setup.Log, pool: pool, options: options,
		margin: 10 * time.Second, retry: retry.Backoff{Min: 2 * time.Second, Max: time.Hour},
		wake: make(chan struct{}, 1), written: make(chan struct{}, 1), taken: make(chan struct{}, 1),
	}
	o.ready, o.health = sync.NewCond(&o.mu), health{progress: time.Now(), retrying: map[int64]time.Time{}}
	// The lease outlives the wait for a slot, the handler, its end after the time limit, and the writing of the result.
	lease := o.margin + call.Longest(options.Limits.Timeout) + setup.Grace + o.margin
	o.store = store{db: db, table: t, channel: setup.Channel, owner: fmt.Sprintf("%016x%016x", rand.Uint64(), rand.Uint64()), lease: lease, timeout: limit(options.Timeout), bytes: cmp.Or(options.Memory, 16<<20)}
	return o, nil
}

// Handle wakes the drain: rows were inserted.
func (o *Outbox) Handle(context.Context, notify.Notification) error {
	o.poke()
	return nil
}

// CatchUp wakes the drain: rows may have been inserted, and others may have changed what the figures say.
func (o *Outbox) CatchUp(context.Context) error {
	o.mu.Lock()
	o.counts.changed = true
	o.mu.Unlock()
	o.poke()
	return nil
}

func (o *Outbox) poke() { retry.Nudge(o.wake) }

// Run implements Runner.
func (o *Outbox) Run(stop, quit context.Context) {
	defer o.pool.release(o.channel)
	var workers, writer, handler sync.WaitGroup
	o.hire = func() { workers.Go(func() { o.work(quit) }) }
	ctx, endHandler := context.WithCancel(context.Background())
	if r, ok := o.handler.(notify.Runner); ok {
		handler.Go(func() { r.Run(ctx, quit) })
	}
	written := make(chan struct{})
	writer.Go(func() { o.write(quit, written) })

	o.claim(stop)

	o.mu.Lock()
	o.stopping = true
	unbegun := o.buffer
	o.buffer = nil
	o.ready.Broadcast()
	o.mu.Unlock()
	// What was not begun goes back at once, for another replica to take.
	o.giveBack(unbegun)
	busy, finished := context.WithCancel(context.Background())
	go func() { workers.Wait(); finished() }()
	select {
	case <-busy.Done():
	case <-quit.Done():
		// Handlers that obey their context are done in a moment, and their rows can still be written as failed; the others' rows
		// are due again when their lease ends.
		retry.Sleep(busy, 2*time.Second)
	}
	endHandler() // it may finish what it does while the results are written
	close(written)
	writer.Wait()
	handler.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.running > 0 {
		o.log.Error("handler still runs at the end; it does not obey its context. Its row comes due again", "running", o.running)
	}
}
