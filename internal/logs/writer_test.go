//go:build unix

package logs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const deadline = 30 * time.Second // for everything that should happen

var formats = []Settings{{Format: "text"}, {Format: "json"}}

// pipe is a log on a real pipe whose writing end blocks, as an inherited stderr does.
type pipe struct {
	s      Settings
	r, w   *os.File
	in     *bufio.Reader
	filler int // bytes that are to be read before the first line
	log    *slog.Logger
	writer *Writer
}

// newPipe opens a log on an empty pipe, or on a full one. At the end of the test it
// checks that the Writer's goroutine ends, although nobody has read.
func newPipe(t testing.TB, s Settings, full bool) *pipe {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &pipe{s: s, r: r, w: w, in: bufio.NewReader(r)}
	raw(t, w, func(fd int) {
		for block := make([]byte, 4096); full; {
			n, err := syscall.Write(fd, block)
			if errors.Is(err, syscall.EAGAIN) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			p.filler += n
		}
		if err := syscall.SetNonblock(fd, false); err != nil {
			t.Fatal(err)
		}
	})
	p.log, p.writer = Open(s, w)
	t.Cleanup(func() {
		r.Close()
		_ = p.writer.Close(0) // the reader is gone
		wait(t, "the end of the writer's goroutine", p.writer.ended)
		w.Close()
	})
	return p
}

func raw(t testing.TB, f *os.File, do func(fd int)) {
	t.Helper()
	c, err := f.SyscallConn()
	if err == nil {
		err = c.Control(func(fd uintptr) { do(int(fd)) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

func wait[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(deadline):
		t.Fatalf("%s: not within %v", what, deadline)
		panic("unreachable")
	}
}

// within fails the test when f blocks.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	wait(t, what, done)
}

// until waits for a condition on the Writer's fields.
func (p *pipe) until(t testing.TB, what string, ok func(w *Writer) bool) {
	t.Helper()
	for end := time.Now().Add(deadline); ; time.Sleep(time.Millisecond) {
		p.writer.mu.Lock()
		is := ok(p.writer)
		p.writer.mu.Unlock()
		if is {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, deadline)
		}
	}
}

// Dropped is how many lines have been dropped so far.
func (w *Writer) Dropped() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dropped
}

func flows(w *Writer) bool { return !w.stuck && w.size == 0 }

// stick logs lines until n more have been dropped, and returns how many were kept.
func (p *pipe) stick(t testing.TB, n uint64) (kept int) {
	t.Helper()
	within(t, "logging to a pipe that nobody reads", func() {
		n += p.writer.Dropped()
		for before := p.writer.Dropped(); before < n; before = p.writer.Dropped() {
			p.log.Info("line", "i", kept)
			if p.writer.Dropped() == before {
				kept++
			}
		}
	})
	return kept
}

// record is a line as parsed from either format.
type record struct {
	text   string
	fields map[string]any
}

func (r record) get(key string) string {
	if r.fields[key] == nil {
		return ""
	}
	return fmt.Sprint(r.fields[key])
}

func parse(t testing.TB, s Settings, text string) record {
	t.Helper()
	r := record{strings.TrimSuffix(text, "\n"), map[string]any{}}
	if s.Format == "json" {
		if err := json.Unmarshal([]byte(text), &r.fields); err != nil {
			t.Fatalf("%v: %q", err, text)
		}
	}
	for rest := r.text; s.Format != "json" && rest != ""; {
		key, value, _ := strings.Cut(rest, "=")
		if q, err := strconv.QuotedPrefix(value); err == nil {
			unquoted, _ := strconv.Unquote(q)
			r.fields[key], rest = unquoted, strings.TrimPrefix(value[len(q):], " ")
		} else {
			r.fields[key], rest, _ = strings.Cut(value, " ")
		}
	}
	if r.text == text || r.get("time") == "" || r.get("level") == "" || r.get("msg") == "" {
		t.Fatalf("not a whole line: %q", text)
	}
	return r
}

// next reads the next line from the pipe.
func (p *pipe) next(t testing.TB) record {
	t.Helper()
	if err := p.r.SetReadDeadline(time.Now().Add(deadline)); err != nil {
		t.Fatal(err)
	}
	n, err := p.in.Discard(p.filler)
	p.filler -= n
	if err != nil {
		t.Fatal(err)
	}
	text, err := p.in.ReadString('\n')
	if err != nil {
		t.Fatalf("%v after %q", err, text)
	}
	return parse(t, p.s, text)
}

