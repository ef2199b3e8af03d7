// feature: page outbox schedule execcmd webhook

package main

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
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
	changed chan struct{}
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
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
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
	b := &browser{t: t, in: in, answers: map[int]chan browserMessage{}, changed: make(chan struct{})}
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
	close(b.changed)
	b.changed = make(chan struct{})
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
	sees := func(t *testing.T, address, title string, b *browser, name string, wants ...string) {
		for _, width := range []int{390, 1280} {
			for _, colours := range []string{"light", "dark"} {
				b.look(width, colours)
				b.open(address)
				var got struct {
					Title, Text, Ground  string
					Width, Headings, Wrong int
				}
				b.eval(pageFacts, &got)
				where := fmt.Sprintf("%s, %d pixels, %s", name, width, colours)
				b.screenshot(fmt.Sprintf("bin/page-%s-%d-%s.png", name, width, colours))
				if !strings.HasPrefix(got.Title, title) {
					t.Errorf("%s: the title is %q", where, got.Title)
				}
				for _, want := range wants {
					if !strings.Contains(got.Text, want) {
						t.Errorf("%s: nobody can see %q in:\n%s", where, want, got.Text)
					}
				}
				if got.Width > width {
					t.Errorf("%s: it is %d pixels wide", where, got.Width)
				}
			}
		}
	}
	b := newBrowser(t)
	t.Run("calm", func(t *testing.T) {
		p, address := start(t, false)
		for i := range 40 {
			testkit.Send(t, orders, fmt.Sprint("payload", i))
			insert(t, testkit.DB(t), tab, events, "x")
		}
		testkit.Eventually(t, "the work is not done", func() bool { return len(receiver.Requests()) >= 40 && len(p.All("notification")) >= 40 })
		sees(t, address, "✓ ", b, "calm", "It hears, and the work is done.")
		b.look(390, "light")
		b.open(address)
		var y float64
		b.eval("scrollTo(0, 300), scrollY", &y)
		t.Log("before", y)
		n := len(b.told("Page.loadEventFired"))
		testkit.Eventually(t, "no refresh", func() bool { return len(b.told("Page.loadEventFired")) > n })
		time.Sleep(300*time.Millisecond)
		b.eval("scrollY", &y)
		t.Log("after", y, b.told("Page.frameRequestedNavigation"), b.told("Page.frameScheduledNavigation"))
	})
	t.Run("fire", func(t *testing.T) {
		p, address := start(t, true)
		for i := range 40 {
			testkit.Send(t, orders, fmt.Sprint("payload", i))
			testkit.Send(t, html, fmt.Sprint("payload", i))
			insert(t, testkit.DB(t), tab, events, "x")
		}
		for range 3 {
			insert(t, testkit.DB(t), tab, mail, "x")
			insert(t, testkit.DB(t), tab, invoices, "x")
		}
		endSession(t, p)
		p.Wait(t, "gave up; the row", 3)
		testkit.Eventually(t, "still ready", func() bool { code, _ := get(t, address+"readyz"); return code == http.StatusServiceUnavailable })
		sees(t, address, "✗ work is not done", b, "fire", "It hears, but the work of "+invoices+" is not done.")
	})
}

const pageFacts = `({
	Title: document.title, Text: document.body.innerText, Width: document.documentElement.scrollWidth, Headings: document.querySelectorAll('h1').length,
})`
