//go:build unix

// Demo shows the listener recover from faults, on a throwaway server. "make demo"
// builds the listener and runs this; it goes on until Ctrl-C, or for DEMO_SECONDS.
// It exits with 0 only if every notification that should have come through did.
package main

import (
	"bufio"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	_ "github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/pgtest"
)

const (
	interval = time.Second     // PING_INTERVAL
	timeout  = time.Second     // PING_TIMEOUT
	patience = 5 * time.Second // what must come comes within this
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "drain" {
		exit(drain())
	}
	if len(os.Args) == 2 && os.Args[1] == "report" {
		fmt.Println("the report of", cmp.Or(os.Getenv("PGLISTENER_RUN_AT"), "now"))
		exit(nil)
	}
	if len(os.Args) != 2 {
		exit(errors.New("usage: demo PATH-OF-PGLISTENER"))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if s := os.Getenv("DEMO_SECONDS"); s != "" {
		seconds, err := strconv.Atoi(s)
		if err != nil || seconds < 1 {
			exit(fmt.Errorf("DEMO_SECONDS: %q is not a number of seconds", s))
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(seconds)*time.Second)
		defer cancel()
	}
	exit(demo(ctx, os.Args[1]))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// drain is what the doorbell channel runs: it takes every job out of the table.
// A program like this is what a team used to start from cron.
func drain() error {
	db, err := sql.Open("postgres", os.Getenv("JOBS_URL"))
	if err != nil {
		return err
	}
	defer db.Close()
	rows, err := db.Query("delete from jobs returning what")
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var what string
		if err := rows.Scan(&what); err != nil {
			return err
		}
		fmt.Println("did", what)
	}
	return rows.Err()
}

// say prints a line of the demo's own.
func say(format string, args ...any) { fmt.Printf("\n>> "+format+"\n", args...) }

// screen shows the listener's log and lets the demo wait for a piece of it.
type screen struct {
	mu      sync.Mutex
	text    strings.Builder
	changed chan struct{}
}

func (s *screen) copy(r io.Reader) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		// The time is on the wall, and the rest is what matters.
		if _, rest, ok := strings.Cut(line, " level="); ok {
			fmt.Println("   level=" + rest)
		} else {
			fmt.Println("   " + line)
		}
		s.mu.Lock()
		s.text.WriteString(line + "\n")
		close(s.changed)
		s.changed = make(chan struct{})
		s.mu.Unlock()
	}
}

// wait waits until the log holds piece more than n times.
func (s *screen) wait(piece string, n int) error {
	deadline := time.After(patience)
	for {
		s.mu.Lock()
		count, changed := strings.Count(s.text.String(), piece), s.changed
		s.mu.Unlock()
		if count > n {
			return nil
		}
		select {
		case <-changed:
		case <-deadline:
			return fmt.Errorf("the listener did not say %q within %v", piece, patience)
		}
	}
}

func (s *screen) count(piece string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.text.String(), piece)
}

// stage is everything that the demo plays with.
type stage struct {
	db     *sql.DB
	proxy  *pgtest.Proxy
	screen *screen
	sent   int // orders
	jobs   int
}

