package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/benchside"
	"github.com/pglistener/pglistener/internal/pgtest"
)

// Rows that carry the time of their insertion, for how late they are begun.
const timedInsert = `insert into outbox (channel, payload) values ('bench', 't' || (extract(epoch from clock_timestamp()) * 1e9)::bigint);`

// writers: what NOTIFY's commit lock costs those who write, and what is left of that when the channel is swept instead.
func (b *bench) writers() error {
	for _, clients := range []int{1, 8, 32} {
		rates := map[string][]float64{}
		sides := []struct {
			name, interval string // CATCH_UP_INTERVAL; empty: nobody listens
			trigger        bool
			swept          []string
		}{{"alone", "", false, nil}, {"notified", "5m", true, nil}, {"mixed", "20ms", true, []string{"bench"}}, {"swept", "20ms", false, nil}}
		for range 4 {
			slices.Reverse(sides) // what comes after much writing is slower
			for _, c := range sides {
				if c.interval == "20ms" && clients < 32 {
					continue
				}
				r, err := b.write(clients, c.interval, c.trigger, c.swept...)
				if err != nil {
					return err
				}
				rates[c.name] = append(rates[c.name], r)
			}
		}
		name := fmt.Sprintf("inserts by %d clients", clients)
		b.compare(name+", handled as they come, against no trigger and no listener", rates["notified"], rates["alone"], 0)
		if clients == 32 {
			b.compare(name+", swept every 20 ms, with a trigger for other channels, against no trigger and no listener", rates["mixed"], rates["alone"], 0)
			b.compare(name+", swept every 20 ms, without a trigger, against no listener", rates["swept"], rates["alone"], 0.9)
		}
	}
	return b.late()
}

// write returns how many rows a second so many clients insert in a few seconds, each in a transaction of its own.
func (b *bench) write(clients int, interval string, trigger bool, swept ...string) (float64, error) {
	if err := b.fill(0, swept...); err != nil {
		return 0, err
	}
	if !trigger {
		if err := b.exec("drop trigger outbox_notify on outbox"); err != nil {
			return 0, err
		}
	}
	if interval != "" { // the program itself, whose handler says nothing at this level
		l, err := b.launch(b.server.DSN(), "bench=outbox:log", "LOG_LEVEL=warn", "CONCURRENCY=10", "CATCH_UP_INTERVAL="+interval)
		if err != nil {
			return 0, err
		}
		defer l.end()
		if err := errors.Join(b.exec("insert into outbox (channel) values ('bench')"), b.awaitEmpty()); err != nil { // it listens
			return 0, err
		}
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	script := filepath.Join(dir, "insert.sql")
	if err := os.WriteFile(script, []byte("insert into outbox (channel, payload) values ('bench', '{}');\n"), 0o644); err != nil {
		return 0, err
	}
	bin, err := pgtest.Bin()
	if err != nil {
		return 0, err
	}
	out, err := exec.Command(bin+"/pgbench", "-n", "-f", script, "-c", fmt.Sprint(clients), "-j", "2", "-T", "4", b.server.DSN()).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("pgbench: %w: %s", err, out)
	}
	var perSecond float64
	_, after, _ := strings.Cut(string(out), "tps = ")
	if _, err := fmt.Sscanf(after, "%f", &perSecond); err != nil {
		return 0, fmt.Errorf("pgbench: %s", out)
	}
	return perSecond, nil
}

// awaitEmpty waits until the outbox has no rows.
func (b *bench) awaitEmpty() error {
	deadline := time.Now().Add(time.Minute)
	for left := 1; left > 0; time.Sleep(2 * time.Millisecond) {
		if err := b.db.QueryRow("select count(*) from outbox").Scan(&left); err != nil {
			return err
		} else if time.Now().After(deadline) {
			return fmt.Errorf("%d rows were never handled", left)
		}
	}
	return nil
}

// late: how long after its insertion a row is begun that nobody is notified of.
func (b *bench) late() error {
	if err := b.fill(0, "bench"); err != nil {
		return err
	}
	const rows = 1000
	s, err := b.startSide(benchside.Task{Side: "ours", Channels: []string{"bench"}, N: rows, Workers: 10, Interval: "20ms"})
	if err != nil {
		return err
	}
	defer s.end()
	for range rows {
		time.Sleep(4 * time.Millisecond)
		if err := b.exec(timedInsert); err != nil {
			return err
		}
	}
	r, err := s.result()
	if err != nil {
		return err
	}
	b.line("a row swept every 20 ms is begun late by, p50", ms(r.P50), "", "", "", true)
	b.line("a row swept every 20 ms is begun late by, the latest of 1,000", ms(r.Max), "", "", "<= 40 ms", r.Max <= 0.040)
	return nil
}
