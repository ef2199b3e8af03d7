package main

import (
	"cmp"
	"context"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgxlisten"
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
	case "pgxlisten":
		return pgxListen(t)
	// begin: webhook
	case "http":
		return bareHTTP(t)
	// end: webhook
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

// pgxListen is github.com/jackc/pgxlisten, as its documentation shows it.
func pgxListen(t benchside.Task) error {
	ctx := context.Background()
	c := benchside.NewCounter(t)
	l := &pgxlisten.Listener{Connect: func(ctx context.Context) (*pgx.Conn, error) { return pgx.Connect(ctx, t.DSN) }}
	left := len(t.Channels)
	handler := &backlogHandler{count: c, last: func() {
		if left--; left == 0 {
			benchside.Ready() // it has no other way to say that it listens
		}
	}}
	for _, channel := range t.Channels {
		l.Handle(channel, handler)
	}
	go func() { _ = l.Listen(ctx) }()
	c.Finish()
	return nil
}

// backlogHandler is called for each channel when it is listened to, and for each notification.
type backlogHandler struct {
	count *benchside.Counter
	last  func()
}

func (h *backlogHandler) HandleBacklog(context.Context, string, *pgx.Conn) error {
	h.last()
	return nil
}

func (h *backlogHandler) HandleNotification(_ context.Context, n *pgconn.Notification, _ *pgx.Conn) error {
	h.count.Count(n.Payload)
	return nil
}

// noopArgs is a job that does nothing.
type noopArgs struct {
	Payload string `json:"payload,omitempty"`
}

func (noopArgs) Kind() string { return "noop" }

type noopWorker struct {
	river.WorkerDefaults[noopArgs]
	counter *benchside.Counter
}

func (w *noopWorker) Work(_ context.Context, job *river.Job[noopArgs]) error {
	w.counter.Count(job.Args.Payload)
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
		FetchPollInterval: cmp.Or(t.Poll, time.Millisecond),
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

// riverClient inserts. A longer cooldown would hold its notifications back.
func riverClient(pool *pgxpool.Pool) (*river.Client[pgx.Tx], error) {
	return river.NewClient(riverpgxv5.New(pool), &river.Config{FetchCooldown: time.Millisecond, Logger: slog.New(slog.DiscardHandler)})
}

// insertRiver inserts n jobs of one payload in one statement.
func insertRiver(ctx context.Context, client *river.Client[pgx.Tx], payload string, n int) error {
	batch := make([]river.InsertManyParams, n)
	for i := range batch {
		batch[i].Args = noopArgs{payload}
	}
	_, err := client.InsertManyFast(ctx, batch)
	return err
}

// fillRiver makes River's tables, empty, and inserts n jobs.
func fillRiver(ctx context.Context, pool *pgxpool.Pool, n int) error {
	if _, err := pool.Exec(ctx, "truncate river_job"); err != nil {
		return err
	}
	client, err := riverClient(pool)
	if err != nil {
		return err
	}
	for ; n > 0; n -= 10_000 {
		if err := insertRiver(ctx, client, "", min(n, 10_000)); err != nil {
			return err
		}
	}
	_, err = pool.Exec(ctx, "vacuum analyze river_job")
	return err
}
