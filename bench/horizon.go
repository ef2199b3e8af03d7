package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/pglistener/pglistener/internal/benchside"
)

// patience is how long a probe may take before the side counts as stuck.
const patience = 20 * time.Second

// queue is a side whose rows are inserted while a snapshot is held elsewhere.
type queue struct {
	name   string
	task   benchside.Task
	insert func(payload string, n int) error // payload is empty, or "t" and the time in nanoseconds
	side   *side
	before float64
	loaded int
}

// horizon: an open transaction keeps vacuum from removing what was done. One row must be begun as soon after many jobs as before.
// HORIZON_SECONDS shortens the longer of the two loads.
func (b *bench) horizon() error {
	seconds, err := strconv.Atoi(os.Getenv("HORIZON_SECONDS"))
	if err != nil || seconds < 1 {
		seconds = 300
	}
	ours := &queue{name: "ours", task: benchside.Task{Side: "ours", Channels: []string{"bench"}}, insert: func(payload string, n int) error {
		return b.exec("insert into outbox (channel, payload) select 'bench', $1 from generate_series(1, $2::int)", payload, n)
	}}
	ctx := context.Background()
	client, err := riverClient(b.pool)
	if err != nil {
		return err
	}
	peers := []*queue{{name: "River", task: benchside.Task{Side: "river", Poll: time.Second}, insert: func(payload string, n int) error {
		return insertRiver(ctx, client, payload, n)
	}}}
	if err := fillRiver(ctx, b.pool, 0); err != nil {
		return err
	}
	if b.installGraphile() {
		if err := b.fillGraphile(0); err != nil {
			return err
		}
		peers = append(peers, &queue{name: "graphile-worker", task: benchside.Task{Side: "graphile"}, insert: func(payload string, n int) error {
			text := "{}"
			if payload != "" {
				nanoseconds, _ := strconv.ParseInt(payload[1:], 10, 64)
				text = fmt.Sprintf(`{"t": %f}`, float64(nanoseconds)/1e9)
			}
			return b.exec(insertGraphile, text, n)
		}})
	}
	if err := b.underHorizon(2000, seconds, 1.5, append([]*queue{ours}, peers...)...); err != nil {
		return err
	}
	return b.underHorizon(8000, min(100, seconds), 3, ours)
}

// underHorizon measures how long one row takes in each queue, before and after a load of so many rows a second, under a snapshot
// that is held from the beginning to the end. The queues are loaded at once and measured one after the other, the others frozen.
// The first one is ours, and has the target.
func (b *bench) underHorizon(perSecond, seconds int, target float64, queues ...*queue) error {
	if err := b.fill(0); err != nil {
		return err
	}
	// Only what is dead in these tables is to matter.
	if err := errors.Join(b.exec("vacuum"), b.exec("checkpoint")); err != nil {
		return err
	}
	for _, q := range queues {
		q.task.Workers, q.task.N, q.task.Each, q.loaded = 10, -1, true, 0
		var err error
		if q.side, err = b.startSide(q.task); err != nil {
			return err
		}
		defer q.side.end()
	}
	if err := measure(queues, func(q *queue, p50 float64) { q.before = p50 }); err != nil {
		return err
	}
	holder, err := b.db.Begin()
	if err != nil {
		return err
	}
	defer func() { _ = holder.Rollback() }()
	if _, err := holder.Exec("set transaction isolation level repeatable read"); err != nil {
		return err
	}
	if _, err := holder.Exec("select txid_current()"); err != nil {
		return err
	}
	loads := make(chan error)
	for _, q := range queues {
		go func() { loads <- load(q, perSecond, seconds) }()
	}
	for range queues {
		if e := <-loads; err == nil {
			err = e
		}
	}
	if err != nil {
		return err
	}
	time.Sleep(2 * time.Second) // for the last of them
	return measure(queues, func(q *queue, p50 float64) {
		name := fmt.Sprintf("one row, p50, after %d jobs in %d s under a held snapshot, against before them", q.loaded, seconds)
		bound := ""
		if q == queues[0] {
			bound = fmt.Sprintf("<= %v", target)
		} else {
			name += "; " + q.name + " against itself"
		}
		b.line(name, ms(p50), ms(q.before), fmt.Sprintf("%.2f", p50/q.before), bound, p50/q.before <= target)
	})
}

// load inserts n rows a second for so many seconds, in statements of 25 ms each; a queue that slows its writers gets fewer.
func load(q *queue, perSecond, seconds int) error {
	const every = 25 * time.Millisecond
	each := int(time.Duration(perSecond) * every / time.Second)
	began := time.Now()
	for i := 0; time.Since(began) < time.Duration(seconds)*time.Second; i++ {
		time.Sleep(time.Until(began.Add(time.Duration(i) * every)))
		if err := q.insert("", each); err != nil {
			return fmt.Errorf("%s: %w", q.name, err)
		}
		q.loaded += each
	}
	return nil
}

// measure finds how long one row takes in each queue, from before its insert to its handler, while the others are frozen.
func measure(queues []*queue, found func(q *queue, p50 float64)) error {
	for _, q := range queues {
		_ = q.side.cmd.Process.Signal(syscall.SIGSTOP)
	}
	for _, q := range queues {
		_ = q.side.cmd.Process.Signal(syscall.SIGCONT)
		time.Sleep(time.Second)
		var took []float64
		for began := time.Now(); len(took) < 100 && time.Since(began) < patience; time.Sleep(20 * time.Millisecond) {
			if err := q.insert(fmt.Sprintf("t%d", time.Now().UnixNano()), 1); err != nil {
				return err
			}
			result := make(chan float64, 1)
			go func() {
				if r, err := q.side.result(); err == nil {
					result <- r.Max
				}
			}()
			select {
			case late := <-result:
				took = append(took, late)
				continue
			case <-time.After(patience):
				took = append(took, patience.Seconds()) // at least
			}
			break
		}
		found(q, median(took))
		_ = q.side.cmd.Process.Signal(syscall.SIGSTOP)
	}
	for _, q := range queues {
		_ = q.side.cmd.Process.Signal(syscall.SIGCONT)
	}
	return nil
}