// lines reads n lines, which stick has written, and returns their size.
func (p *pipe) lines(t testing.TB, n int) (size int) {
	t.Helper()
	for i := range n {
		r := p.next(t)
		if r.get("i") != strconv.Itoa(i) {
			t.Fatalf("%q, want i=%d", r.text, i)
		}
		size += len(r.text) + 1
	}
	return size
}

// lost returns how many lines the record says were dropped; 0 if it is another record.
func (r record) lost(t testing.TB) uint64 {
	t.Helper()
	if r.get("msg") != "log lines were dropped because stderr was not read" {
		return 0
	}
	n, err := strconv.ParseUint(r.get("dropped"), 10, 64)
	if err != nil || n == 0 || r.get("level") != "WARN" {
		t.Fatalf("bad report: %q", r.text)
	}
	return n
}

// Write returns when the line is in the pipe, not earlier.
func TestSynchronous(t *testing.T) {
	for _, s := range formats {
		p := newPipe(t, s, false)
		raw(t, p.r, func(fd int) { // which does not block: EAGAIN if the line is not there
			buf := make([]byte, 4096)
			for i := range 1000 {
				p.log.Info("line", "i", i)
				n, err := syscall.Read(fd, buf)
				if err != nil {
					t.Fatalf("line %d is not there: %v", i, err)
				}
				if r := parse(t, s, string(buf[:n])); r.get("i") != strconv.Itoa(i) {
					t.Fatalf("%q, want i=%d", r.text, i)
				}
			}
		})
	}
}

