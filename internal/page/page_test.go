package page

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"html"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/health"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
)

// world is a listener as the page sees it, and a test makes it.
type world struct {
	mu           sync.Mutex
	alive, hears error
	works        map[string]error
	figures      map[string]float64 // by channel, a colon and the name; of the listener itself without the channel
	names        []string
	calls        map[string]notify.Histogram
}

func newWorld(names ...string) *world {
	return &world{names: names, works: map[string]error{}, figures: map[string]float64{}, calls: map[string]notify.Histogram{}}
}

func (w *world) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

func (w *world) source() Source {
	locked := func(f func() error) func() error {
		return func() error {
			w.mu.Lock()
			defer w.mu.Unlock()
			return f()
		}
	}
	s := Source{Version: "v1", Alive: locked(func() error { return w.alive }), Hears: locked(func() error { return w.hears }), Stats: w.stats}
	for _, name := range w.names {
		s.Channels = append(s.Channels, Channel{Name: name, Shown: "outbox https://" + name, Works: locked(func() error { return w.works[name] })})
	}
	return s
}

func (w *world) stats() (all []notify.Stat) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, value := range w.figures {
		key, scheduled := strings.CutSuffix(key, " by schedule")
		s := notify.Stat{Name: "pglistener_" + key, Value: value}
		if channel, name, ok := strings.Cut(key, ":"); ok {
			name, label, _ := strings.Cut(name, " ")
			s.Name, s.Labels = "pglistener_"+name, []string{"channel", channel}
			if label != "" {
				s.Labels = append(s.Labels, "label", label)
			}
			if scheduled {
				s.Labels = append(s.Labels, "by", "schedule")
			}
		}
		all = append(all, s)
	}
	for channel, h := range w.calls {
		all = append(all, notify.Stat{Name: "pglistener_handler_duration_seconds", Kind: "histogram", Labels: []string{"channel", channel}, Histogram: h})
	}
	return all
}

// recorded starts a Recorder of w, and returns it with the logger that it watches.
func recorded(t *testing.T, w *world) (*Recorder, *slog.Logger) {
	t.Helper()
	r, log := Watch(slog.New(slog.DiscardHandler))
	t.Cleanup(r.Start(w.source()))
	return r, log
}

