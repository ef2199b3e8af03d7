package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// metricLine is a sample of the Prometheus text format.
var metricLine = regexp.MustCompile(`^([a-z_]+)(\{[a-z_]+="(?:[^"\\\n]|\\.)*"(?:,[a-z_]+="(?:[^"\\\n]|\\.)*")*\})? (-?[0-9.e+-]+|\+Inf)$`)

func TestMetricsUnderLoad(t *testing.T) {
	t.Parallel()
	channel := `odd "name" with \ in it`
	r := start(t, probing(sharedDSN, channel+"=test"), nil).listening(t)
	web := r.web(t)
	ready(t, web)
	const total = 20_000
	done := make(chan error, 1)
	go func() {
		_, err := sharedDB.Exec("select pg_notify($1, i::text) from generate_series(1, $2) i", channel, total)
		done <- err
	}()
	handled := `pglistener_notifications_handled_total{channel="odd \"name\" with \\ in it"} `
	eventually(t, "the count of what was handled does not reach the total", func() bool {
		code, body := web("/metrics")
		if code != http.StatusOK {
			t.Fatalf("/metrics: %d", code)
		}
		typed := map[string]string{}
		for line := range strings.Lines(body) {
			line = strings.TrimSuffix(line, "\n")
			if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
				name, kind, _ := strings.Cut(rest, " ")
				typed[name] = kind
				continue
			}
			if strings.HasPrefix(line, "# HELP ") {
				continue
			}
			m := metricLine.FindStringSubmatch(line)
			if m == nil {
				t.Fatalf("not a sample: %q", line)
			}
			base := m[1]
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				if b := strings.TrimSuffix(base, suffix); typed[b] == "histogram" {
					base = b
				}
			}
			if typed[base] == "" {
				t.Fatalf("no TYPE before %q", line)
			}
		}
		return strings.Contains(body, handled+strconv.Itoa(total)+"\n")
	})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	_, body := web("/metrics")
	for _, want := range []string{
		"pglistener_connected 1", "pglistener_ready 1", "pglistener_gaps_total 0",
		`pglistener_handler_duration_seconds_count{channel="odd \"name\" with \\ in it"} 20000`,
		`pglistener_queue_length{channel="odd \"name\" with \\ in it"} 0`,
	} {
		if !strings.Contains(body, want+"\n") {
			t.Errorf("no line %q", want)
		}
	}

	promtool, err := exec.LookPath("promtool")
	if err != nil {
		if promtool, err = filepath.Abs("bin/promtool"); err == nil {
			_, err = os.Stat(promtool)
		}
	}
	if err != nil {
		skip(t, "promtool is missing: "+err.Error())
	}
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(body)
	if out, err := cmd.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

func TestMetricsCountFaults(t *testing.T) {
	t.Parallel()
	channel := channelName(t)
	dsn, proxy := proxied(t, sharedDSN)
	r := start(t, probing(dsn, channel+"=fail", vars{"HANDLER_ATTEMPTS": "3"}), map[string]newHandler{
		"fail": func(string, env) (Handler, error) {
			return HandlerFunc(func(context.Context, Notification) error { return errors.New("no") }), nil
		},
	}).listening(t)
	web := r.web(t)
	proxy.Reset()
	r.wait(t, "reconnected", 1)
	notify(t, channel, "x")
	r.wait(t, "gave up", 1)
	ready(t, web)
	_, body := web("/metrics")
	for _, want := range []string{
		"pglistener_gaps_total 1", "pglistener_reconnects_total 1",
		fmt.Sprintf("pglistener_notifications_given_up_total{channel=%q} 1", channel),
		fmt.Sprintf("pglistener_handler_failures_total{channel=%q} 3", channel),
		fmt.Sprintf("pglistener_handler_retries_total{channel=%q} 2", channel),
		fmt.Sprintf("pglistener_notifications_handled_total{channel=%q} 0", channel),
	} {
		if !strings.Contains(body, want+"\n") {
			t.Errorf("no line %q", want)
		}
	}
}

func TestHealthIsReadOnly(t *testing.T) {
	t.Parallel()
	r := start(t, fast(sharedDSN, channelName(t)+"=test"), nil).listening(t)
	h, err := serveHealth("127.0.0.1:0", r.listener, testConfig(t, nil).logger(r.logs))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	for method, want := range map[string]int{
		http.MethodGet: http.StatusOK, http.MethodHead: http.StatusOK,
		http.MethodPost: http.StatusMethodNotAllowed, http.MethodDelete: http.StatusMethodNotAllowed,
	} {
		for _, path := range []string{"/livez", "/metrics"} {
			req, err := http.NewRequestWithContext(t.Context(), method, "http://"+h.ln.Addr().String()+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != want {
				t.Errorf("%s %s: %d, want %d", method, path, res.StatusCode, want)
			}
		}
	}
	// A client that never finishes its request is let go.
	c, err := net.Dial("tcp", h.ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET /livez HTTP/1.1\r\n")); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	for buf := make([]byte, 1024); ; {
		if _, err := c.Read(buf); err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				t.Error("a client that says nothing is served for ever")
			}
			break
		}
	}
}

