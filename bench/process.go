package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pglistener/pglistener/internal/benchside"
	"github.com/pglistener/pglistener/internal/pgtest"
)

// The rows about the program itself, with its default settings.

// listener is the program, running.
type listener struct {
	cmd   *exec.Cmd
	began time.Time

	mu      sync.Mutex
	seen    map[string]time.Time // when a message, or a payload, was logged last
	changed chan struct{}
}

func (b *bench) launch(dsn, channels string, more ...string) (*listener, error) {
	l := &listener{cmd: exec.Command(b.program), seen: map[string]time.Time{}, changed: make(chan struct{})}
	l.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "DATABASE_URL=" + dsn, "CHANNELS=" + channels, "LOG_FORMAT=json"}, more...)
	stderr, err := l.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	l.began = time.Now()
	if err := l.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		lines := bufio.NewScanner(stderr)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			now := time.Now()
			var line struct{ Msg, Payload string }
			if json.Unmarshal(lines.Bytes(), &line) != nil {
				continue
			}
			l.mu.Lock()
			l.seen[line.Msg] = now
			if line.Payload != "" {
				l.seen["payload "+line.Payload] = now
			}
			close(l.changed)
			l.changed = make(chan struct{})
			l.mu.Unlock()
		}
	}()
	return l, nil
}

// wait waits until something has been logged, and returns when.
func (l *listener) wait(what string, patience time.Duration) (time.Time, error) {
	deadline := time.After(patience)
	for {
		l.mu.Lock()
		at, ok := l.seen[what]
		changed := l.changed
		l.mu.Unlock()
		if ok {
			return at, nil
		}
		select {
		case <-changed:
		case <-deadline:
			return at, fmt.Errorf("never logged %q", what)
		}
	}
}

func (l *listener) end() {
	_ = l.cmd.Process.Signal(syscall.SIGTERM)
	_ = l.cmd.Wait()
}

// rss is the resident memory of a process in MB, now or at its highest.
func rss(pid int, highest bool) (float64, error) {
	field := "VmRSS:"
	if highest {
		field = "VmHWM:"
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == field {
			kb, err := strconv.ParseFloat(f[1], 64)
			return kb / 1024, err
		}
	}
	return 0, errors.New("no " + field)
}

// cpu is the processor time of a process in seconds.
func cpu(pid int) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(data), ") ")
	f := strings.Fields(after)
	user, err1 := strconv.ParseFloat(f[11], 64)
	system, err2 := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100, errors.Join(err1, err2) // in ticks of 10 ms
}

func mb(v float64) string { return fmt.Sprintf("%.1f MB", v) }

func (b *bench) size() error {
	info, err := os.Stat(b.program)
	if err != nil {
		return err
	}
	size := float64(info.Size()) / 1e6
	b.line("size of the stripped binary", mb(size), "", "", "<= 10 MB", size <= 10)
	return nil
}

// start: from exec to listening.
func (b *bench) start() error {
	var took []float64
	for range 11 {
		l, err := b.launch(b.server.DSN(), "bench")
		if err != nil {
			return err
		}
		at, err := l.wait("listening", 10*time.Second)
		l.end()
		if err != nil {
			return err
		}
		took = append(took, at.Sub(l.began).Seconds())
	}
	m := median(took)
	b.line("start to listening", ms(m), "", "", "<= 100 ms", m <= 0.1)
	return nil
}