// page is the page of r, as it is sent.
func page(t *testing.T, r *Recorder) string {
	t.Helper()
	w := httptest.NewRecorder()
	r.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("%d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// words are what a page says, without markup.
func words(page string) string {
	page = regexp.MustCompile(`(?s)<style>.*?</style>`).ReplaceAllString(page, "")
	page = regexp.MustCompile(`<[^>]*>`).ReplaceAllString(page, " ")
	return strings.Join(strings.Fields(html.UnescapeString(page)), " ")
}

func expect(t *testing.T, text string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if absent, not := strings.CutPrefix(want, "not: "); not && strings.Contains(text, absent) {
			t.Errorf("it says %q: %s", absent, text)
		} else if !not && !strings.Contains(text, want) {
			t.Errorf("it does not say %q: %s", want, text)
		}
	}
}

func TestPageSaysHowThingsAre(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		make  func(w *world, log *slog.Logger)
		state string
		wants []string
	}{
		"calm": {func(*world, *slog.Logger) {}, "calm", []string{"✓ hears, work is done – pglistener on", "It hears, and the work is done.", "✓ yes", "✓ done 2 channels", "not: What is wrong", "not: What needs a look", "not: Gaps in the last 24 hours Ended"}},
		"deaf": {func(w *world, _ *slog.Logger) { w.hears = errors.New("disconnected: EOF") }, "fire",
			[]string{"✗ does not hear", "It does not hear.", "disconnected: EOF", "What to do It keeps trying by itself.", "DATABASE_URL", "✗ no"}},
		"stuck": {func(w *world, _ *slog.Logger) {
			w.alive = errors.New("the loop has been stuck for 12s")
			w.hears = w.alive
		}, "fire",
			[]string{"The listener is stuck.", "stuck for 12s", "Restart it."}},
		"one idle": {func(w *world, _ *slog.Logger) { w.works["orders"] = errors.New("no row has succeeded for 6m0s") }, "fire",
			[]string{"✗ work is not done", "It hears, but the work of orders is not done.", "orders : what is wrong no row has succeeded for 6m0s What to do Mend the cause. The work goes on by itself", "✗ not done 1 of 2 channels", "✓ done"}},
		"two idle": {func(w *world, _ *slog.Logger) { w.works["orders"], w.works["mail"] = errors.New("a"), errors.New("b") }, "fire",
			[]string{"the work of 2 channels is not done.", "orders : what is wrong a", "mail : what is wrong b"}},
		"paused for long": {func(w *world, log *slog.Logger) {
			w.works["orders"], w.figures["orders:channel_paused"] = errors.New("it has been paused for 2m0s"), 1
			log.With("channel", "orders").Warn(call.Paused, "tries", 1, "error", errors.New("connection refused"))
		}, "fire", []string{"Mend the receiver. Nothing is lost", "paused since", "connection refused"}},
		"just paused": {func(w *world, _ *slog.Logger) { w.figures["orders:channel_paused"] = 1 }, "look",
			[]string{"! hears, needs a look", "It hears. Something needs a look.", "orders is paused because its receiver is away", "! paused"}},
		"a call failed": {func(w *world, log *slog.Logger) {
			w.calls["orders"], w.figures["orders:handler_failures_total"] = notify.Histogram{Count: 1, Sum: 20 * time.Millisecond}, 1
			log.With("channel", "orders").Warn("handler failed", "error", errors.New("exit status 3"))
		}, "look", []string{"The last call of orders failed.", "exit status 3", "! failing", "1 call failed", "20 ms"}},
		"only some calls failed": {func(w *world, _ *slog.Logger) {
			w.calls["orders"], w.figures["orders:handler_failures_total"] = notify.Histogram{Count: 2, Sum: 20 * time.Millisecond}, 1
		}, "calm", []string{"1 call failed", "10 ms", "not: failing"}},
		"failed rows": {func(w *world, log *slog.Logger) {
			w.figures["orders:outbox_rows due"], w.figures["orders:outbox_rows failed"], w.figures["orders:outbox_oldest_seconds"] = 1234, 3, 90
			log.With("channel", "orders").Error("gave up; the row stays in the outbox as failed", "id", 4711, "event", "e", "attempts", 110, "error", "status 422")
		}, "look", []string{"3 rows of the outbox have failed and wait for a person.", "4711 orders", "status 422", "pglistener -outbox-retry 4711", "1 234 due", "oldest 1 min 30 s"}},
		"failed rows of another process": {func(w *world, _ *slog.Logger) {
			w.figures["orders:outbox_rows due"], w.figures["orders:outbox_rows failed"] = 0, 1
		}, "look", []string{"1 row of the outbox has failed and waits for a person.", "This process has given up none of them", "not: -outbox-retry"}},
		"rows that were retried": {func(w *world, log *slog.Logger) {
			w.figures["orders:outbox_rows due"], w.figures["orders:outbox_rows failed"] = 0, 0
			log.With("channel", "orders").Error("gave up", "id", 4711, "event", "e", "attempts", 110, "error", "status 422")
		}, "calm", []string{"not: 4711", "none failed"}},
		"rows of one channel that were retried": {func(w *world, log *slog.Logger) {
			w.figures["orders:outbox_rows due"], w.figures["mail:outbox_rows due"], w.figures["mail:outbox_rows failed"] = 0, 0, 2
			log.With("channel", "orders").Error("gave up", "id", 4711, "event", "e", "attempts", 110, "error", "status 422")
			log.With("channel", "mail").Warn("handler failed; the row will be tried again", "id", 4712, "event", "e", "attempt", 1, "error", "status 500")
			log.With("channel", "mail").Error("gave up", "id", 4713, "attempts", 5, "error", "of no row")
		}, "look", []string{"not: -outbox-retry", "2 have failed and wait for a person", "status 422", "of no row"}},
		"rows of two channels, one of which were retried": {func(w *world, log *slog.Logger) {
			w.figures["orders:outbox_rows due"], w.figures["mail:outbox_rows due"], w.figures["mail:outbox_rows failed"] = 0, 0, 2
			log.With("channel", "orders").Error("gave up", "id", 4711, "event", "e", "attempts", 110, "error", "status 422")
			log.With("channel", "mail").Error("gave up", "id", 4714, "event", "e", "attempts", 5, "error", "status 500")
		}, "look", []string{"not: -outbox-retry 4711", "-outbox-retry 4714"}},
		"errors and hints": {func(_ *world, log *slog.Logger) {
			log.With("channel", "orders").Error("outbox cannot be read", "error", "42P01", "hint", "make it")
			log.With("channel", "orders").Warn("queue full", "queue", 1000)
		}, "calm", []string{"42P01: make it", "not: queue full"}},
		"vacuum": {func(w *world, _ *slog.Logger) { w.figures["orders:outbox_vacuum_held_back"] = 1 }, "look", []string{"keeps vacuum from removing dead rows"}},
		"a channel that is silent": {func(_ *world, log *slog.Logger) {
			log.With("channel", "orders").Warn("handler failed", "error", os.ErrDeadlineExceeded)
		}, "calm", []string{"i/o timeout", "not: the connection fell silent"}},
		"a long reason": {func(w *world, _ *slog.Logger) {
			w.hears, w.works["orders"] = errors.New(strings.Repeat("x", 300)), errors.New(strings.Repeat("y", 300))
		}, "fire", []string{strings.Repeat("x", 240) + " ...", strings.Repeat("y", 240) + " ..."}},
		"failed rows of two channels": {func(w *world, _ *slog.Logger) {
			for _, name := range []string{"orders", "mail"} {
				w.figures[name+":outbox_rows due"], w.figures[name+":outbox_rows failed"] = 2, 2
			}
		}, "look", []string{"4 rows of the outbox have failed", "4 due"}},
		"strange rows":       {func(w *world, _ *slog.Logger) { w.figures["orders:outbox_unhandled_rows"] = 7 }, "look", []string{"7 rows of the outbox are due on channels that this listener does not handle"}},
		"a queue that fills": {func(w *world, _ *slog.Logger) { w.figures["notification_queue_usage_ratio"] = 0.3 }, "look", []string{"NOTIFY queue fills"}},
		"dropped":            {func(w *world, _ *slog.Logger) { w.figures["orders:items_total dropped"] = 5 }, "look", []string{"orders has dropped 5 notifications"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld("orders", "mail")
			r, log := recorded(t, w)
			w.set(func() { c.make(w, log) })
			p := page(t, r)
			expect(t, words(p), c.wants...)
			expect(t, p, `<html lang="en" class="`+c.state+`">`)
			w.mu.Lock()
			defer w.mu.Unlock()
			if notReady := w.hears != nil || len(w.works) > 0; notReady != (c.state == "fire") {
				t.Error("the page and /readyz disagree")
			}
		})
	}
}

