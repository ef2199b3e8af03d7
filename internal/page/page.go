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
	"maps"
	"net/http"
	"os"
	"slices"
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
		"at":  func(t, now time.Time) []time.Time { return []time.Time{t.UTC(), now.UTC()} },
		"num": num, "length": length, "seconds": seconds, "cut": cut, "contains": strings.Contains, "host": os.Hostname, "pid": os.Getpid,
	}).Parse(pageHTML))

	styleHash = sha256.Sum256([]byte(pageCSS))
	// The policy lets the page use the style sheet in it and its icon, which is a data URL, and nothing else.
	headers = http.Header{
		"Content-Type": {"text/html; charset=utf-8"}, "Cache-Control": {"no-store"},
		"X-Content-Type-Options": {"nosniff"}, "Referrer-Policy": {"no-referrer"},
		"Content-Security-Policy": {"default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(styleHash[:]) +
			"'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"},
	}
)

// view is what the template is given. What the log told is guarded by Recorder.mu, all else by Recorder.turn.
type view struct {
	Source       Source
	Started, Now time.Time
	Stuck        bool      // the loop does not turn, so that only a restart helps
	Ready, Hears condition // as /readyz has it
	Idle         []string  // channels whose work is not being done
	Channels     []*channel
	Overall      figures // those of no channel, and the sums of those that channels have
	Gaps         []event // the log told them; the newest first
	GapTotal     time.Duration
}

// ServeHTTP implements http.Handler.
func (r *Recorder) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	var page bytes.Buffer
	if err := r.write(&page); err != nil {
		http.Error(w, "the page cannot be made: "+err.Error(), http.StatusInternalServerError)
		return
	}
	maps.Copy(w.Header(), headers)
	_, _ = w.Write(page.Bytes())
}

func (r *Recorder) write(page *bytes.Buffer) error {
	r.turn.Lock()
	defer r.turn.Unlock()
	v := &r.view
	r.look()
	r.mu.Lock() // also for the template, which asks nobody and waits for nothing
	defer r.mu.Unlock()
	v.Gaps = slices.DeleteFunc(v.Gaps, func(g event) bool { return v.Now.Sub(g.At) > gapsAge })
	v.GapTotal = 0
	for _, g := range v.Gaps {
		v.GapTotal += g.At.Sub(g.From)
	}
	return pageTemplate.Execute(page, v)
}

// num writes a count with narrow spaces between thousands.
func num(n float64) string {
	if n < 1000 {
		return fmt.Sprint(int(n))
	}
	return num(n/1000) + fmt.Sprintf("\u202f%03d", int(n)%1000)
}

// spaced makes of Go's durations what people write.
var spaced = strings.NewReplacer("h0m0s", " h", "m0s", " min", "h", " h ", "ms", " ms", "µs", " µs", "ns", " ns",
	"m", " min ", "s", " s")

// length writes a duration so that it is read at a glance: no more exactly than it needs to be, so that small ones have
// tenths of a second or millisecond.
func length(d time.Duration) string {
	for _, unit := range []time.Duration{time.Minute, time.Second, 1e8, time.Millisecond, 1e5, time.Microsecond} {
		if d >= 10*unit {
			d = d.Truncate(unit)
		}
	}
	if hours := int(d.Hours()); hours >= 24 {
		return strings.TrimSuffix(fmt.Sprintf("%d d %d h", hours/24, hours%24), " 0 h")
	}
	return spaced.Replace(d.String())
}

func seconds(s float64) string { return length(time.Duration(s * float64(time.Second))) }
