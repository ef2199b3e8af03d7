//go:build unix

package pgconn

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
	"github.com/pglistener/pglistener/internal/retry"
)

// unanswered returns an address that answers no dial, as a host behind a firewall does: its queue of connections is full.
func unanswered(t *testing.T) string {
	t.Helper()
	if runtime.GOOS != "linux" {
		testkit.Skip(t, "needs Linux, which drops what finds the queue full")
	}
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
	for range 100 {
		c, err := net.DialTimeout("tcp", address, time.Second)
		if err != nil {
			return address
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the queue does not fill")
	return ""
}

// ends has f return an error within testkit.Patience, and not before a time.
func ends(t *testing.T, what string, atLeast time.Duration, f func() error) {
	t.Helper()
	began, done := time.Now(), make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		if took := time.Since(began); err == nil || took < atLeast {
			t.Errorf("%s: %v after %v", what, err, took)
		}
	case <-time.After(testkit.Patience):
		t.Errorf("%s takes longer than %v", what, testkit.Patience)
	}
}

// TestDialsHaveALimit: the kernel gives up only after two minutes.
func TestDialsHaveALimit(t *testing.T) {
	t.Parallel()
	const limit = 300 * time.Millisecond
	address := unanswered(t)
	db, err := OpenDB("postgres://u@"+address+"/d?sslmode=disable", limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() { ends(t, "a statement", limit, db.Ping) })
	for what, dial := range map[string]func() (net.Conn, error){
		"the listener's": func() (net.Conn, error) { return NewDialer(limit, time.Hour, retry.Backoff{}).Dial("tcp", address) },
		"the listener's with connect_timeout": func() (net.Conn, error) {
			return NewDialer(time.Hour, time.Hour, retry.Backoff{}).DialTimeout("tcp", address, limit)
		},
		"the listener's with a longer connect_timeout": func() (net.Conn, error) {
			return NewDialer(limit, time.Hour, retry.Backoff{}).DialTimeout("tcp", address, time.Hour)
		},
		"a statement's with connect_timeout": func() (net.Conn, error) { return sqlDialer{time.Hour}.DialTimeout("tcp", address, limit) },
	} {
		all.Go(func() {
			ends(t, what, limit, func() error { _, err := dial(); return err })
		})
	}
}

// TestWritesHaveALimit: to a peer that never reads.
func TestWritesHaveALimit(t *testing.T) {
	t.Parallel()
	const limit = 300 * time.Millisecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // and with it what it has not accepted
	c, err := sqlDialer{limit}.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ends(t, "a write", limit, func() error {
		_, err := c.Write(make([]byte, 64<<20)) // more than the kernel's buffers hold
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v", err)
		}
		return err
	})
}

// TestPausesBetweenDials: each failure doubles the pause, a subscription ends that, and a connection that breaks is dialled again at
// once unless it is one of several that did not last.
func TestPausesBetweenDials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const first, longest = time.Second, time.Minute
		d := NewDialer(time.Second, time.Second, retry.Backoff{Min: first, Max: longest})
		defer d.Close()
		pause := func(what string, least, most time.Duration) {
			t.Helper()
			if d.delay < least || d.delay > most {
				t.Errorf("%s: a pause of %v, want between %v and %v", what, d.delay, least, most)
			}
		}
		for range 8 {
			d.Failed()
		}
		pause("the eighth failure", longest/2, longest)
		d.Subscribed()
		d.Failed()
		pause("the first failure after a subscription", first/2, first)
		for range 8 {
			d.Subscribed()
			d.Lost()
		}
		pause("the eighth connection that broke early", longest/2, longest)
		d.Subscribed()
		time.Sleep(longest + time.Second)
		d.Lost()
		pause("one that lasted", 0, 0)
		d.Subscribed()
		d.Lost()
		pause("the next that broke early", first/2, first)
	})
}

// TestLastHeardFollowsTheClock: a clock that is set after the start must not leave every later gap with a wrong beginning.
func TestLastHeardFollowsTheClock(t *testing.T) {
	d := NewDialer(time.Second, time.Second, retry.Backoff{Min: time.Second, Max: time.Second})
	defer d.Close()
	d.heard.Store(int64(time.Since(d.epoch)))
	// Only the wall clock of a Time, whose seconds begin at bit 30: at the start it was an hour behind.
	*(*uint64)(unsafe.Pointer(&d.epoch)) -= 3600 << 30
	if wall := time.Since(d.epoch.Round(0)); wall < 59*time.Minute || time.Since(d.epoch) > time.Minute {
		t.Fatalf("the clocks were not set apart: %v, %v", wall, time.Since(d.epoch))
	}
	if ago := time.Since(d.LastHeard().Round(0)).Abs(); ago > time.Minute {
		t.Errorf("it is said to have heard %v ago", ago)
	}
}

// TestListenEndsWithAPong: lib/pq's Listen also returns nil when the connection has broken under it. So all is LISTENed only when
// the server has answered once more, or has failed to; in that case lib/pq makes another connection.
func TestListenEndsWithAPong(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var seen []string // what the server was asked; a blank line begins a connection
	asked := func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(seen)
	}
	add := func(text string) (first bool) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, text)
		return slices.Index(seen[1:], "") < 0
	}
	gate := make(chan struct{})
	defer close(gate)
	address := testkit.FakeServer(t, func(send testkit.Sender) func(string) {
		add("")
		return func(text string) {
			if first := add(strings.TrimSpace(text) + ";"); !strings.HasPrefix(text, "LISTEN") {
				if first {
					<-gate // this connection is dead from here on
				}
				send('I', "")
				return
			}
			send('C', "LISTEN\x00")
		}
	})
	d := NewDialer(300*time.Millisecond, time.Hour, retry.Backoff{Min: time.Millisecond, Max: time.Millisecond})
	defer d.Close()
	l := pq.NewDialListener(d, "postgres://u@"+address+"/d?sslmode=disable", time.Millisecond, time.Millisecond, nil)
	defer l.Close()
	go func() {
		for range l.Notify {
		}
	}()
	d.Listen(l, []string{"a", "b"}, func(err error) {
		if got := asked(); err != nil || len(got) < 4 || got[3] != ";" {
			t.Fatalf("all is LISTENed (%v) when the server was asked %q", err, got)
		}
	})
	testkit.Eventually(t, "no other connection is made", func() bool {
		got := asked()
		return slices.Contains(got[4:], `LISTEN "a";`) && slices.Contains(got[4:], `LISTEN "b";`)
	})
}