// Whatever text comes from outside is text on the page.
func TestPageIsInert(t *testing.T) {
	t.Parallel()
	calm := page(t, func() *Recorder { r, _ := recorded(t, newWorld("a")); return r }())
	tags := map[string]bool{"rect": true, "ul": true, "li": true, "code": true} // and those of a calm page
	for _, m := range regexp.MustCompile(`<([a-z0-9!]+)`).FindAllStringSubmatch(calm, -1) {
		tags[m[1]] = true
	}
	for _, evil := range []string{`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onload='alert(1)`, `</style><script>1</script>`, `</title><base href=//evil>`, "`${1}`{{.}}", "\x00\xff<i>", "javascript:alert(1)"} {
		name := strings.ToValidUTF8(strings.ReplaceAll(evil, "\x00", ""), "")
		w := newWorld(name)
		r, log := recorded(t, w)
		of := log.With("channel", name)
		w.set(func() {
			w.hears, w.works[name] = errors.New(evil), errors.New(evil)
			w.figures[name+":outbox_rows failed"], w.figures[name+":outbox_rows due"], w.figures[name+":channel_paused"] = 2, 1, 1
			w.figures[name+":items_total dropped"] = 1
		})
		of.Warn("handler failed", "error", errors.New(evil), "hint", evil)
		of.Error("gave up", "id", evil, "event", evil, "attempts", 1, "error", evil)
		log.Warn("disconnected", "error", errors.New(evil))
		log.Warn("reconnected", "gap_from", time.Now(), "gap_to", time.Now())
		p := page(t, r)
		for _, m := range regexp.MustCompile(`<([a-zA-Z0-9!]+)`).FindAllStringSubmatch(p, -1) {
			if !tags[m[1]] {
				t.Errorf("%q makes an element %s", evil, m[1])
			}
		}
		for _, m := range regexp.MustCompile(`<[a-z][^>]*>`).FindAllString(p, -1) {
			if regexp.MustCompile(`(?i)\son[a-z]+=|\sstyle=|javascript:`).MatchString(m) {
				t.Errorf("%q is in a tag: %s", evil, m)
			}
		}
		if n := strings.Count(words(p), strings.Join(strings.Fields(strings.ToValidUTF8(strings.ReplaceAll(evil, "\x00", "\ufffd"), "?")), " ")); n < 5 {
			t.Errorf("%q can be read only %d times in %s", evil, n, words(p))
		}
	}
}

