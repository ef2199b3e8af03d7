package page

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/call"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
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
}

// Channel is one of them.
type Channel struct {
	Name     string
	Shown    string           // its mode and handler, without secrets
	Works    func() error     // why its work is not being done, or nil
	Schedule string           // when it runs by itself; "" when it does not
	Next     func() time.Time // when next; nil when that is not known
}

// Recorder remembers what the page shows of the past: what the log told of gaps and failures, the figures by the minute, and
// since when things have been as they are. Its methods may be called from any goroutine. A line of the log may come from whoever
// holds the lock of a channel, so the Source is never asked while mu is held.
type Recorder struct {
	source  Source
	started time.Time
	turn    sync.Mutex // of look: figures are added in the order in which they were read

	mu       sync.Mutex // guards what follows
	ready    condition  // as /readyz has it
	hears    condition
	channels []*channel
	gaps     []event // the newest first
	cause    event   // of the gap that is under way, if there is one
	overall  figures // those that are of no channel
}

// figures are by the name of the metric without pglistener_, and a blank and the value of the label that it has besides channel.
type figures map[string]float64

// condition is why something is not as it should be, or "", and since when.
type condition struct {
	Reason string
	Since  time.Time
}

func (c *condition) note(err error, now time.Time) {
	was := c.Reason
	if c.Reason = ""; err != nil {
		c.Reason = cut(err.Error())
	}
	if c.Since.IsZero() || (was == "") != (c.Reason == "") {
		c.Since = now
	}
}

// channel is what is remembered of one.
type channel struct {
	Channel
	Work    condition
	Paused  time.Time // since when; zero while it is not
	Error   event     // the last
	Failed  []event   // rows of the outbox that were given up, the newest first
	Failing bool      // the last calls have failed
	Figures figures
	minutes [60]minute // that of minute n since 1970 is at n modulo 60
}

// minute is what happened in one.
type minute struct {
	number                    int64   // since 1970
	done, calls, failed, took float64 // failed: calls, that may be repeated; took: seconds
}

// event is something that the log told: an error, a row that was given up, or the end of a gap.
type event struct {
	At, From time.Time // From: when a gap began
	Text     string
	ID       string // of a row
}

// Watch makes a Recorder, and of log a logger that also tells it what it logs at WARN and above, whatever LOG_LEVEL is.
func Watch(log *slog.Logger) (*Recorder, *slog.Logger) {
	r := &Recorder{}
	return r, slog.New(&handler{Handler: log.Handler(), recorder: r})
}

// Start looks at s every two seconds until end is called, which waits for the end of a look under way. Call it once, before the
// page is served.
func (r *Recorder) Start(s Source) (end func()) {
	r.mu.Lock()
	r.source, r.started = s, time.Now()
	for _, c := range s.Channels {
		r.channels = append(r.channels, &channel{Channel: c})
	}
	r.mu.Unlock()
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for r.look(time.Now()); ; r.look(time.Now()) {
			select {
			case <-time.After(lookInterval):
			case <-stop:
				return
			}
		}
	}()
	return func() {
		close(stop)
		<-ended
	}
}

