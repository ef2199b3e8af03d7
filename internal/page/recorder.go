package page

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
	"github.com/pglistener/pglistener/internal/retry"
)

// What is remembered is bounded: an hour of each channel by the minute, and so many gaps and failed rows, with texts cut.
const (
	lookInterval = 2 * time.Second
	gapsAge      = 24 * time.Hour
	maxGaps      = 200
	maxFailed    = 10  // of each channel
	maxText      = 240 // bytes
)

// Source is what the page is about. Its functions may be called from any goroutine and do not block.
type Source struct {
	Version  string
	Alive    func() error // why the loop does not turn, or nil
	Hears    func() error // why a notification that is sent now might not be heard, or nil
	Stats    func() []notify.Stat
	Channels []Channel
	Next     func(schedule string, last, now time.Time) (time.Time, error) // when a schedule comes next
}

// Channel is one of them.
type Channel struct {
	Name     string
	Shown    string       // its mode and handler, without secrets
	Works    func() error // why its work is not being done, or nil
	Schedule string       // when it runs by itself; "" when it does not
}

// Recorder remembers what the page shows of the past: what the log told of gaps and failures, the figures by the minute, and
// since when things have been as they are. Its methods may be called from any goroutine. A line of the log may come from whoever
// holds the lock of a channel, so the Source is never asked while mu is held.
type Recorder struct {
	turn, mu sync.Mutex // turn is of those who look, and taken before mu
	cause    event      // of the gap that is under way, if there is one; guarded by mu
	view     view
}

// figures are by the name of the metric without pglistener_, and a blank and the value of the label that it has besides channel. Those
// of a doorbell's schedule are added to those of its own.
type figures map[string]float64

// condition is why something is not as it should be, or nil, and since when.
type condition struct {
	Reason error
	Since  time.Time
}

func (c *condition) note(reason error, now time.Time) {
	if c.Since.IsZero() || (reason == nil) != (c.Reason == nil) {
		c.Since = now
	}
	c.Reason = reason
}

// channel is what is remembered of one. The log told the last error, and the rows of the outbox that were given up, the newest
// first.
type channel struct {
	Channel
	Work    condition
	Paused  time.Time // when it last was, or went on
	Error   event
	Failed  []event
	Failing bool // the last calls have failed
	Figures figures
	minutes map[int64]minute // those of the last hour, by their number since 1970
}

// minute is what happened in one. Failed are calls, that may be repeated; Took is in seconds.
type minute struct{ Done, Calls, Failed, Took float64 }

func (m minute) plus(n minute) minute {
	return minute{m.Done + n.Done, m.Calls + n.Calls, m.Failed + n.Failed, m.Took + n.Took}
}

// PerCall is how many seconds a call took; 0 when there was none.
func (m minute) PerCall() float64 { return m.Took / max(1, m.Calls) }

// event is something that the log told: an error, a row that was given up, or the end of a gap. ID is that of a row.
type event struct {
	At, From time.Time // From: when a gap began
	Text, ID string
}

// Watch makes a Recorder, and of log a logger that also tells it what it logs at WARN and above, whatever LOG_LEVEL is.
func Watch(log *slog.Logger) (*Recorder, *slog.Logger) {
	r := &Recorder{}
	return r, slog.New(&handler{Handler: log.Handler(), recorder: r})
}

// Start looks at s every two seconds until end is called, which waits for the end of a look under way. Call it once, before the
// page is served.
func (r *Recorder) Start(s Source) (end func()) {
	r.mu.Lock() // lines of the log may come already
	r.view = view{Source: s, Started: time.Now()}
	for _, c := range s.Channels {
		r.view.Channels = append(r.view.Channels, &channel{Channel: c, minutes: map[int64]minute{}})
	}
	r.mu.Unlock()
	ctx, stop := context.WithCancel(context.Background())
	var looking sync.WaitGroup
	looking.Go(func() {
		for next := true; next; next = retry.Sleep(ctx, lookInterval) {
			r.turn.Lock()
			r.look()
			r.turn.Unlock()
		}
	})
	return func() { stop(); looking.Wait() }
}

// look takes down how things stand. Who calls it holds turn, so that figures are added in the order in which they were read.
func (r *Recorder) look() {
	by := map[string]figures{} // by channel, and of all together under "", which is the name of none
	for _, s := range r.view.Source.Stats() {
		name, key := "", strings.TrimPrefix(s.Name, "pglistener_")
		if len(s.Labels) >= 2 && s.Labels[0] == "channel" {
			name = s.Labels[1]
		}
		if len(s.Labels) >= 4 && s.Labels[2] != "by" {
			key += " " + s.Labels[3]
		}
		for _, of := range slices.Compact([]string{"", name}) {
			if by[of] == nil {
				by[of] = figures{}
			}
			by[of][key] += s.Value + float64(s.Histogram.Count)
			by[of][key+" sum"] += s.Histogram.Sum.Seconds()
		}
	}
	v, now := &r.view, time.Now()
	hears := v.Source.Hears()
	ready := hears
	v.Now, v.Stuck, v.Idle, v.Overall = now, v.Source.Alive() != nil, nil, by[""]
	for _, c := range v.Channels {
		works := c.Works()
		if works != nil {
			v.Idle = append(v.Idle, c.Name)
		}
		ready = cmp.Or(ready, works)
		c.Work.note(works, now)
		c.add(by[c.Name], now)
	}
	v.Ready.note(ready, now)
	v.Hears.note(hears, now)
}