// The browser is told to load nothing and to run nothing, and the one style sheet that it may use is the one that is there.
func TestPageForbidsScripts(t *testing.T) {
	t.Parallel()
	r, _ := recorded(t, newWorld("a"))
	s, err := health.Serve(health.Settings{Addr: "127.0.0.1:0"}, r, none{}, "v1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	for ask, want := range map[string]int{"GET /": 200, "HEAD /": 200, "POST /": 405, "DELETE /": 405, "GET /index.html": 404, "GET /favicon.ico": 404, "GET //": 404, "POST /x": 404, "GET /livez": 200} {
		method, path, _ := strings.Cut(ask, " ")
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.Addr+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want && (ask != "GET //" || res.StatusCode/100 != 3) {
			t.Errorf("%s: %d, want %d", ask, res.StatusCode, want)
		}
		if path != "/" || want != 200 {
			continue
		}
		for name, want := range map[string]string{"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"} {
			if got := res.Header.Get(name); got != want {
				t.Errorf("%s: %s: %s", ask, name, got)
			}
		}
		style := regexp.MustCompile(`(?s)<style>(.*?)</style>`).FindStringSubmatch(page(t, r))
		if len(style) != 2 {
			t.Fatal("there is not one style sheet")
		}
		sum := sha256.Sum256([]byte(style[1]))
		if got, want := res.Header.Get("Content-Security-Policy"), "default-src 'none'; style-src 'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+
			"'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"; got != want {
			t.Errorf("%s: the policy is %s", ask, got)
		}
	}
	p := page(t, r)
	if m := regexp.MustCompile(`(?i)<script|<link[^>]*href="(?:[^d]|d[^a])|src=|url\(|@import|https?://[^w]`).FindString(strings.ReplaceAll(p, "https://a", "")); m != "" {
		t.Errorf("it has %s", m)
	}
	expect(t, p, "<!doctype html>", `name="viewport"`, `name="color-scheme" content="light dark"`, `http-equiv="refresh" content="10"`, `scope="col"`, `scope="row"`)
}

type none struct{}

func (none) Alive() error         { return nil }
func (none) Ready() error         { return nil }
func (none) Stats() []notify.Stat { return nil }

// Payloads are attributes of log lines, and so may secrets of tomorrow be.
func TestPageShowsNoPayload(t *testing.T) {
	t.Parallel()
	w := newWorld("orders")
	r, log := recorded(t, w)
	w.set(func() { w.figures["orders:outbox_rows failed"], w.figures["orders:outbox_rows due"] = 1, 0 })
	for _, l := range []*slog.Logger{log, log.With("channel", "orders"), log.With("channel", "orders", "payload", "hunter2")} {
		for _, msg := range []string{"gave up", "abandoned", "disconnected", "ping failed", call.Paused} {
			l.Error(msg, "id", "x", "event", "e", "attempts", 3, "payload", "hunter2", "stack", "hunter2", "panic", "hunter2", "error", errors.New("the cause"))
		}
		l.Warn("handler panicked", "panic", "hunter2", "stack", "hunter2")
		l.Warn("reconnected", "payload", "hunter2", "gap_from", time.Now(), "gap_to", time.Now())
	}
	p := page(t, r)
	expect(t, p, "the cause", "not: hunter2")
}

