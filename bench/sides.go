package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/lib/pq"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"

	"github.com/pglistener/pglistener/internal/benchside"
)

// The peers. Each is written as its documentation shows it, without any care for faults.

func runSide(t benchside.Task) error {
	switch t.Side {
	case "lib/pq":
		return barePQ(t)
	case "pgx":
		return barePGX(t)
	default:
		return runRiver(t)
	}
}

// barePQ ranges over lib/pq's channel.
func barePQ(t benchside.Task) error {
	l := pq.NewListener(t.DSN, time.Second, time.Second, nil)
	for _, c := range t.Channels {
		if err := l.Listen(c); err != nil {
			return err
		}
	}
	c := benchside.NewCounter(t)
	benchside.Ready()
	go func() {
		for n := range l.Notify {
			if n != nil {
				c.Count(n.Extra)
			}
		}
	}()
	c.Finish()
	return nil
}

// barePGX loops around WaitForNotification.
func barePGX(t benchside.Task) error {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, t.DSN)
	if err != nil {
		return err
	}
	for _, c := range t.Channels {
		if _, err := conn.Exec(ctx, "listen "+pgx.Identifier{c}.Sanitize()); err != nil {
			return err
		}
	}
	c := benchside.NewCounter(t)
	benchside.Ready()
	go func() {
		for {
			n, err := conn.WaitForNotification(ctx)
			if err != nil {
				return
			}
			c.Count(n.Payload)
		}
	}()
	c.Finish()
	return nil
}

// noopArgs is a job that does nothing.
type noopArgs struct{}

func (noopArgs) Kind() string { return "noop" }

type noopWorker struct {
	river.WorkerDefaults[noopArgs]
	counter *benchside.Counter
}

func (w *noopWorker) Work(context.Context, *river.Job[noopArgs]) error {
	w.counter.Count("")
	return nil
}

// runRiver works the jobs that are there, at the shortest cooldown that River allows.
func runRiver(t benchside.Task) error {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, t.DSN)
	if err != nil {
		return err
	}
	c := benchside.NewCounter(t)
	workers := river.NewWorkers()
	river.AddWorker(workers, &noopWorker{counter: c})
	client, err := river.NewClient(riverpgxv5.New(pool), &river.Config{
		Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: t.Workers}},
		Workers:           workers,
		FetchCooldown:     time.Millisecond,
		FetchPollInterval: time.Millisecond,
		Logger:            slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	benchside.Ready()
	if err := client.Start(ctx); err != nil {
		return err
	}
	c.Finish()
	return nil
}

// fillRiver makes River's tables, empty, and inserts n jobs.
func fillRiver(ctx context.Context, pool *pgxpool.Pool, n int) error {
	if _, err := pool.Exec(ctx, "truncate river_job"); err != nil {
		return err
	}
	client, err := river.NewClient(riverpgxv5.New(pool), &river.Config{})
	if err != nil {
		return err
	}
	for n > 0 {
		batch := make([]river.InsertManyParams, min(n, 10_000))
		for i := range batch {
			batch[i].Args = noopArgs{}
		}
		if _, err := client.InsertManyFast(ctx, batch); err != nil {
			return err
		}
		n -= len(batch)
	}
	_, err = pool.Exec(ctx, "vacuum analyze river_job")
	return err
}