// add brings figures up to date, and counts in the minute of now what has happened since the last ones.
func (c *channel) add(f figures, now time.Time) {
	since := func(key string) float64 { return max(0, f[key]-c.Figures[key]) }
	m := minute{since("items_total done"), since("handler_duration_seconds"), since("handler_failures_total"),
		since("handler_duration_seconds sum")}
	n := now.Unix() / 60
	c.minutes[n] = c.minutes[n].plus(m)
	maps.DeleteFunc(c.minutes, func(old int64, _ minute) bool { return old <= n-60 })
	if m.Calls > 0 {
		c.Failing = m.Failed == m.Calls
	}
	if f["channel_paused"] != c.Figures["channel_paused"] {
		c.Paused = now
	}
	c.Figures = f
}

// hour is the last one of a channel, and the most that was done and that failed in a minute of it.
type hour struct {
	minute
	Minutes    [60]minute
	Peak, Most float64
}

// Hour is the hour until now.
func (c *channel) Hour(now time.Time) (h hour) {
	for i := range h.Minutes {
		m := c.minutes[now.Unix()/60-59+int64(i)]
		h.minute, h.Minutes[i] = h.plus(m), m
		h.Peak, h.Most = max(h.Peak, m.Done), max(h.Most, m.Failed)
	}
	return h
}

// Outbox says whether its work is the rows of a table.
func (c *channel) Outbox() bool { _, is := c.Figures["outbox_rows due"]; return is }

// handler hands lines on, after it has told the Recorder of them. It never waits longer than the Recorder needs to remember one.
type handler struct {
	slog.Handler
	recorder *Recorder
	with     []slog.Attr // which the logger carries
}

func (h *handler) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn || h.Handler.Enabled(ctx, level)
}

func (h *handler) Handle(ctx context.Context, line slog.Record) error {
	if line.Level >= slog.LevelWarn {
		h.recorder.heed(line, h.with)
	}
	if !h.Handler.Enabled(ctx, line.Level) {
		return nil
	}
	return h.Handler.Handle(ctx, line)
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &handler{h.Handler.WithAttrs(attrs), h.recorder, append(slices.Clip(h.with), attrs...)}
}

// heed remembers what the page shows of a line. It reads the attributes that it names and no other, for they may be payloads.
func (r *Recorder) heed(line slog.Record, with []slog.Attr) {
	line = line.Clone()
	line.AddAttrs(with...)
	a := map[string]any{}
	line.Attrs(func(attr slog.Attr) bool {
		a[attr.Key] = attr.Value.Any()
		return true
	})
	cause := cmp.Or(a["error"], any(line.Message))
	told := event{At: line.Time, Text: fmt.Sprint(cause), ID: fmt.Sprint(a["id"])}
	if hint, _ := a["hint"].(string); hint != "" {
		told.Text += ": " + hint
	}
	if err, _ := cause.(error); a["channel"] == nil && pgconn.IsTimeout(err) {
		told.Text = "the connection fell silent: " + told.Text
	}
	told.Text = cut(told.Text)
	lost := a["uptime"] != nil || line.Message == "ping failed" || a["probes_lost"] != nil // a connection that never listened begins no gap
	from, ended := a["gap_from"].(time.Time)
	to, _ := a["gap_to"].(time.Time)
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.view.Channels, func(c *channel) bool { return c.Name == a["channel"] })
	switch {
	case ended:
		gap := event{From: from, At: to, Text: "not known"}
		if r.cause.At.After(from.Add(-10 * time.Second)) { // a ping fails before the connection is given up
			gap.Text = r.cause.Text
		}
		r.view.Gaps, r.cause = slices.Insert(r.view.Gaps[:min(len(r.view.Gaps), maxGaps-1)], 0, gap), event{}
	case a["channel"] == nil && lost && r.cause.At.IsZero():
		r.cause = told
	case i >= 0 && a["error"] != nil:
		c := r.view.Channels[i]
		c.Error = told
		if a["event"] != nil && a["attempts"] != nil { // else it is tried again
			others := slices.DeleteFunc(c.Failed, func(o event) bool { return o.ID == told.ID })
			c.Failed = slices.Insert(others[:min(len(others), maxFailed-1)], 0, told)
		}
	}
}

// cut makes of a text one that is short and valid.
func cut(s string) string {
	if short := notify.Cut(s, maxText); short != s {
		s = short + " ..."
	}
	return strings.ToValidUTF8(s, "?")
}