// look takes down how things stand.
func (r *Recorder) look(now time.Time) {
	r.turn.Lock()
	defer r.turn.Unlock()
	hears, works := r.source.Hears(), make([]error, len(r.source.Channels))
	by := map[string]figures{"": {}} // by channel, none of which has the empty name
	for i, c := range r.source.Channels {
		works[i], by[c.Name] = c.Works(), figures{}
	}
	for _, s := range r.source.Stats() {
		name, key := "", strings.TrimPrefix(s.Name, "pglistener_")
		if len(s.Labels) >= 2 && s.Labels[0] == "channel" {
			name = s.Labels[1]
		}
		if len(s.Labels) >= 4 {
			key += " " + s.Labels[3]
		}
		if of := by[name]; of != nil {
			of[key] = s.Value + float64(s.Histogram.Count)
			of[key+" sum"] = s.Histogram.Sum.Seconds()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	ready := hears
	for i, c := range r.channels {
		ready = cmp.Or(ready, works[i])
		c.Work.note(works[i], now)
		c.add(by[c.Name], now)
	}
	r.ready.note(ready, now)
	r.hears.note(hears, now)
	r.overall = by[""]
	r.gaps = slices.DeleteFunc(r.gaps, func(g event) bool { return now.Sub(g.At) > gapsAge })
}

// add brings figures up to date, and counts in the minute of now what has happened since the last ones.
func (c *channel) add(f figures, now time.Time) {
	m := &c.minutes[now.Unix()/60%60]
	if n := now.Unix() / 60; m.number != n {
		*m = minute{number: n}
	}
	since := func(key string) float64 { return max(0, f[key]-c.Figures[key]) }
	calls, failed := since("handler_duration_seconds"), since("handler_failures_total")
	m.done, m.took = m.done+since("items_total done"), m.took+since("handler_duration_seconds sum")
	m.calls, m.failed = m.calls+calls, m.failed+failed
	if calls > 0 {
		c.Failing = failed == calls
	}
	if c.Figures = f; f["channel_paused"] == 0 {
		c.Paused = time.Time{}
	} else if c.Paused.IsZero() {
		c.Paused = now
	}
}

// handler hands lines on, after it has told the Recorder of them. It never waits longer than the Recorder needs to remember one.
type handler struct {
	slog.Handler
	recorder *Recorder
	channel  string // which the logger carries
}

func (h *handler) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn || h.Handler.Enabled(ctx, level)
}

func (h *handler) Handle(ctx context.Context, line slog.Record) error {
	if line.Level >= slog.LevelWarn {
		h.recorder.heed(h.channel, line)
		if !h.Handler.Enabled(ctx, line.Level) {
			return nil
		}
	}
	return h.Handler.Handle(ctx, line)
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.Handler = h.Handler.WithAttrs(attrs)
	for _, a := range attrs {
		if a.Key == "channel" {
			with.channel = a.Value.String()
		}
	}
	return &with
}

// heed remembers what the page shows of a line. It reads the attributes that it names and no other, for they may be payloads.
func (r *Recorder) heed(name string, line slog.Record) {
	a := map[string]slog.Value{}
	line.Attrs(func(attr slog.Attr) bool {
		a[attr.Key] = attr.Value
		return true
	})
	told := event{At: line.Time, Text: line.Message, ID: a["id"].String()}
	cause, failed := a["error"]
	if failed {
		told.Text = cause.String()
	}
	if hint := a["hint"]; hint.Kind() == slog.KindString {
		told.Text = strings.TrimSuffix(told.Text+": "+hint.String(), ": ")
	}
	if err, ok := cause.Any().(error); ok && name == "" && pgconn.IsTimeout(err) {
		told.Text = "the connection fell silent: " + told.Text
	}
	told.Text = cut(told.Text)
	from, to := a["gap_from"], a["gap_to"]
	has := func(key string) bool { _, has := a[key]; return has }
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.channels, func(c *channel) bool { return c.Name == name })
	switch {
	case from.Kind() == slog.KindTime && to.Kind() == slog.KindTime:
		gap := event{From: from.Time(), At: to.Time(), Text: "not known"}
		if r.cause.At.After(gap.From.Add(-10 * time.Second)) { // a ping fails before the connection is given up
			gap.Text = r.cause.Text
		}
		r.gaps, r.cause = first(gap, r.gaps, maxGaps), event{}
	case name == "" && r.cause.At.IsZero() && (has("probes_lost") || failed && (line.Message == "disconnected" || line.Message == "ping failed")):
		r.cause = told
	case i < 0 || !failed:
	default:
		c := r.channels[i]
		c.Error = told
		if line.Message == call.Paused && c.Paused.IsZero() {
			c.Paused = line.Time
		}
		if has("event") && has("attempts") { // else it is tried again
			others := slices.DeleteFunc(c.Failed, func(o event) bool { return o.ID == told.ID })
			c.Failed = first(told, others, maxFailed)
		}
	}
}

// first puts e before others, of which it forgets the last when there are more than n.
func first(e event, others []event, n int) []event {
	return append([]event{e}, others[:min(len(others), n-1)]...)
}

// cut makes of a text of the log one that is short, valid and not empty.
func cut(s string) string {
	if short := notify.Cut(s, maxText); short != s {
		s = short + " ..."
	}
	return strings.ToValidUTF8(cmp.Or(s, "?"), "?")
}
