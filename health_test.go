// feature: health

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/health"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// web serves a Listener's health and returns a function that gets a path.
func (r *running) web(t *testing.T) func(path string) (code int, body string) {
	t.Helper()
	h, err := health.Serve(health.Settings{Addr: "127.0.0.1:0"}, http.NotFoundHandler(), r.listener, cli.Version(), r.Logger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return func(path string) (int, string) {
		t.Helper()
		return get(t, "http://"+h.Addr+path)
	}
}

func get(t *testing.T, address string) (int, string) {
	t.Helper()
	c := http.Client{Timeout: testkit.Patience}
	res, err := c.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// metricLine is a sample of the Prometheus text format.
var metricLine = regexp.MustCompile(`^([a-z_]+)(\{[a-z_]+="(?:[^"\\\n]|\\.)*"(?:,[a-z_]+="(?:[^"\\\n]|\\.)*")*\})? (-?[0-9.e+-]+|\+Inf)$`)

func TestMetricsUnderLoad(t *testing.T) {
	t.Parallel()
	channel := `odd "name" with \ in it`
	r := start(t, probing(testkit.DSN(t), channel+"=test"), nil).listening(t)
	web := r.web(t)
	r.ready(t)
	const total = 20_000
	done := make(chan error, 1)
	go func() {
		_, err := testkit.DB(t).Exec("select pg_notify($1, i::text) from generate_series(1, $2) i", channel, total)
		done <- err
	}()
	handled := `pglistener_items_total{channel="odd \"name\" with \\ in it",result="done"} `
	testkit.Eventually(t, "the count of what was handled does not reach the total", func() bool {
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

	promtool := findPromtool(t)
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(body)
	if out, err := cmd.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

func TestMetricsCountFaults(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	r := start(t, probing(dsn, channel+"=fail", vars{"HANDLER_ATTEMPTS": "3"}), table{
		"fail": func(string, Setup) (notify.Handler, error) {
			return notify.HandlerFunc(func(context.Context, notify.Notification) error { return errors.New("no") }), nil
		},
	}).listening(t)
	web := r.web(t)
	proxy.Reset()
	r.Wait(t, "reconnected", 1)
	testkit.Send(t, channel, "x")
	r.Wait(t, "gave up", 1)
	r.ready(t)
	_, body := web("/metrics")
	for _, want := range []string{
		"pglistener_gaps_total 1", "pglistener_reconnects_total 1",
		fmt.Sprintf("pglistener_items_total{channel=%q,result=\"failed\"} 1", channel),
		fmt.Sprintf("pglistener_handler_failures_total{channel=%q} 3", channel),
		fmt.Sprintf("pglistener_handler_retries_total{channel=%q} 2", channel),
		fmt.Sprintf("pglistener_items_total{channel=%q,result=\"done\"} 0", channel),
	} {
		if !strings.Contains(body, want+"\n") {
			t.Errorf("no line %q", want)
		}
	}
}

func TestHealthIsReadOnly(t *testing.T) {
	t.Parallel()
	r := start(t, fast(testkit.DSN(t), testkit.ChannelName(t)+"=test"), nil).listening(t)
	h, err := health.Serve(health.Settings{Addr: "127.0.0.1:0"}, http.NotFoundHandler(), r.listener, cli.Version(), r.Logger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	if h.WriteTimeout <= 0 {
		t.Error("a client that never reads is served for ever")
	}
	for _, path := range []string{"/livez", "/readyz"} { // of this moment, whatever is in between
		res, err := http.Get("http://" + h.Addr + path)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if got := res.Header.Get("Cache-Control"); got != "no-store" {
			t.Errorf("%s: Cache-Control %q", path, got)
		}
	}
	for method, want := range map[string]int{
		http.MethodGet: http.StatusOK, http.MethodHead: http.StatusOK,
		http.MethodPost: http.StatusMethodNotAllowed, http.MethodDelete: http.StatusMethodNotAllowed,
	} {
		for _, path := range []string{"/livez", "/metrics"} {
			req, err := http.NewRequestWithContext(t.Context(), method, "http://"+h.Addr+path, nil)
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
	c, err := net.Dial("tcp", h.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET /livez HTTP/1.1\r\n")); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(testkit.Patience))
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

func TestAddressInUseEndsTheStart(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := runProgram(t, fast(testkit.DSN(t), testkit.ChannelName(t), vars{"HTTP_ADDR": l.Addr().String()}))
	p.exit(t, cli.Failed, testkit.Patience)
	if !strings.Contains(p.String(), "HTTP_ADDR: listen tcp "+l.Addr().String()) {
		t.Errorf("it says: %s", p)
	}
}

func TestNothingListensUnlessAsked(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/net/tcp"); err != nil {
		testkit.Skip(t, "needs /proc to see sockets")
	}
	p := runProgram(t, fast(testkit.DSN(t), testkit.ChannelName(t)))
	p.Wait(t, "listening", 1)
	if n := listeningSockets(t, p.cmd.Process.Pid); n != 0 {
		t.Errorf("%d sockets listen", n)
	}
	q := runProgram(t, fast(testkit.DSN(t), testkit.ChannelName(t), vars{"HTTP_ADDR": "127.0.0.1:0"}))
	addr := q.Wait(t, "serving health", 1)["addr"].(string)
	if n := listeningSockets(t, q.cmd.Process.Pid); n != 1 {
		t.Errorf("%d sockets listen, want 1: the test cannot see", n)
	}
	q.Wait(t, "delivery proven", 1)
	testkit.Eventually(t, "never ready", func() bool {
		code, _ := get(t, "http://"+addr+"/readyz")
		return code == http.StatusOK
	})
	ask := func(addr string) (int, string) {
		var out bytes.Buffer
		code := run(t.Context(), []string{"-healthy"}, cli.Env{Lookup: vars{"HTTP_ADDR": addr}.lookup, Stdout: &out, Stderr: &out})
		return code, out.String()
	}
	if code, text := ask(addr); code != cli.OK || text != "ok\n" {
		t.Errorf("-healthy: %d %q", code, text)
	}
	if code, text := ask(`"` + addr + `"`); code != cli.OK { // as docker's --env-file has it
		t.Errorf("-healthy, quoted: %d %q", code, text)
	}
	_, port, _ := net.SplitHostPort(addr)
	if code, text := ask(":" + port); code != cli.OK || text != "ok\n" {
		t.Errorf("-healthy without a host: %d %q", code, text)
	}
	if code, text := ask(testkit.FreshAddress(t)); code != cli.Failed || !strings.HasPrefix(text, "no answer") {
		t.Errorf("-healthy, nobody there: %d %q", code, text)
	}
	if code, text := ask(""); code != cli.Failed || !strings.HasPrefix(text, "HTTP_ADDR is not set") {
		t.Errorf("-healthy, nowhere to ask: %d %q", code, text)
	}
}

// TestHealthyGoesThroughNoProxy: HTTP_PROXY is for receivers. Go never sends what is for this machine's own names through it, so the
// machine must have another address.
func TestHealthyGoesThroughNoProxy(t *testing.T) {
	t.Parallel()
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		network, ok := a.(*net.IPNet)
		if !ok || !network.IP.IsGlobalUnicast() {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort(network.IP.String(), "0"))
		if err != nil {
			continue
		}
		server := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
		go func() { _ = server.Serve(l) }()
		defer server.Close()
		cmd := exec.Command(program(t), "-healthy")
		cmd.Env = []string{"HTTP_ADDR=" + l.Addr().String(), "HTTP_PROXY=http://" + testkit.FreshAddress(t)}
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, text)
		}
		return
	}
	testkit.Skip(t, "this machine has no address but loopback")
}

// A health check must end, whatever it asks.
func TestHealthyOfAListenerThatIsSilent(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0") // nobody accepts: the kernel does
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan int, 1)
	var out bytes.Buffer
	go func() {
		ended <- run(t.Context(), []string{"-healthy"}, cli.Env{Lookup: vars{"HTTP_ADDR": l.Addr().String()}.lookup, Stdout: &out, Stderr: &out})
	}()
	select {
	case code := <-ended:
		if code != cli.Failed || !strings.HasPrefix(out.String(), "no answer") {
			t.Errorf("-healthy: %d %q", code, &out)
		}
	case <-time.After(testkit.Patience):
		t.Error("-healthy hangs")
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

// findPromtool returns the path of promtool.
func findPromtool(t *testing.T) string {
	t.Helper()
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		if promtool, err = filepath.Abs("bin/promtool"); err == nil {
			_, err = os.Stat(promtool)
		}
	}
	if err != nil {
		testkit.Skip(t, "promtool is missing: "+err.Error())
	}
	return promtool
}

// TestAlerts has promtool test the alerts, and compares their metrics with those that are served.
func TestAlerts(t *testing.T) {
	t.Parallel()
	if out, err := exec.Command(findPromtool(t), "test", "rules", "deploy/alerts_test.yml").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	served := testkit.ReadFile(t, "docs/metrics.md") // which another test compares with /metrics
	names := regexp.MustCompile(`pglistener_[a-z_]+`).FindAllString(testkit.ReadFile(t, "deploy/alerts.yml"), -1)
	if len(names) < 6 {
		t.Errorf("only %d metrics in the alerts", len(names))
	}
	for _, name := range names {
		if !strings.Contains(served, "`"+name+"`") {
			t.Errorf("an alert is about %s, which nobody serves", name)
		}
	}
}

// An address that cannot be served ends the start, and -check says so.
func TestAddressThatIsNone(t *testing.T) {
	t.Parallel()
	for _, addr := range []string{"8080", "localhost", "host:"} {
		out := problemsOf(t, vars{"DATABASE_URL": "postgres://localhost/x", "CHANNELS": "a", "HTTP_ADDR": addr})
		if !strings.Contains(out, "HTTP_ADDR: ") || !strings.Contains(out, "write :8080") || strings.Count(out, "\n") != 1 {
			t.Errorf("%s: %q", addr, out)
		}
	}
}