func TestGapsAndTheirCauses(t *testing.T) {
	t.Parallel()
	timeout := fmt.Errorf("read tcp: %w", os.ErrDeadlineExceeded)
	for name, c := range map[string]struct {
		lines func(log *slog.Logger)
		want  string
	}{
		"killed":   {func(l *slog.Logger) { l.Warn("disconnected", "error", errors.New("57P01"), "uptime", time.Hour) }, "250 ms 57P01"},
		"silent":   {func(l *slog.Logger) { l.Warn("disconnected", "error", timeout, "uptime", time.Hour) }, "the connection fell silent: read tcp: i/o timeout"},
		"ping":     {func(l *slog.Logger) { l.Warn("ping failed", "error", errors.New("no such command")) }, "no such command"},
		"deaf":     {func(l *slog.Logger) { l.Error("notifications no longer arrive", "probes_lost", 1) }, "notifications no longer arrive"},
		"nothing":  {func(*slog.Logger) {}, "not known"},
		"another":  {func(l *slog.Logger) { l.With("channel", "a").Warn("disconnected", "error", timeout) }, "not known"},
		"no cause": {func(l *slog.Logger) { l.Warn("probe could not be sent", "error", timeout) }, "not known"},
		"the first of several": {func(l *slog.Logger) {
			l.Warn("disconnected", "error", errors.New("EOF"), "uptime", time.Hour)
			l.Warn("connection attempt failed", "error", errors.New("refused"))
			l.Warn("disconnected", "error", errors.New("second"))
		}, "EOF"},
		"one that began no gap before it": {func(l *slog.Logger) {
			a := pgconn.NewAccount(l)
			a.Opened() // and it breaks before all channels are LISTENed
			a.Lost(time.Now(), time.Now(), time.Time{}, errors.New("too early"))
			a.Opened()
			a.Listening = true
			a.Lost(time.Now(), time.Now(), time.Time{}, errors.New("EOF"))
		}, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, log := recorded(t, newWorld("a"))
			c.lines(log)
			gap := func() {
				log.Warn("reconnected", "gap_from", time.Now().Add(-250*time.Millisecond), "gap_to", time.Now())
			}
			gap()
			expect(t, words(page(t, r)), "Gaps in the last 24 hours Ended Length Cause", c.want)
			gap() // the next one has not had this cause
			if said := words(page(t, r)); !regexp.MustCompile(`Gaps in the last 24 hours 2 50\d ms in all`).MatchString(said) {
				t.Errorf("it does not say that two gaps were half a second long: %s", said)
			}
			if n := strings.Count(words(page(t, r)), "not known"); n == 0 || n == 1 && c.want == "not known" {
				t.Errorf("%d gaps without a cause", n)
			}
		})
	}
	r, log := recorded(t, newWorld("a"))
	log.Warn("disconnected", "error", errors.New("long ago"), "uptime", time.Hour)
	log.Warn("reconnected", "gap_from", time.Now().Add(time.Minute), "gap_to", time.Now().Add(time.Minute))
	expect(t, words(page(t, r)), "not known", "not: long ago")
}

func TestMemoryOfThePageIsBounded(t *testing.T) {
	w := newWorld("orders", "mail")
	r, log := recorded(t, w)
	flood := func() {
		for i := range 5_000 {
			long := errors.New(strings.Repeat("x", 5000) + fmt.Sprint(i))
			log.With("channel", fmt.Sprint("unknown", i)).Error("gave up", "id", i, "event", "e", "attempts", 1, "error", long)
			log.With("channel", "orders").Error("gave up", "id", i, "event", "e", "attempts", 1, "error", long)
			log.Warn("disconnected", "error", long)
			log.Warn("reconnected", "gap_from", time.Now(), "gap_to", time.Now())
		}
	}
	used := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	flood()
	before := used()
	flood()
	after := used()
	r.mu.Lock()
	defer r.mu.Unlock()
	if after > before+200_000 || len(r.view.Gaps) != maxGaps || len(r.view.Channels[0].Failed) != maxFailed || len(r.view.Channels) != 2 {
		t.Errorf("%d bytes more; %d gaps, %d failed rows, %d channels", after-before, len(r.view.Gaps), len(r.view.Channels[0].Failed), len(r.view.Channels))
	}
}