// A loop that does not turn is what /livez and the watchdog are for.
func TestLivezNoticesAStuckLoop(t *testing.T) {
	t.Parallel()
	r := start(t, fast(sharedDSN, channelName(t)+"=test"), nil).listening(t)
	if reason := r.listener.alive(); reason != "" {
		t.Errorf("not alive: %s", reason)
	}
	r.stop() // no loop turns from here on
	s := *r.listener.published.Load()
	s.beat = s.beat.Add(-loopBound)
	r.listener.published.Store(&s)
	if r.listener.alive() == "" || r.listener.deafness() == "" {
		t.Error("a stuck loop is called alive")
	}
}

func TestAddressInUseEndsTheStart(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := runProgram(t, fast(sharedDSN, channelName(t), vars{"HTTP_ADDR": l.Addr().String()}))
	p.exit(t, exitFailed, patience)
	if !strings.Contains(p.String(), "HTTP_ADDR: listen tcp "+l.Addr().String()) {
		t.Errorf("it says: %s", p)
	}
}

func TestNothingListensUnlessAsked(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/net/tcp"); err != nil {
		skip(t, "needs /proc to see sockets")
	}
	p := runProgram(t, fast(sharedDSN, channelName(t)))
	p.wait(t, "listening", 1)
	if n := listeningSockets(t, p.cmd.Process.Pid); n != 0 {
		t.Errorf("%d sockets listen", n)
	}
	q := runProgram(t, fast(sharedDSN, channelName(t), vars{"HTTP_ADDR": "127.0.0.1:0"}))
	addr := q.wait(t, "serving health", 1)["addr"].(string)
	if n := listeningSockets(t, q.cmd.Process.Pid); n != 1 {
		t.Errorf("%d sockets listen, want 1: the test cannot see", n)
	}
	q.wait(t, "delivery proven", 1)
	eventually(t, "never ready", func() bool {
		code, _ := get(t, "http://"+addr+"/readyz")
		return code == http.StatusOK
	})
	ask := func(addr string) (int, string) {
		var out bytes.Buffer
		code := run(t.Context(), []string{"-healthy"}, vars{"HTTP_ADDR": addr}.lookup, &out, &out)
		return code, out.String()
	}
	if code, text := ask(addr); code != exitOK || text != "ok\n" {
		t.Errorf("-healthy: %d %q", code, text)
	}
	_, port, _ := net.SplitHostPort(addr)
	if code, text := ask(":" + port); code != exitOK || text != "ok\n" {
		t.Errorf("-healthy without a host: %d %q", code, text)
	}
	if code, text := ask(freshAddress(t)); code != exitFailed || !strings.HasPrefix(text, "no answer") {
		t.Errorf("-healthy, nobody there: %d %q", code, text)
	}
	if code, text := ask(""); code != exitFailed || !strings.HasPrefix(text, "HTTP_ADDR is not set") {
		t.Errorf("-healthy, nowhere to ask: %d %q", code, text)
	}
}

// listeningSockets counts the TCP sockets of a process that listen.
func listeningSockets(t *testing.T, pid int) int {
	t.Helper()
	listening := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		data, _ := os.ReadFile(table)
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" {
				listening["socket:["+f[9]+"]"] = true
			}
		}
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if target, _ := os.Readlink(filepath.Join(dir, e.Name())); listening[target] {
			n++
		}
	}
	return n
}

func TestSystemd(t *testing.T) {
	t.Parallel()
	for name, path := range map[string]string{
		"path":     filepath.Join(t.TempDir(), "notify"),
		"abstract": "@pglistener-test-" + nonce(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if name == "abstract" {
				if _, err := os.Stat("/proc/net/unix"); err != nil {
					skip(t, "needs abstract sockets")
				}
			}
			sock, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer sock.Close()
			var said []string
			until := func(what string) {
				t.Helper()
				buf := make([]byte, 4096)
				_ = sock.SetReadDeadline(time.Now().Add(patience))
				for {
					n, err := sock.Read(buf)
					if err != nil {
						t.Fatalf("never told %q: %v; told %q", what, err, said)
					}
					for line := range strings.Lines(string(buf[:n])) {
						line = strings.TrimSpace(line)
						said = append(said, line)
						if strings.HasPrefix(line, what) {
							return
						}
					}
				}
			}
			channel := channelName(t)
			dsn, proxy := proxied(t, sharedDSN)
			slow, _ := slowScript(t, "2")
			p := runProgram(t, probing(dsn, channel+"=exec:"+slow, vars{"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "400000"}))
			until("READY=1")
			until("STATUS=listening")
			for range 5 {
				until("WATCHDOG=1")
			}
			proxy.Refuse(true)
			proxy.Reset()
			until("STATUS=not ready: ")
			proxy.Refuse(false)
			until("STATUS=listening")
			// systemd must not be fed by a process that does nothing else.
			p.signal(t, syscall.SIGSTOP)
			said = nil
			_ = sock.SetReadDeadline(time.Now().Add(time.Second))
			for buf := make([]byte, 4096); ; { // what was on its way
				if _, err := sock.Read(buf); err != nil {
					break
				}
			}
			p.signal(t, syscall.SIGCONT)
			until("WATCHDOG=1")
			// Nor must it be killed while a handler finishes.
			notify(t, channel, "x\n")
			p.wait(t, "delivery proven", 2)
			p.signal(t, syscall.SIGTERM)
			until("STOPPING=1")
			for range 5 {
				until("WATCHDOG=1")
			}
			p.exit(t, exitOK, stopBound)
		})
	}
}
