// feature: page outbox schedule execcmd webhook

package main

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// browser is a headless Chromium that is told what to do over its pipe: commands and events of the DevTools protocol, as JSON
// with a zero byte behind each.
type browser struct {
	t       *testing.T
	in      io.Writer
	session string // of the tab
	mu      sync.Mutex
	next    int
	answers map[int]chan browserMessage
	events  []browserMessage
}

type browserMessage struct {
	ID      int             `json:"id,omitempty"`
	Method  string          `json:"method,omitempty"`
	Session string          `json:"sessionId,omitempty"`
	Params  any             `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   json.RawMessage `json:"error,omitempty"`
}

// newBrowser starts one with an empty tab. It ends with the test.
func newBrowser(t *testing.T) *browser {
	t.Helper()
	path := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable"} {
		if found, err := exec.LookPath(name); err == nil && path == "" {
			path = found
		}
	}
	if path == "" {
		testkit.Skip(t, "chromium is missing")
	}
	args := []string{"--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
		"--disable-background-networking", "--disable-component-update", "--disable-extensions", "--user-data-dir=" + t.TempDir(), "about:blank"}
	if os.Getuid() == 0 {
		args = append([]string{"--no-sandbox"}, args...) // it refuses to run as root with one
	}
	cmd := exec.Command(path, args...)
	theirs, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{theirs, theirOut} // 3 and 4
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	theirOut.Close()
	b := &browser{t: t, in: in, answers: map[int]chan browserMessage{}}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for r := bufio.NewReader(out); ; {
			text, err := r.ReadBytes(0)
			if err != nil {
				return
			}
			var m browserMessage
			if json.Unmarshal(text[:len(text)-1], &m) == nil {
				b.take(m)
			}
		}
	}()
	t.Cleanup(func() { // closing the pipe ends it
		in.Close()
		ended := make(chan struct{})
		go func() {
			_ = cmd.Wait()
			close(ended)
		}()
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
		out.Close()
		<-read
	})
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

func (b *browser) take(m browserMessage) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if answer := b.answers[m.ID]; answer != nil {
		answer <- m
		delete(b.answers, m.ID)
		return
	}
	b.events = append(b.events, m)
}

// call runs a command and reads its result.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	b.mu.Lock()
	b.next++
	answer := make(chan browserMessage, 1)
	b.answers[b.next] = answer
	text, err := json.Marshal(browserMessage{ID: b.next, Method: method, Session: b.session, Params: params})
	if err == nil {
		_, err = b.in.Write(append(text, 0))
	}
	b.mu.Unlock()
	if err != nil {
		b.t.Fatal(err)
	}
	select {
	case m := <-answer:
		if m.Error != nil {
			b.t.Fatalf("%s: %s", method, m.Error)
		}
		if result != nil {
			if err := json.Unmarshal(m.Result, result); err != nil {
				b.t.Fatalf("%s: %v in %s", method, err, m.Result)
			}
		}
	case <-time.After(testkit.Patience):
		b.t.Fatalf("%s is not answered", method)
	}
}

// told are the events of a kind so far.
func (b *browser) told(method string) (all []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range b.events {
		if m.Method == method {
			text, _ := json.Marshal(m.Params)
			all = append(all, string(text))
		}
	}
	return all
}

// forget forgets all events.
func (b *browser) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = nil
}

// open loads a page and waits until it is there.
func (b *browser) open(url string) {
	b.t.Helper()
	before := len(b.told("Page.loadEventFired"))
	b.call("Page.navigate", map[string]any{"url": url}, nil)
	testkit.Eventually(b.t, url+" does not load", func() bool { return len(b.told("Page.loadEventFired")) > before })
}

// eval evaluates an expression in the page.
func (b *browser) eval(expression string, value any) {
	b.t.Helper()
	var res struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &res)
	if res.ExceptionDetails != nil {
		b.t.Fatalf("%s: %s", expression, res.ExceptionDetails)
	}
	if err := json.Unmarshal(res.Result.Value, value); err != nil {
		b.t.Fatalf("%s: %v in %s", expression, err, res.Result.Value)
	}
}

// screenshot writes the whole page to a file.
func (b *browser) screenshot(path string) {
	b.t.Helper()
	var shot struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": true}, &shot)
	png, err := base64.StdEncoding.DecodeString(shot.Data)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o755)
	}
	if err == nil {
		err = os.WriteFile(path, png, 0o644)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// look sets the width of the screen and the colours that the person prefers.
func (b *browser) look(width int, colours string) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": colours}}}, nil)
}

// TestPageInABrowser looks at the status page of the real program with Chromium, on a phone and on a wall, light and dark, when all
// is well and when it is not. The pictures are in bin/, for a person to look at.
func TestPageInABrowser(t *testing.T) {
	extra(t)
	const orders, events, mail, invoices, report = "page_orders", "page_events", "page_mail", "page_invoices", "page_report"
	const long = "page_with_the_longest_name_that_postgresql_takes_which_is_63_by" // and nothing breaks it
	const html = "<b>page</b>"
	tab := outboxTable(t, testkit.DB(t))
	receiver := testkit.NewReceiver(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("Pglistener-Channel") {
		case mail:
			http.Error(w, "<script>document.title='owned'</script> no such mailbox: "+strings.Repeat("x", 200), http.StatusGone)
		case invoices:
			http.Error(w, "the ledger is closed", http.StatusInternalServerError)
		}
	})
	start := func(t *testing.T, fire bool) (*process, string) {
		list := orders + "=log," + report + "=doorbell:exec:/bin/true," + events + "=outbox:" + receiver.URL + "/in"
		if fire {
			list += "," + mail + "=outbox:" + receiver.URL + "/in," + invoices + "=outbox:" + receiver.URL + "/in," + long + "=doorbell:exec:/bin/false," + html + "=log"
		}
		p := runProgram(t, fast(testkit.DSN(t), list, vars{
			"HTTP_ADDR": "127.0.0.1:0", "OUTBOX_TABLE": tab, "LOG_LEVEL": "info", "PROBE_INTERVAL": "2s",
			"PAGE_REPORT_SCHEDULE": "CRON_TZ=Europe/Berlin 0 3 * * *", "PAGE_INVOICES_LATE_AFTER": "1s", "PAGE_INVOICES_HANDLER_TIMEOUT": "200ms",
		}))
		p.Wait(t, "delivery proven", 1)
		return p, "http://" + p.Wait(t, "serving health", 1)["addr"].(string) + "/"
	}
	b := newBrowser(t)
	// sees opens the page in all ways, and compares what a person sees.
	sees := func(t *testing.T, address, name, title string, wants ...string) {
		t.Helper()
		for _, width := range []int{390, 1280} {
			for _, colours := range []string{"light", "dark"} {
				b.look(width, colours)
				b.open(address)
				var got struct {
					Title, Text, Headline   string
					Ground, Contrast        float64
					Width, Titles, Headers  int
					Outside, Small, Foreign []string
				}
				b.eval(testkit.ReadFile(t, "internal/page/testdata/seen.js"), &got)
				where := fmt.Sprintf("%s at %d pixels, %s", name, width, colours)
				b.screenshot(fmt.Sprintf("bin/page-%s-%d-%s.png", name, width, colours))
				if !strings.HasPrefix(got.Title, title) || got.Headline != wants[0] {
					t.Errorf("%s: the title is %q, the headline %q", where, got.Title, got.Headline)
				}
				for _, want := range wants {
					if !strings.Contains(got.Text, want) {
						t.Errorf("%s: nobody can see %q in:\n%s", where, want, got.Text)
					}
				}
				if strings.Contains(got.Text, "hunter2") {
					t.Errorf("%s: there is a payload", where)
				}
				if got.Width > width || len(got.Outside) > 0 {
					t.Errorf("%s: it is %d pixels wide, and this is not where it should be: %q", where, got.Width, got.Outside)
				}
				if got.Titles != 1 || got.Headers == 0 || len(got.Small) > 0 || len(got.Foreign) > 0 {
					t.Errorf("%s: %d h1, %d headers of columns and rows, too small: %q, elements that do not belong: %q", where, got.Titles, got.Headers, got.Small, got.Foreign)
				}
				if got.Contrast < 4.5 {
					t.Errorf("%s: a contrast of %.1f", where, got.Contrast)
				}
				if dark := got.Ground < 0.5; dark != (colours == "dark") {
					t.Errorf("%s: the ground has a lightness of %.2f", where, got.Ground)
				}
			}
		}
		for _, kind := range []string{"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed"} {
			if all := b.told(kind); len(all) > 0 {
				t.Errorf("%s: %s", kind, all)
			}
		}
		for _, asked := range b.told("Network.requestWillBeSent") {
			var request struct{ Request struct{ URL string } }
			if err := json.Unmarshal([]byte(asked), &request); err != nil {
				t.Fatal(err)
			}
			if url := request.Request.URL; url != address && url != "about:blank" && !strings.HasPrefix(url, "data:") {
				t.Errorf("it asks for %s", url)
			}
		}
		b.forget()
	}
	works := func(t *testing.T, p *process) {
		for i := range 40 {
			testkit.Send(t, orders, fmt.Sprint("hunter2 ", i))
			insert(t, testkit.DB(t), tab, events, "hunter2")
		}
		testkit.Eventually(t, "the orders are not handled", func() bool { return len(p.All("notification")) == 40 })
	}

	t.Run("calm", func(t *testing.T) {
		p, address := start(t, false)
		works(t, p)
		waits := &statusPage{address: strings.TrimSuffix(address, "/"), agreed: map[bool]int{}}
		waits.says(t, "outbox "+receiver.URL+" at most 40 done a minute", "at most 40 done a minute 40 40 0 0")
		sees(t, address, "calm", "✓ hears, work is done", "It hears, and the work is done.", "Since ", "UTC", "nothing was missed",
			orders, "plain log", "at most 40 done a minute", "✓ done", "doorbell exec:/bin/true", "CRON_TZ=Europe/Berlin 0 3 * * *", "(in ")
		// It loads itself again, and whoever has scrolled stays there.
		b.look(390, "light")
		b.open(address)
		var y float64
		b.eval("scrollTo(0, 300), scrollY", &y)
		loaded := len(b.told("Page.loadEventFired"))
		testkit.Eventually(t, "it does not load itself again", func() bool { return len(b.told("Page.loadEventFired")) > loaded })
		if b.eval("scrollY", &y); y != 300 {
			t.Errorf("it has scrolled to %v", y)
		}
		b.open("about:blank") // or it would look for a program that has ended
		b.forget()
	})
	t.Run("fire", func(t *testing.T) {
		p, address := start(t, true)
		works(t, p)
		for range 3 {
			insert(t, testkit.DB(t), tab, mail, "hunter2")
			insert(t, testkit.DB(t), tab, invoices, "hunter2")
		}
		testkit.Send(t, long, "")
		_, port, _ := net.SplitHostPort(p.Wait(t, "listening", 1)["local"].(string))
		testkit.Exec(t, testkit.DB(t), "select pg_terminate_backend(pid) from pg_stat_activity where client_port = $1", port)
		p.Wait(t, "gave up; the row", 3)
		waits := &statusPage{address: strings.TrimSuffix(address, "/"), agreed: map[bool]int{}}
		waits.says(t, "Gaps in the last 24 hours 1", "3 rows of the outbox have failed", "The last call of "+long+" failed.", "It hears, but the work of "+invoices+" is not done.")
		sees(t, address, "fire", "✗ work is not done", "It hears, but the work of "+invoices+" is not done.", invoices+": what is wrong", "no row has succeeded for", "What to do",
			"status 500: \"the ledger is closed\"", "<script>document.title='owned'</script> no such mailbox", html, "pglistener -outbox-retry ",
			"terminating connection due to administrator command (57P01)", "3 rows of the outbox have failed and wait for a person.")
	})
}