func TestOnlyTheLastFailuresAreListed(t *testing.T) {
	t.Parallel()
	w := newWorld("orders")
	r, log := recorded(t, w)
	gaveUp := func(id int) {
		log.With("channel", "orders").Error("gave up", "id", id, "event", "e", "attempts", 1, "error", errors.New(strings.Repeat("x", 5000)))
		log.Warn("reconnected", "gap_from", time.Now(), "gap_to", time.Now())
	}
	for id := range 5000 {
		gaveUp(id)
	}
	w.set(func() { w.figures["orders:outbox_rows failed"], w.figures["orders:outbox_rows due"] = 5000, 0 })
	p := page(t, r)
	if len(p) > 60_000 {
		t.Errorf("the page has %d bytes", len(p))
	}
	expect(t, words(p), "-outbox-retry 4999", "-outbox-retry 4990", "not: -outbox-retry 4989", "Only the last ten are listed")
	gaveUp(4995)
	if n := strings.Count(page(t, r), "-outbox-retry 4995"); n != 1 {
		t.Errorf("a row that failed twice is listed %d times", n)
	}
}

// The clock is that of the test.
func TestLastHourAndSinceWhen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld("orders")
		r, log := Watch(slog.New(slog.DiscardHandler))
		end := r.Start(w.source())
		defer end() // else the bubble would not end
		hour := func() hour {
			page(t, r)
			r.turn.Lock()
			defer r.turn.Unlock()
			return r.view.Channels[0].Hour(time.Now())
		}
		work := func(done, failed float64, took time.Duration) {
			w.set(func() {
				w.figures["orders:items_total done"] += done - 1
				w.figures["orders:items_total done by schedule"]++ // as of a doorbell that also has a row
				w.figures["orders:handler_failures_total by schedule"] += failed
				h := w.calls["orders"]
				h.Count, h.Sum = h.Count+uint64(done+failed), h.Sum+took
				w.calls["orders"] = h
			})
		}
		began := time.Now()
		work(10, 0, time.Second)
		time.Sleep(5 * time.Minute) // it looks by itself meanwhile
		work(30, 2, 3*time.Second)
		h := hour()
		if h.Done != 40 || h.Failed != 2 || h.Peak != 30 || h.PerCall() < 0.09 || h.PerCall() > 0.1 || h.Most != 2 {
			t.Errorf("%+v", h)
		}
		if now, then := h.Minutes[59], h.Minutes[54]; now.Done != 30 || now.Failed != 2 || then.Done != 10 || then.Failed != 0 || h.Minutes[55] != (minute{}) {
			t.Errorf("now %+v, five minutes ago %+v", now, then)
		}
		time.Sleep(57 * time.Minute)
		if h := hour(); h.Done != 30 {
			t.Errorf("%v done in the last hour", h.Done)
		}
		w.set(func() { w.figures["orders:items_total done"] = 0 }) // it cannot, but nothing may follow from it
		if h := hour(); h.Done != 30 {
			t.Errorf("%v done after a figure went back", h.Done)
		}
		time.Sleep(10 * time.Minute)
		if h := hour(); h.Done != 0 || h.Failed != 0 || h.PerCall() != 0 || h.Peak != 0 {
			t.Errorf("%+v after an idle hour", h)
		}
		work(5, 1, time.Second)
		if h := hour(); h.Done != 5 || h.Failed != 1 {
			t.Errorf("%+v after work in the third hour", h)
		}
		r.turn.Lock()
		if n := len(r.view.Channels[0].minutes); n > 60 {
			t.Errorf("it remembers %d minutes", n)
		}
		r.turn.Unlock()
		expect(t, page(t, r), `viewBox="0 -5 60 5" preserveAspectRatio="none"><rect x="59.3" y="-5" width=".4" height="5"/>`, `viewBox="0 0 60 1" preserveAspectRatio="none"><rect x="59.3" width=".4" height="1"/>`)

		since := func() (ready, hears, work time.Duration) {
			page(t, r)
			r.turn.Lock()
			defer r.turn.Unlock()
			return r.view.Ready.Since.Sub(began), r.view.Hears.Since.Sub(began), r.view.Channels[0].Work.Since.Sub(began)
		}
		if a, b, c := since(); a != 0 || b != 0 || c != 0 {
			t.Errorf("since %v, %v, %v", a, b, c)
		}
		deaf := time.Since(began)
		w.set(func() { w.hears = errors.New("one") })
		time.Sleep(3 * time.Second)
		w.set(func() { w.hears = errors.New("another") })
		time.Sleep(time.Minute)
		if a, b, c := since(); a < deaf || a > deaf+lookInterval || b != a || c != 0 {
			t.Errorf("deaf since %v, %v, %v", a-deaf, b-deaf, c)
		}
		w.set(func() { w.works["orders"] = errors.New("late") })
		time.Sleep(time.Minute)
		w.set(func() { w.hears = nil })
		time.Sleep(time.Minute)
		if a, b, c := since(); a > deaf+lookInterval || b < deaf+2*time.Minute || c < deaf+time.Minute || c > b {
			t.Errorf("not ready since %v, hears since %v, late since %v", a-deaf, b-deaf, c-deaf)
		}
		_, headline, _ := strings.Cut(words(page(t, r)), "the work of orders is not done.")
		headline, _, _ = strings.Cut(headline, "what is wrong")
		_, _, late := since()
		expect(t, headline, "Since "+began.Add(late).UTC().Format("15:04:05 UTC"))

		// A gap is shown for a day.
		log.Warn("reconnected", "gap_from", time.Now().Add(-time.Minute), "gap_to", time.Now())
		time.Sleep(23 * time.Hour)
		expect(t, words(page(t, r)), "(23 h ago)", "1 min", "1 Jan")
		time.Sleep(2 * time.Hour)
		expect(t, words(page(t, r)), "nothing was missed", "not: ago) 1 min")

		// A pause counts from when the figure says so, and ends with it.
		paused := time.Now()
		w.set(func() { w.works["orders"], w.figures["orders:channel_paused"] = nil, 1 })
		time.Sleep(time.Minute)
		expect(t, words(page(t, r)), "paused since", "It hears. Something needs a look. What needs a look") // with no time that is of something else
		r.turn.Lock()
		got := r.view.Channels[0].Paused
		r.turn.Unlock()
		if got.Before(paused) || got.After(paused.Add(lookInterval)) {
			t.Errorf("paused since %v, not %v", got, paused)
		}
		w.set(func() { w.figures["orders:channel_paused"] = 0 })
		expect(t, words(page(t, r)), "not: paused since")

		// It was not ready before it became deaf.
		w.set(func() { w.works["orders"] = errors.New("late") })
		page(t, r)
		time.Sleep(time.Minute)
		w.set(func() { w.hears = errors.New("no server") })
		page(t, r)
		time.Sleep(time.Minute)
		text := words(page(t, r))
		headline, _, _ = strings.Cut(text[strings.Index(text, "It does not hear."):], "What")
		expect(t, headline, "Since ", "(1 min ago)")
	})
}

