// Bench measures the listener against its peers and against its targets, on a
// throwaway server of its own, and prints one table. "make bench" builds what it
// needs and runs it. Ratios count: both sides run by turns, and the medians of
// several rounds are compared.
//
// Usage: bench PATH-OF-PGLISTENER PATH-OF-ITS-TEST-BINARY [ROW...]
// runs the rows whose names begin with one of ROW; all without.
package main

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	_ "github.com/lib/pq"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"

	"github.com/pglistener/pglistener/internal/benchside"
	"github.com/pglistener/pglistener/internal/pgtest"
)

func main() {
	if task, ok := benchside.FromEnv(); ok {
		fmt.Fprintln(os.Stderr, runSide(task)) // it exits by itself when it is done
		os.Exit(1)
	}
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: bench PATH-OF-PGLISTENER PATH-OF-ITS-TEST-BINARY [ROW...]")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is what all rows share.
type bench struct {
	program string // pglistener
	ours    string // its test binary: our side with a handler of Go
	server  *pgtest.Server
	db      *sql.DB
	pool    *pgxpool.Pool
	missed  int

	graphileAt string // where the npm package is; empty: not installed yet
}

// row is one measurement; run prints its lines through b.line.
type row struct {
	name string
	run  func(b *bench) error
}

var rows = []row{
	{"notifications", (*bench).notifications},
	{"latency", (*bench).latency},
	{"outbox", (*bench).outbox},
	{"pipe", (*bench).pipe}, // feature: execcmd pipe
	{"graphile", (*bench).graphile},
	{"webhook", (*bench).webhook}, // feature: webhook
	{"claim", (*bench).claim},
	{"size", (*bench).size},
	{"start", (*bench).start},
	{"deaf", (*bench).deaf},
	{"memory", (*bench).memory},
	{"sustained", (*bench).sustained},
	{"horizon", (*bench).horizon},
	{"writers", (*bench).writers},
	{"replicas", (*bench).replicas},
}

func run(program, ours string, only []string) error {
	b := &bench{program: program, ours: ours}
	var err error
	// Not the settings of the tests: those turn durability off.
	b.server, err = pgtest.Start("fsync = on", "synchronous_commit = on", "shared_buffers = 256MB", "max_wal_size = 4GB", "max_connections = 300")
	if err != nil {
		return err
	}
	defer b.server.Close()
	// Who sends is not what is measured: each NOTIFY would wait for the disk.
	if b.db, err = sql.Open("postgres", b.server.DSN()+"&synchronous_commit=off"); err != nil {
		return err
	}
	defer b.db.Close()
	ctx := context.Background()
	if b.pool, err = pgxpool.New(ctx, b.server.DSN()); err != nil {
		return err
	}
	defer b.pool.Close()
	migrator, err := rivermigrate.New(riverpgxv5.New(b.pool), nil)
	if err != nil {
		return err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return err
	}
	fmt.Println("| what | ours | peer | ratio | target | holds |\n|---|---|---|---|---|---|")
	for _, r := range rows {
		if len(only) > 0 && !slices.ContainsFunc(only, func(o string) bool { return strings.HasPrefix(r.name, o) }) {
			continue
		}
		if err := r.run(b); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	if b.missed > 0 {
		return fmt.Errorf("%d targets were missed", b.missed)
	}
	return nil
}

// line prints one line of the table, in Markdown. An empty target only informs.
func (b *bench) line(what, ours, peer, ratio, target string, holds bool) {
	verdict := ""
	switch {
	case target != "" && holds:
		verdict = "ok"
	case target != "":
		verdict = "short"
		b.missed++
	}
	fmt.Printf("| %s | %s | %s | %s | %s | %s |\n", what, ours, peer, ratio, target, verdict)
}

// compare prints the line of two sides' rates, or of their medians where there are several. A target of 0 only informs.
func (b *bench) compare(what string, ours, peer []float64, target float64) {
	ratio, text := median(ours)/median(peer), ""
	if target > 0 {
		text = fmt.Sprintf(">= %v", target)
	}
	b.line(what, rate(median(ours)), rate(median(peer)), fmt.Sprintf("%.2f", ratio), text, ratio >= target)
}

func (b *bench) exec(query string, args ...any) error {
	_, err := b.db.Exec(query, args...)
	if err != nil {
		return fmt.Errorf("%.60s: %w", query, err)
	}
	return nil
}

// side is a running side.
type side struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

// startSide starts a side and waits until it is ready.
func (b *bench) startSide(t benchside.Task) (*side, error) {
	if t.DSN == "" {
		t.DSN = b.server.DSN()
	}
	text, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	path := b.ours
	if t.Side != "ours" {
		if path, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	s := &side{cmd: exec.Command(path)}
	if t.Side == "graphile" {
		s.cmd = graphileCommand(b.graphileAt)
	}
	s.cmd.Env = append(os.Environ(), benchside.Env+"="+string(text))
	s.cmd.Stderr = os.Stderr
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.out = bufio.NewReader(stdout)
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := s.out.ReadString('\n')
	if err != nil || line != "ready\n" {
		s.end()
		return nil, fmt.Errorf("%s is not ready: %q %w", t.Side, line, err)
	}
	return s, nil
}

// result waits until the side is done. It runs on until end.
func (s *side) result() (r benchside.Result, err error) {
	line, err := s.out.ReadString('\n')
	if err != nil {
		return r, fmt.Errorf("no result: %w", err)
	}
	return r, json.Unmarshal([]byte(line), &r)
}

func (s *side) end() {
	s.stdin.Close()
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

func median(v []float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

func rate(v float64) string { return fmt.Sprintf("%.0f/s", v) }

func ms(seconds float64) string { return fmt.Sprintf("%.3f ms", seconds*1000) }

// notifications: how many per second go through to a handler that does nothing.
func (b *bench) notifications() error {
	for _, c := range []struct {
		name              string
		n, size, channels int
		rounds            int
		target            float64 // against lib/pq
	}{
		{"1,000,000 notifications of 30 bytes", 1_000_000, 30, 1, 5, 0.95},
		{"100,000 notifications of 2 kB", 100_000, 2000, 1, 5, 0.85},
		{"500,000 notifications of 30 bytes on 64 channels", 500_000, 30, 64, 5, 0.85},
	} {
		peers := []string{"lib/pq", "pgx", "pgxlisten"}
		rates := map[string][]float64{}
		for range c.rounds {
			for _, who := range append([]string{"ours"}, peers...) {
				r, err := b.hear(who, c.n, c.size, c.channels)
				if err != nil {
					return err
				}
				rates[who] = append(rates[who], float64(c.n)/r)
			}
		}
		for _, peer := range peers {
			target := 0.0
			if peer == "lib/pq" {
				target = c.target
			}
			b.compare(c.name+", against "+peer, rates["ours"], rates[peer], target)
		}
	}
	return nil
}

// hear sends n notifications and returns the seconds until one side has heard them all.
func (b *bench) hear(who string, n, size, channels int) (float64, error) {
	names := make([]string, channels)
	for i := range names {
		names[i] = fmt.Sprintf("bench%d", i)
	}
	s, err := b.startSide(benchside.Task{Side: who, Channels: names, N: n})
	if err != nil {
		return 0, err
	}
	defer s.end()
	began := time.Now()
	const per = 50_000 // in several transactions, so that it begins to arrive before all is sent
	for sent := 0; sent < n; sent += per {
		if err := b.exec("select pg_notify('bench' || i % $1, lpad(i::text, $2, '0')) from generate_series($3::int, $4::int) i",
			channels, size, sent+1, min(sent+per, n)); err != nil {
			return 0, err
		}
	}
	_, err = s.result()
	return time.Since(began).Seconds(), err
}

// latency: from NOTIFY to the handler, at 1,000 a second.
func (b *bench) latency() error {
	const perSecond, seconds, rounds = 1000, 20, 3
	quantiles := map[string][3][]float64{}
	for range rounds {
		for _, who := range []string{"lib/pq", "ours"} {
			s, err := b.startSide(benchside.Task{Side: who, Channels: []string{"bench"}, N: perSecond * seconds})
			if err != nil {
				return err
			}
			began := time.Now()
			for i := range perSecond * seconds {
				time.Sleep(time.Until(began.Add(time.Duration(i) * time.Second / perSecond)))
				if err := b.exec(fmt.Sprintf("notify bench, 't%d'", time.Now().UnixNano())); err != nil {
					s.end()
					return err
				}
			}
			r, err := s.result()
			s.end()
			if err != nil {
				return err
			}
			q := quantiles[who]
			for i, v := range []float64{r.P50, r.P99, r.P999} {
				q[i] = append(q[i], v)
			}
			quantiles[who] = q
		}
	}
	for i, name := range []string{"p50", "p99", "p99.9"} {
		ours, peer := median(quantiles["ours"][i]), median(quantiles["lib/pq"][i])
		target := "<= 1.1"
		if i == 2 {
			target = "" // a thousandth of the samples: noise
		}
		b.line("NOTIFY to handler at 1,000/s, "+name+", against lib/pq", ms(ours), ms(peer), fmt.Sprintf("%.2f", ours/peer), target, ours/peer <= 1.1)
	}
	return nil
}

// fill makes the outbox anew with n rows that are due, on channel bench.
func (b *bench) fill(n int, swept ...string) error {
	schema, err := exec.Command(b.program, append([]string{"-outbox-schema"}, swept...)...).Output()
	if err != nil {
		return err
	}
	return errors.Join(
		b.exec("drop table if exists outbox"),
		b.exec(string(schema)),
		b.exec("insert into outbox (channel, payload) select 'bench', '{\"id\": ' || i || '}' from generate_series(1, $1) i", n),
		b.exec("vacuum analyze outbox"),
		b.exec("checkpoint"),
	)
}

// outbox: jobs that do nothing, against River with as many workers.
func (b *bench) outbox() error {
	for _, sync := range []string{"on", "off"} {
		if err := errors.Join(b.exec("alter system set synchronous_commit = "+sync), b.exec("select pg_reload_conf()")); err != nil {
			return err
		}
		for _, workers := range []int{1, 10, 100} {
			jobs := 50_000
			rates := map[string][]float64{}
			for range 3 {
				if err := b.fill(jobs); err != nil {
					return err
				}
				r, err := b.drain(benchside.Task{Side: "ours", Channels: []string{"bench"}, N: jobs, Workers: workers}, "select count(*) from outbox")
				if err != nil {
					return err
				}
				rates["ours"] = append(rates["ours"], float64(jobs)/r)
				// A single worker of River's is slow enough for a tenth of the rows to tell.
				peerJobs := jobs
				if workers == 1 {
					peerJobs = jobs / 10
				}
				if err := fillRiver(context.Background(), b.pool, peerJobs); err != nil {
					return err
				}
				if r, err = b.drain(benchside.Task{Side: "river", N: peerJobs, Workers: workers}, "select count(*) from river_job where state <> 'completed'"); err != nil {
					return err
				}
				rates["river"] = append(rates["river"], float64(peerJobs)/r)
			}
			b.compare(fmt.Sprintf("outbox jobs, %d at once, synchronous_commit=%s, against River", workers, sync), rates["ours"], rates["river"], 4)
		}
	}
	return errors.Join(b.exec("alter system reset synchronous_commit"), b.exec("select pg_reload_conf()"))
}

// drain runs a side until all jobs are done, and until that is written too, which is when
// left counts none. It returns the seconds since the side began.
func (b *bench) drain(t benchside.Task, left string) (float64, error) {
	s, err := b.startSide(t)
	if err != nil {
		return 0, err
	}
	defer s.end()
	began := time.Now()
	if _, err = s.result(); err != nil {
		return 0, err
	}
	for {
		var n int
		if err := b.db.QueryRow(left).Scan(&n); err != nil || n == 0 {
			return time.Since(began).Seconds(), err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// claim: the time to claim must not grow with the backlog.
func (b *bench) claim() error {
	took := map[int]float64{}
	for _, n := range []int{10_000, 100_000, 1_000_000} {
		if err := b.fill(n); err != nil {
			return err
		}
		// The first jobs of a backlog; it need not be emptied.
		var rounds []float64
		for range 5 {
			r, err := b.drain(benchside.Task{Side: "ours", Channels: []string{"bench"}, N: 1000, Workers: 10}, "select 0")
			if err != nil {
				return err
			}
			rounds = append(rounds, r)
		}
		took[n] = median(rounds)
	}
	for _, n := range []int{100_000, 1_000_000} {
		ratio := took[n] / took[10_000]
		target := ""
		if n == 1_000_000 {
			target = "<= 1.5"
		}
		b.line(fmt.Sprintf("1,000 jobs with %d rows waiting, against 10,000", n), ms(took[n]), ms(took[10_000]), fmt.Sprintf("%.2f", ratio), target, ratio <= 1.5)
	}
	return nil
}

// sustained: dead rows must not slow a loaded outbox down.
func (b *bench) sustained() error {
	const minutes, perSecond = 2, 10_000
	const total = minutes * 60 * perSecond
	if err := b.fill(0); err != nil {
		return err
	}
	s, err := b.startSide(benchside.Task{Side: "ours", Channels: []string{"bench"}, N: total, Workers: 10})
	if err != nil {
		return err
	}
	began := time.Now()
	const batch = 500
	for i := 0; i < total; i += batch {
		time.Sleep(time.Until(began.Add(time.Duration(i) * time.Second / perSecond)))
		if err := b.exec("insert into outbox (channel, payload) select 'bench', '{}' from generate_series(1, $1::int)", batch); err != nil {
			s.end()
			return err
		}
	}
	inserted := time.Since(began).Seconds()
	r, err := s.result()
	s.end()
	if err != nil {
		return err
	}
	ratio := r.RateLast / r.RateFirst
	b.line(fmt.Sprintf("outbox under load for %.0f s, rate at the end against the beginning", inserted), rate(r.RateLast), rate(r.RateFirst), fmt.Sprintf("%.2f", ratio), ">= 0.9", ratio >= 0.9)
	return nil
}

// replicas: how the outbox scales out when the handler is what takes time.
func (b *bench) replicas() error {
	const jobs, work = 20_000, 5 * time.Millisecond
	var one float64
	for _, n := range []int{1, 2, 4} {
		if err := b.fill(jobs); err != nil {
			return err
		}
		began := time.Now()
		var sides []*side
		for range n {
			s, err := b.startSide(benchside.Task{Side: "ours", Channels: []string{"bench"}, N: jobs + 1, Workers: 10, Work: work})
			if err != nil {
				return err
			}
			sides = append(sides, s)
		}
		for left := 1; left > 0; time.Sleep(20 * time.Millisecond) {
			if err := b.db.QueryRow("select count(*) from outbox").Scan(&left); err != nil {
				return err
			}
		}
		per := jobs / time.Since(began).Seconds()
		for _, s := range sides {
			s.end()
		}
		if n == 1 {
			one = per
		}
		b.line(fmt.Sprintf("outbox jobs of 5 ms, 10 at once, %d replicas against 1", n), rate(per), rate(one), fmt.Sprintf("%.2f", per/one), "", true)
	}
	return nil
}