// deaf: how long until a NOTIFY is heard again after a fault, with default settings.
func (b *bench) deaf() error {
	proxy, err := pgtest.NewProxy(b.server.Addr())
	if err != nil {
		return err
	}
	defer proxy.Close()
	const interval, timeout, reconnectMax = 10.0, 5.0, 2.0
	for _, c := range []struct {
		name  string
		bound float64
		fault func() time.Time // and from when on it could be heard again
	}{
		{"deaf after a kill", 0.25, func() time.Time {
			now := time.Now()
			_ = b.exec("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pglistener'")
			return now
		}},
		{"deaf after the connection fell silent", interval + timeout + 0.25, func() time.Time {
			proxy.Silence()
			return time.Now()
		}},
		{"deaf after the end of an outage of 60 s", reconnectMax + 0.25, func() time.Time {
			proxy.Refuse(true)
			proxy.Reset()
			time.Sleep(time.Minute)
			proxy.Refuse(false)
			return time.Now()
		}},
	} {
		l, err := b.launch(pgtest.DSN(proxy.Addr()), "bench")
		if err != nil {
			return err
		}
		if _, err := l.wait("delivery proven", 10*time.Second); err != nil {
			l.end()
			return err
		}
		time.Sleep(3 * time.Second) // not a connection that breaks as soon as it is made
		from := c.fault()
		var heard time.Time
		for i := 0; heard.IsZero(); i++ {
			payload := fmt.Sprintf("again-%d-%d", from.UnixNano(), i)
			if err := b.exec("select pg_notify('bench', $1)", payload); err != nil {
				l.end()
				return err
			}
			if at, err := l.wait("payload "+payload, 10*time.Millisecond); err == nil {
				heard = at
			}
			if time.Since(from) > time.Minute {
				l.end()
				return fmt.Errorf("%s: never heard again", c.name)
			}
		}
		l.end()
		took := heard.Sub(from).Seconds()
		b.line(c.name, fmt.Sprintf("%.3f s", took), "", "", fmt.Sprintf("<= %.2f s", c.bound), took <= c.bound)
	}
	return nil
}

// memory: idle, after a million, and with many waiting.
func (b *bench) memory() error {
	l, err := b.launch(b.server.DSN(), "bench", "LOG_LEVEL=error", "HTTP_ADDR=127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.end()
	time.Sleep(2 * time.Second)
	before, err := cpu(l.cmd.Process.Pid)
	if err != nil {
		return err
	}
	time.Sleep(time.Minute)
	after, err := cpu(l.cmd.Process.Pid)
	if err != nil {
		return err
	}
	used := (after - before) / 60 * 100
	b.line("processor time over an idle minute", fmt.Sprintf("%.3f %%", used), "", "", "<= 0.1 %", used <= 0.1)
	resident, err := rss(l.cmd.Process.Pid, false)
	if err != nil {
		return err
	}
	b.line("resident memory, idle", mb(resident), "", "", "<= 16 MB", resident <= 16)
	for sent := 0; sent < 1_000_000; sent += 50_000 {
		if err := b.exec("select pg_notify('bench', lpad(i::text, 30, '0')) from generate_series($1::int, $2::int) i", sent+1, sent+50_000); err != nil {
			return err
		}
	}
	time.Sleep(3 * time.Second)
	if resident, err = rss(l.cmd.Process.Pid, true); err != nil {
		return err
	}
	b.line("resident memory, highest during 1,000,000 notifications", mb(resident), "", "", "", true)

	const n = 100_000
	s, err := b.startSide(benchside.Task{Side: "ours", Channels: []string{"slow"}, N: n, Work: time.Millisecond})
	if err != nil {
		return err
	}
	pid := s.cmd.Process.Pid
	for sent := 0; sent < n; sent += 10_000 {
		if err := b.exec("select pg_notify('slow', lpad(i::text, 1000, '0')) from generate_series($1::int, $2::int) i", sent+1, sent+10_000); err != nil {
			s.end()
			return err
		}
	}
	var highest float64
	done := make(chan error, 1)
	go func() {
		_, err := s.result()
		s.end()
		done <- err
	}()
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				return err
			}
			running = false
		case <-time.After(100 * time.Millisecond):
			if v, err := rss(pid, true); err == nil {
				highest = v
			}
		}
	}
	b.line("resident memory, 100,000 of 1 kB, handler 1 ms, none lost", mb(highest), "", "", "<= 48 MB", highest <= 48)
	return nil
}