// The log goes on as it was.
func TestLogIsHandedOn(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	r, log := Watch(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelError})))
	w := newWorld("orders")
	t.Cleanup(r.Start(w.source()))
	of := log.With("channel", "orders", "more", 1)
	of.Info("info")
	of.Warn("warn", "error", errors.New("only on the page"))
	of.Error("error", "payload", "x", "error", errors.New("both"))
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `level=ERROR msg=error channel=orders more=1 payload=x error=both`) {
		t.Errorf("the log is %s", got)
	}
	if log.Enabled(t.Context(), slog.LevelInfo) || !log.Enabled(t.Context(), slog.LevelWarn) {
		t.Error("the levels have changed")
	}
	expect(t, words(page(t, r)), "both")
	of.Warn("warn", "error", errors.New("only on the page"))
	expect(t, words(page(t, r)), "only on the page")
	type key struct{}
	probe := &contextHandler{Handler: slog.DiscardHandler}
	_, log = Watch(slog.New(probe))
	log.ErrorContext(context.WithValue(t.Context(), key{}, true), "x")
	if probe.ctx == nil || probe.ctx.Value(key{}) == nil {
		t.Error("the context is lost")
	}
}

type contextHandler struct {
	slog.Handler
	ctx context.Context
}

func (h *contextHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *contextHandler) Handle(ctx context.Context, _ slog.Record) error {
	h.ctx = ctx
	return nil
}