// demo runs the listener and plays the scenes until ctx ends. Every scene checks what it shows.
func demo(ctx context.Context, program string) (err error) {
	say("starting a throwaway PostgreSQL server, and a proxy before it that can fail")
	server, err := pgtest.Start()
	if err != nil {
		return err
	}
	defer server.Close()
	proxy, err := pgtest.NewProxy(server.Addr())
	if err != nil {
		return err
	}
	defer proxy.Close()
	db, err := sql.Open("postgres", server.DSN())
	if err != nil {
		return err
	}
	defer db.Close()
	if _, err := db.Exec("create table jobs (what text)"); err != nil {
		return err
	}

	self, err := os.Executable()
	if err != nil {
		return err
	}
	say("CHANNELS=orders,jobs=doorbell:exec:drain,report=doorbell:exec:report pglistener   (PING_INTERVAL=%v PING_TIMEOUT=%v)", interval, timeout)
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(),
		"DATABASE_URL="+pgtest.DSN(proxy.Addr()),
		"JOBS_URL="+server.DSN(),
		"CHANNELS=orders,jobs=doorbell:exec:"+self+" drain,report=doorbell:exec:"+self+" report",
		"REPORT_SCHEDULE=@every 2s", // feature: schedule
		"PING_INTERVAL="+interval.String(),
		"PING_TIMEOUT="+timeout.String(),
		"LOG_FORMAT=text", "LOG_LEVEL=info",
	)
	// A group of its own, so that Ctrl-C reaches the demo first.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s := &stage{db: db, proxy: proxy, screen: &screen{changed: make(chan struct{})}}
	copied := make(chan struct{})
	go func() {
		s.screen.copy(stderr)
		close(copied)
	}()
	defer func() {
		say("SIGTERM: the listener finishes what it has received, and stops")
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-copied
		if e := cmd.Wait(); e != nil && err == nil {
			err = fmt.Errorf("the listener ended with: %w", e)
		}
		if err == nil {
			say("all %d notifications came through, and all %d jobs were done", s.sent, s.jobs)
		}
	}()

	if err := s.screen.wait("msg=listening", 0); err != nil {
		return err
	}
	for round := 1; ; round++ {
		for _, scene := range []func(context.Context) error{
			s.normal,
			s.scheduled, // feature: schedule
			s.killed, s.silenced,
		} {
			if err := scene(ctx); err != nil {
				return err
			}
			if ctx.Err() != nil {
				return nil
			}
		}
		say("that was round %d; Ctrl-C ends the demo", round)
		pause(ctx, time.Second)
	}
}

func (s *stage) normal(ctx context.Context) error {
	say("NOTIFY orders, three times; each payload goes to the handler of its channel")
	for range 3 {
		if err := s.order(); err != nil {
			return err
		}
		pause(ctx, 300*time.Millisecond)
	}
	say("insert into jobs, and NOTIFY jobs: the doorbell's program runs and drains the table")
	return s.job(true)
}

// begin: schedule
func (s *stage) scheduled(context.Context) error {
	say("no cron: REPORT_SCHEDULE='@every 2s' runs a program by itself; '0 3 * * *' would be at three in the morning")
	return s.screen.wait("line=\"the report of 2", s.screen.count("line=\"the report of 2"))
}

// end: schedule

func (s *stage) killed(context.Context) error {
	say("pg_terminate_backend: the listener's session is killed; it is back at once")
	again := s.screen.count("msg=\"reconnected;")
	_, err := s.db.Exec("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pglistener'")
	if err != nil {
		return err
	}
	if err := s.screen.wait("msg=\"reconnected;", again); err != nil {
		return err
	}
	return s.order()
}

func (s *stage) silenced(ctx context.Context) error {
	say("now the connection falls silent, as behind a NAT that forgot it: no error, nothing; others would be deaf from here on")
	again := s.screen.count("msg=\"reconnected;")
	s.proxy.Silence()
	pause(ctx, interval/2) // whatever the doorbell still had to do before is done by then
	say("meanwhile a job is inserted; its NOTIFY is lost, as PostgreSQL keeps nothing for a listener that is away")
	if err := s.job(false); err != nil {
		return err
	}
	say("after PING_INTERVAL without a byte the server is pinged; after PING_TIMEOUT without an answer the connection is given up")
	if err := s.screen.wait("msg=\"reconnected;", again); err != nil {
		return err
	}
	say("heard again; and the doorbell has run after the gap, so the job is done")
	if err := s.jobDone(); err != nil {
		return err
	}
	return s.order()
}

// order sends one notification and waits until it was handled.
func (s *stage) order() error {
	s.sent++
	payload := fmt.Sprintf("order-%d", s.sent)
	if _, err := s.db.Exec("select pg_notify('orders', $1)", payload); err != nil {
		return err
	}
	return s.screen.wait("channel=orders payload="+payload+" ", 0)
}

// job inserts a job and rings; with wait it waits until the job was done.
func (s *stage) job(wait bool) error {
	s.jobs++
	_, err := s.db.Exec(fmt.Sprintf("insert into jobs values ('job-%d'); notify jobs", s.jobs))
	if err != nil || !wait {
		return err
	}
	return s.jobDone()
}

func (s *stage) jobDone() error {
	return s.screen.wait(fmt.Sprintf("line=\"did job-%d\"", s.jobs), 0)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
