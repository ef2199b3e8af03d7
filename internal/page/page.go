// Package page answers GET / with one page for people: whether the listener hears and the work is done, in words, and what
// happened lately. It needs no script and nothing from elsewhere, and is made from memory.
package page

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

var (
	//go:embed page.html
	pageHTML string
	//go:embed page.css
	pageCSS string

	pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
		"css": func() template.CSS { return template.CSS(pageCSS) },
		"iso": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
		"num": num, "length": length, "seconds": seconds, "ago": ago, "clock": clock,
		"at": func(t, now time.Time) []time.Time { return []time.Time{t, now} },
	}).Parse(pageHTML))

	styleHash = sha256.Sum256([]byte(pageCSS))
	// policy lets the page use the style sheet in it and its icon, which is a data URL, and nothing else.
	policy = "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(styleHash[:]) +
		"'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

// ServeHTTP implements http.Handler.
func (r *Recorder) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	var page bytes.Buffer
	if err := r.write(&page, time.Now()); err != nil {
		http.Error(w, "the page cannot be made: "+err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	_, _ = w.Write(page.Bytes())
}

// view is what the template is given.
type view struct {
	Now, Started  time.Time
	Host, Version string
	PID           int
	Stuck         bool // the loop does not turn, so that only a restart helps
	Ready, Hears  condition
	Idle          []string // channels whose work is not being done
	Channels      []*channel
	Gaps          []event // the newest first
	GapTotal      time.Duration
	Overall       figures
}

func (r *Recorder) write(page *bytes.Buffer, now time.Time) error {
	r.look(now)
	stuck := r.source.Alive() != nil
	host, _ := os.Hostname()
	r.mu.Lock() // also for the template, which reads what is remembered; it asks nobody and waits for nothing
	defer r.mu.Unlock()
	v := &view{Now: now, Started: r.started, Host: host, Version: r.source.Version, PID: os.Getpid(), Stuck: stuck && r.hears.Reason != "",
		Ready: r.ready, Hears: r.hears, Channels: r.channels, Gaps: r.gaps, Overall: r.overall}
	for _, g := range r.gaps {
		v.GapTotal += g.At.Sub(g.From)
	}
	for _, c := range r.channels {
		if c.Work.Reason != "" {
			v.Idle = append(v.Idle, c.Name)
		}
	}
	return pageTemplate.Execute(page, v)
}

// State is fire exactly while /readyz answers 503, look while all is done but something is worth a look, and else calm.
func (v *view) State() string {
	switch {
	case v.Ready.Reason != "":
		return "fire"
	case v.Sum("outbox_rows failed")+v.Sum("outbox_unhandled_rows")+v.Sum("items_total dropped")+v.Sum("channel_paused") > 0, v.Filling(),
		slices.ContainsFunc(v.Channels, func(c *channel) bool { return c.Failing }):
		return "look"
	}
	return "calm"
}

// Sum is a figure over all channels.
func (v *view) Sum(key string) (sum float64) {
	for _, c := range v.Channels {
		sum += c.Figures[key]
	}
	return sum
}

// Filling says whether some session does not read what the server keeps for it.
func (v *view) Filling() bool { return v.Overall["notification_queue_usage_ratio"] >= 0.25 }

// Outbox says whether its work is the rows of a table.
func (c *channel) Outbox() bool { _, is := c.Figures["outbox_rows due"]; return is }

// hour is the last one of a channel. PerCall is in seconds; 0 when there was no call.
type hour struct {
	Done, Failed, Peak, PerCall float64
	Bars                        []bar
}

// bar is a minute in the drawing: what was done stands above the line, the calls that failed hang below it.
type bar struct{ X, Y, Up, Down float64 }

// The drawing, in the units of its view box.
const barWidth, above, below = 5, 40, 14

// Hour is the hour until now.
func (c *channel) Hour(now time.Time) (h hour) {
	var minutes [60]minute
	calls, took, most := 0.0, 0.0, 0.0
	for i := range minutes {
		n := now.Unix()/60 - 59 + int64(i)
		if m := c.minutes[n%60]; m.number == n {
			minutes[i] = m
			h.Done, h.Peak, h.Failed, most = h.Done+m.done, max(h.Peak, m.done), h.Failed+m.failed, max(most, m.failed)
			calls, took = calls+m.calls, took+m.took
		}
	}
	if calls > 0 {
		h.PerCall = took / calls
	}
	for i, m := range minutes {
		b := bar{X: float64(i * barWidth)}
		if m.done > 0 {
			b.Up = max(2, m.done/h.Peak*above)
		}
		if m.failed > 0 {
			b.Down = max(2, m.failed/most*below)
		}
		b.Y = above - b.Up
		h.Bars = append(h.Bars, b)
	}
	return h
}

// num writes a count with narrow spaces between thousands.
func num(n float64) string {
	s := strconv.FormatFloat(n, 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}

// units are from the largest; of the first three the next one stands behind.
var units = []struct {
	unit time.Duration
	name string
}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "min"}, {time.Second, "s"}, {time.Millisecond, "ms"}, {time.Microsecond, "µs"}}

// length writes a duration so that it is read at a glance.
func length(d time.Duration) string {
	i := 0
	for i < len(units)-1 && d < units[i].unit {
		i++
	}
	u, n := units[i], d/units[i].unit
	if i < 3 {
		next := units[i+1]
		return strings.TrimSuffix(fmt.Sprintf("%d %s %d %s", n, u.name, d%u.unit/next.unit, next.name), " 0 "+next.name)
	} else if n < 10 {
		return strings.Replace(fmt.Sprintf("%.1f %s", float64(d)/float64(u.unit), u.name), ".0", "", 1)
	}
	return fmt.Sprintf("%d %s", n, u.name)
}

func seconds(s float64) string { return length(time.Duration(s * float64(time.Second))) }

// ago writes how far t is from now.
func ago(t, now time.Time) string {
	switch d := now.Sub(t); {
	case d <= -time.Second:
		return "in " + length(-d)
	case d < time.Second:
		return "just now"
	case d < 10*time.Minute:
		return length(d.Truncate(time.Second)) + " ago"
	default:
		return length(d.Truncate(time.Minute)) + " ago"
	}
}

// clock writes a moment, with the day unless it is that of now.
func clock(t, now time.Time) string {
	if t, now = t.UTC(), now.UTC(); t.Format(time.DateOnly) == now.Format(time.DateOnly) {
		return t.Format("15:04:05 UTC")
	}
	return t.Format("2 Jan, 15:04:05 UTC")
}