// Who logs may hold the very lock that the page's questions need.
func TestPageAndLogDoNotWaitForEachOther(t *testing.T) {
	t.Parallel()
	w := newWorld("orders")
	r, log := recorded(t, w)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 200 {
				w.set(func() { log.With("channel", "orders").Warn("handler failed", "error", errors.New("no")) })
			}
		})
		all.Go(func() {
			for range 100 {
				r.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil))
			}
		})
	}
	done := make(chan struct{})
	go func() {
		all.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("they wait for each other")
	}
}

func TestLengthsAndTimes(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		0: "0 s", 900 * time.Nanosecond: "900 ns", 41 * time.Microsecond: "41 µs", 3140 * time.Microsecond: "3.1 ms", 3 * time.Millisecond: "3 ms", 999 * time.Millisecond: "999 ms",
		1500 * time.Millisecond: "1.5 s", 59 * time.Second: "59 s", time.Minute: "1 min", 70 * time.Second: "1 min 10 s", 2*time.Hour + 10*time.Minute: "2 h 10 min", 10 * time.Hour: "10 h",
		12*time.Minute + 30*time.Second: "12 min", 3*time.Hour + 59*time.Second: "3 h", 24 * time.Hour: "1 d", 49*time.Hour + 5*time.Minute: "2 d 1 h",
	} {
		if got := length(d); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
	now := time.Date(2026, 11, 24, 0, 0, 30, 0, time.FixedZone("", 3600))
	for d, want := range map[time.Duration]string{
		0: "23:00:30 UTC (just now)", -90 * time.Second: "22:59:00 UTC (1 min 30 s ago)", -3500 * time.Millisecond: "23:00:26 UTC (3 s ago)", 1500 * time.Millisecond: "23:00:31 UTC (in 1.5 s)",
		-24*time.Hour - 61*time.Second: "22 Nov, 22:59:29 UTC (1 d ago)", -61*time.Minute - 5*time.Second: "21:59:25 UTC (1 h 1 min ago)", time.Hour: "24 Nov, 00:00:30 UTC (in 1 h)",
	} {
		var got strings.Builder
		if err := pageTemplate.ExecuteTemplate(&got, "when", []time.Time{now.Add(d).UTC(), now.UTC()}); err != nil || words(got.String()) != want {
			t.Errorf("%v: %q, want %q: %v", d, words(got.String()), want, err)
		}
	}
	for n, want := range map[float64]string{0: "0", 999: "999", 1000: "1\u202f000", 1234567: "1\u202f234\u202f567"} {
		if got := num(n); got != want {
			t.Errorf("%v is %q", n, got)
		}
	}
}

func TestNextRunsAreListed(t *testing.T) {
	t.Parallel()
	source := newWorld().source()
	for name, schedule := range map[string]string{"a": "@daily", "b": "CRON_TZ=Asia/Tokyo @every 5m", "d": ""} {
		source.Channels = append(source.Channels, Channel{Name: name, Schedule: schedule, Works: func() error { return nil }})
	}
	source.Next = func(schedule string, _, now time.Time) (time.Time, error) {
		if schedule != "@daily" {
			t.Errorf("asked of %q", schedule)
		}
		return now.Add(90 * time.Minute), nil
	}
	r, _ := Watch(slog.New(slog.DiscardHandler))
	t.Cleanup(r.Start(source))
	said := words(page(t, r))
	expect(t, said, "(in 1 h 30 min)", "b CRON_TZ=Asia/Tokyo @every 5m counted from the run before")
}
