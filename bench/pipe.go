// feature: execcmd pipe

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// pipe: the Python program of docs/handlers.md, kept by pipe: with 100 in flight, against the same program started by exec: for each
// row. What the rows hold is a line for it, so that it does the same work for both.
func (b *bench) pipe() error {
	text, err := os.ReadFile("docs/handlers.md")
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(text), "```python\n")
	program, _, found := strings.Cut(rest, "```")
	python, err := exec.Command("python3", "-c", "import sys; print(sys.executable)").Output() // not what only looks for it
	if err != nil || !found {
		return fmt.Errorf("python3, and the program of docs/handlers.md, are needed: %w", err)
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	worker, journal := filepath.Join(dir, "worker.py"), filepath.Join(dir, "journal")
	if err := os.WriteFile(worker, []byte(program), 0o755); err != nil {
		return err
	}
	command := strings.TrimSpace(string(python)) + " " + worker + " " + journal
	work := strings.Repeat("x", 80)
	row := fmt.Sprintf(`{"id": "%%s", "payload": "%s"}`, work)
	rates := map[string][]float64{}
	for range 3 {
		for _, c := range []struct {
			handler    string
			jobs, line int // as long as the program's line for a row is
		}{{"pipe", 100_000, len(fmt.Sprintf(row, "12345678")) + 1}, {"exec", 200, len(work) + 1}} {
			if err := errors.Join(b.fill(0), b.exec("insert into outbox (channel, payload) select 'bench', format($1, lpad(i::text, 8, '0')) from generate_series(1, $2) i", row, c.jobs),
				b.exec("vacuum analyze outbox"), b.exec("checkpoint")); err != nil {
				return err
			}
			seconds, err := b.drainBy("outbox:"+c.handler+":"+command, journal, int64(c.jobs*c.line))
			if err != nil {
				return err
			}
			rates[c.handler] = append(rates[c.handler], float64(c.jobs)/seconds)
		}
	}
	ours, peer := median(rates["pipe"]), median(rates["exec"])
	b.line("outbox to pipe (Python), CONCURRENCY 100", rate(ours), "", "", ">= 20000/s", ours >= 20_000)
	b.line("outbox to pipe (Python), against exec of the same program", rate(ours), rate(peer), fmt.Sprintf("%.0f", ours/peer), ">= 100", ours/peer >= 100)
	return nil
}

// drainBy runs the program with a handler until the journal is as long as it will be and no row is left. It returns the seconds since
// the start.
func (b *bench) drainBy(handler, journal string, size int64) (float64, error) {
	if err := os.WriteFile(journal, nil, 0o600); err != nil {
		return 0, err
	}
	var log bytes.Buffer
	cmd := exec.Command(b.program)
	cmd.Env = append(os.Environ(), "DATABASE_URL="+b.server.DSN(), "CHANNELS=bench", "BENCH_HANDLER="+handler, "CONCURRENCY=100", "LOG_LEVEL=warn")
	cmd.Stderr = &log
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}()
	for left := 1; left > 0; {
		time.Sleep(10 * time.Millisecond)
		file, err := os.Stat(journal)
		if err == nil && file.Size() >= size {
			err = b.db.QueryRow("select count(*) from outbox").Scan(&left)
		}
		if err != nil {
			return 0, err
		}
		if time.Since(began) > 5*time.Minute {
			return 0, fmt.Errorf("%d of %d bytes after %v: %.2000s", file.Size(), size, time.Since(began), log.String())
		}
	}
	return time.Since(began).Seconds(), nil
}