// 1,000 lines and an exit at once, in another process: all of them are there.
func TestLastLines(t *testing.T) {
	if os.Getenv("LOGS_TEST_CHILD") != "" {
		log, _ := Open(Settings{Format: "json"}, os.Stderr)
		for i := range 1000 {
			log.Info("line", "i", i)
		}
		os.Exit(0)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestLastLines$")
	cmd.Env = append(os.Environ(), "LOGS_TEST_CHILD=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	n := 0
	for text := range strings.Lines(stderr.String()) {
		if r := parse(t, Settings{Format: "json"}, text); r.get("i") != strconv.Itoa(n) {
			t.Fatalf("%q, want i=%d", r.text, n)
		}
		n++
	}
	if n != 1000 {
		t.Errorf("%d lines of 1000", n)
	}
}

func TestStuck(t *testing.T) {
	for _, s := range formats {
		t.Run(s.Format, func(t *testing.T) {
			p := newPipe(t, s, true)
			// The first line may take 100 ms; if each did, it would be more than an hour.
			const drops = 50_000
			kept := p.stick(t, drops-5)
			// It takes some lines and sticks again: what comes now is still dropped at once.
			n, err := p.in.Discard(2 * os.Getpagesize())
			if err != nil {
				t.Fatal(err)
			}
			p.filler -= n
			p.until(t, "some lines taken", func(w *Writer) bool { return w.size < room*9/10 })
			if n := p.stick(t, 5); n > 0 {
				t.Errorf("%d lines kept between others and the report", n)
			}
			if size := p.lines(t, kept); size < room/2 || size > room {
				t.Errorf("%d bytes were kept, want about %d", size, room)
			}
			if r := p.next(t); r.lost(t) != drops { // although nobody logs any more
				t.Fatalf("%q, want dropped=%d", r.text, drops)
			}
			p.until(t, "flowing again", flows)

			// Again: the pipe fills up first, and the report tells only of what is new.
			kept = p.stick(t, 7)
			if size := p.lines(t, kept); size <= room {
				t.Errorf("%d bytes were kept, want %d and what the pipe holds", size, room)
			}
			if r := p.next(t); r.lost(t) != 7 {
				t.Fatalf("%q, want dropped=7", r.text)
			}
			if n := p.writer.Dropped(); n != drops+7 {
				t.Errorf("Dropped() is %d, want %d", n, drops+7)
			}
			p.until(t, "flowing again", flows)
			p.log.Info("line", "i", 0)
			p.lines(t, 1)
		})
	}
}

// What follows a gap comes after the line that tells of the gap, and the line is
// written although LOG_LEVEL leaves out warnings.
func TestReportStandsInTheGap(t *testing.T) {
	p := newPipe(t, Settings{Level: "error", Format: "json"}, true)
	big := strings.Repeat("x", room/3)
	within(t, "logging to a full pipe", func() {
		for i := range 4 { // the third does not fit, and the fourth must not overtake it
			p.log.Error("line", "i", i, "big", big)
		}
		p.log.Error("small enough, but not before the report")
	})
	var last sync.WaitGroup
	last.Go(func() { _ = p.writer.WriteContext(t.Context(), []byte(`{"time":1,"level":1,"msg":"last"}`+"\n")) })
	defer last.Wait()
	p.until(t, "the last line in the queue", func(w *Writer) bool { return w.queue[len(w.queue)-1].sure })
	var got []string
	for range 4 {
		r := p.next(t)
		got = append(got, r.get("i")+r.get("dropped")+r.get("msg"))
	}
	want := "0line 1line 3log lines were dropped because stderr was not read last"
	if text := strings.Join(got, " "); text != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
}

// Writers that race each other, and a reader that comes late and stays slow.
func TestConcurrent(t *testing.T) {
	const writers, each = 8, 5000
	p := newPipe(t, Settings{Format: "json"}, true)
	late := make(chan struct{})
	var begin sync.Once
	var all sync.WaitGroup
	for by := range writers {
		log := p.log.With("by", by)
		all.Go(func() {
			for i := range each {
				log.Info("line", "i", i)
				if p.writer.Dropped() > writers*each/4 {
					begin.Do(func() { close(late) })
				}
			}
		})
	}
	wait(t, "dropped lines", late)
	done := make(chan struct{})
	go func() {
		all.Wait()
		if err := Write(t.Context(), p.log, "end"); err != nil { // which is never dropped
			t.Error(err)
		}
		close(done)
	}()
	var seen, lost uint64
	var next [writers]int
	for {
		r := p.next(t)
		if r.get("msg") == "end" {
			break
		}
		if n := r.lost(t); n > 0 {
			lost += n
			continue
		}
		seen++
		by, _ := strconv.Atoi(r.get("by"))
		i, _ := strconv.Atoi(r.get("i"))
		if i < next[by] {
			t.Fatalf("%q, want i=%d or more", r.text, next[by])
		}
		next[by] = i + 1
	}
	wait(t, "the writers", done)
	if lost != p.writer.Dropped() || lost == 0 || seen+lost != writers*each {
		t.Errorf("%d lines seen and %d reported dropped of %d, Dropped() is %d", seen, lost, writers*each, p.writer.Dropped())
	}
}

// The work's own lines wait while others are dropped, and none of them is lost.
func TestWriteWaits(t *testing.T) {
	for _, s := range formats {
		t.Run(s.Format, func(t *testing.T) {
			p := newPipe(t, s, true)
			const n = 50
			results := make(chan error, n)
			for i := range n {
				log := p.log.With("by", i)
				go func() { results <- Write(t.Context(), log, "work", "payload", "a\nb") }()
			}
			p.until(t, "all lines waiting", func(w *Writer) bool { return len(w.queue) == n-1 })
			p.stick(t, 1) // the others are not held up by those that wait
			if len(results) > 0 {
				t.Fatalf("Write has returned: %v", <-results)
			}
			by := map[string]bool{}
			for range n {
				r := p.next(t)
				by[r.get("by")] = true
				if r.get("msg") != "work" || r.get("level") != "INFO" || r.get("payload") != "a\nb" {
					t.Errorf("%q", r.text)
				}
			}
			if len(by) != n {
				t.Errorf("%d different lines, want %d", len(by), n)
			}
			for range n {
				if err := wait(t, "Write", results); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// The work's own lines from many goroutines at once: all of them, whole and in order.
func TestConcurrentWrites(t *testing.T) {
	const writers, each = 8, 1000
	p := newPipe(t, Settings{Format: "json"}, false)
	var all sync.WaitGroup
	defer all.Wait()
	for by := range writers {
		log := p.log.With("by", by)
		all.Go(func() {
			for i := range each {
				if err := Write(t.Context(), log, "work", "i", i, "payload", strings.Repeat("x", 100*by)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var next [writers]int
	for range writers * each {
		r := p.next(t)
		by, err := strconv.Atoi(r.get("by"))
		if err != nil || r.get("i") != strconv.Itoa(next[by]) || len(r.get("payload")) != 100*by {
			t.Fatalf("%q, want i=%d", r.text, next[by])
		}
		next[by]++
	}
}

// The handler passes on groups and attributes, and honours the level.
func TestWriteFormats(t *testing.T) {
	p := newPipe(t, Settings{Format: "text"}, false)
	log := p.log.With("a", 1).WithGroup("g").With("b", time.Minute)
	if err := Write(t.Context(), log, "work", "c", 3); err != nil {
		t.Fatal(err)
	}
	log.Info("work", "c", 3)
	for range 2 {
		if r := p.next(t); !strings.HasSuffix(r.text, " level=INFO msg=work a=1 g.b=1m0s g.c=3") {
			t.Errorf("%q", r.text)
		}
	}
	var out bytes.Buffer
	log, w := Open(Settings{Level: "warn"}, &out)
	defer func() { _ = w.Close(deadline) }()
	log.Info("no")
	if err := Write(t.Context(), log, "no"); err != nil || out.Len() > 0 {
		t.Errorf("at level warn: %v, %q", err, out.String())
	}
	if err := Write(t.Context(), New(Settings{}, &out), "plain"); err != nil || !strings.Contains(out.String(), "plain") {
		t.Errorf("a plain logger: %v, %q", err, out.String())
	}
}

// A line that was given up on does not come later.
func TestWriteEndsWithContext(t *testing.T) {
	p := newPipe(t, Settings{Format: "json"}, true)
	within(t, "logging to a full pipe", func() { p.log.Info("first") })
	cause := errors.New("the time is over")
	ctx, cancel := context.WithCancelCause(t.Context())
	result := make(chan error, 1)
	go func() { result <- Write(ctx, p.log, "given up") }()
	p.until(t, "the line in the queue", func(w *Writer) bool { return len(w.queue) == 1 })
	cancel(cause)
	if err := wait(t, "Write", result); !errors.Is(err, cause) {
		t.Errorf("error %v, want the cause of ctx", err)
	}
	if err := Write(ctx, p.log, "too late"); !errors.Is(err, cause) {
		t.Errorf("error %v, want the cause of ctx", err)
	}
	go func() { result <- Write(t.Context(), p.log, "tried again") }()
	for _, msg := range []string{"first", "tried again"} {
		if r := p.next(t); r.get("msg") != msg {
			t.Errorf("%q, want %s", r.text, msg)
		}
	}
	if err := wait(t, "Write", result); err != nil {
		t.Error(err)
	}
	for range 1000 { // now that it flows
		if err := p.writer.WriteContext(ctx, []byte("too late\n")); !errors.Is(err, cause) {
			t.Fatalf("error %v, want the cause of ctx", err)
		}
	}
	p.log.Info("last")
	if r := p.next(t); r.get("msg") != "last" {
		t.Errorf("%q", r.text)
	}
	if n := p.writer.Dropped(); n > 0 {
		t.Errorf("Dropped() is %d", n)
	}
}

// TestLineOutlivesItsContext: a handler logs what it could not finish when its time is over.
func TestLineOutlivesItsContext(t *testing.T) {
	p := newPipe(t, Settings{Format: "json"}, true)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 100 {
		p.log.WarnContext(ctx, fmt.Sprint(i))
		if r := p.next(t); r.get("msg") != fmt.Sprint(i) {
			t.Fatalf("%q, want %d", r.text, i)
		}
	}
}

// Formatting waits for other sure lines that are being formatted, but only until ctx ends.
func TestWriteEndsWhileFormatting(t *testing.T) {
	p := newPipe(t, Settings{}, false)
	f := p.log.Handler().(*handler).formatter
	f.lock <- struct{}{}
	defer func() { <-f.lock }()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	within(t, "Write", func() {
		if err := Write(ctx, p.log, "work"); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	})
}

// Close waits until everything has been written, and how many lines were dropped.
func TestCloseWaits(t *testing.T) {
	p := newPipe(t, Settings{Format: "json"}, true)
	kept := p.stick(t, 3)
	closed := make(chan bool, 1)
	go func() {
		err := p.writer.Close(deadline)
		p.writer.mu.Lock()
		defer p.writer.mu.Unlock()
		closed <- err == nil && p.writer.size == 0 && len(p.writer.queue) == 0 && p.writer.told == p.writer.dropped
	}()
	p.until(t, "Close", func(w *Writer) bool { return w.closed })
	p.lines(t, kept)
	if n := p.next(t).lost(t); n != 3 {
		t.Errorf("%d lines reported", n)
	}
	if !wait(t, "the end of Close", closed) {
		t.Error("Close has returned too early")
	}
}

func TestClose(t *testing.T) {
	p := newPipe(t, Settings{Format: "json"}, true)
	kept := p.stick(t, 1)
	within(t, "Close", func() {
		if p.writer.Close(time.Millisecond) == nil {
			t.Error("Close says that all has been written to a full pipe")
		}
	})
	p.lines(t, kept)
	p.next(t)
	wait(t, "the end of the writer's goroutine", p.writer.ended)
	if err := p.writer.Close(deadline); err != nil {
		t.Error(err)
	}
	within(t, "logging to a closed Writer", func() {
		p.log.Info("dropped")
		if err := Write(t.Context(), p.log, "refused"); !errors.Is(err, os.ErrClosed) {
			t.Errorf("error %v", err)
		}
	})
	if n := p.writer.Dropped(); n != 2 {
		t.Errorf("Dropped() is %d, want 2", n)
	}
}

// A pipe whose reader is gone.
func TestBroken(t *testing.T) {
	p := newPipe(t, Settings{}, false)
	p.r.Close()
	within(t, "logging to a broken pipe", func() {
		for range 1000 {
			p.log.Info("line")
		}
		if err := Write(t.Context(), p.log, "work"); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("error %v, want EPIPE", err)
		}
		if err := p.writer.Close(deadline); err != nil {
			t.Error(err)
		}
	})
	if n := p.writer.Dropped(); n != 1000 {
		t.Errorf("Dropped() is %d, want 1000: all lines but the one that got its error", n)
	}
}

// sick is a disk that has room for what is in room, a number for each write; after
// those it has room for all.
type sick struct {
	room []int
	bytes.Buffer
}

func (s *sick) Write(p []byte) (int, error) {
	if len(s.room) == 0 {
		return s.Buffer.Write(p)
	}
	n := s.room[0]
	s.room = s.room[1:]
	if n >= len(p) {
		return s.Buffer.Write(p)
	}
	s.Buffer.Write(p[:n])
	return n, syscall.ENOSPC
}

// A disk that is full in the middle of a line, then full, and then it has room for a
// line but not for the report.
func TestFullDisk(t *testing.T) {
	out := &sick{room: []int{len("time="), 0, 1000, 0}}
	log, w := Open(Settings{}, out)
	for _, msg := range []string{"one", "two", "three", "four"} {
		log.Info(msg)
	}
	if err := w.Close(deadline); err != nil {
		t.Error(err)
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		if _, after, ok := strings.Cut(strings.TrimSpace(line), "msg="); ok {
			line = after
		}
		got = append(got, strings.TrimSpace(line))
	}
	want := []string{"time=", "three", "four",
		`"log lines were dropped because stderr was not read" dropped=2`}
	if strings.Join(got, "|") != strings.Join(want, "|") || w.Dropped() != 2 {
		t.Errorf("Dropped() is %d, got\n%s", w.Dropped(), out.String())
	}
}

// What a line costs: "direct" is slog on the file itself.
func BenchmarkLine(b *testing.B) {
	for _, to := range []string{"null", "pipe"} {
		b.Run(to+"/direct", func(b *testing.B) {
			log := New(Settings{Format: "json"}, target(b, to))
			for b.Loop() {
				log.Info("notification", "channel", "orders", "payload", "some payload", "backend", 12345)
			}
		})
		for _, how := range []string{"log", "Write"} {
			b.Run(to+"/"+how, func(b *testing.B) {
				log, w := Open(Settings{Format: "json"}, target(b, to))
				defer func() { _ = w.Close(deadline) }()
				for b.Loop() {
					if how == "log" {
						log.Info("notification", "channel", "orders", "payload", "some payload", "backend", 12345)
					} else if err := Write(b.Context(), log, "notification", "channel", "orders", "payload", "some payload", "backend", 12345); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
	b.Run("stuck", func(b *testing.B) {
		p := newPipe(b, Settings{Format: "json"}, true)
		p.stick(b, 1)
		for b.Loop() {
			p.log.Info("notification", "channel", "orders", "payload", "some payload", "backend", 12345)
		}
	})
}

// target opens /dev/null, or a pipe that another process reads.
func target(b *testing.B, to string) *os.File {
	b.Helper()
	if to == "null" {
		f, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { f.Close() })
		return f
	}
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command("cat")
	cmd.Stdin = r
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	r.Close()
	raw(b, w, func(fd int) {
		if err := syscall.SetNonblock(fd, false); err != nil {
			b.Fatal(err)
		}
	})
	b.Cleanup(func() {
		w.Close()
		_ = cmd.Wait()
	})
	return w
}

var _ io.Writer = (*Writer)(nil)
