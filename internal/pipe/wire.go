package pipe

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/proc"
)

// request is the line for a notification. Its fields are in this order always, for programs without a JSON library.
type request struct {
	ID        string `json:"id"`
	Channel   string `json:"channel"`
	Payload   string `json:"payload"`
	Attempt   int    `json:"attempt"`
	CreatedAt string `json:"created_at,omitempty"`
	RunAt     string `json:"run_at,omitempty"`
}

// appendRequest appends the line for a notification. What some library takes for the end of a line is escaped, and what is not
// UTF-8 replaced.
func appendRequest(b []byte, id string, n *notify.Notification) []byte {
	out := bytes.NewBuffer(b)
	e := json.NewEncoder(out)
	e.SetEscapeHTML(false)
	_ = e.Encode(request{id, n.Channel, n.Payload, n.Attempt, proc.Stamp(n.CreatedAt), proc.Stamp(n.RunAt)}) // strings do not fail
	// The one end of a line that encoding/json leaves as it is.
	return append(b, bytes.ReplaceAll(out.Bytes()[len(b):], []byte("\u0085"), []byte(`\u0085`))...)
}

// answer is a line that the program writes.
type answer struct {
	ID          *string `json:"id"`
	OK          *bool   `json:"ok"`
	Error       *string `json:"error"`
	Permanent   bool    `json:"permanent"`
	RetryAfter  float64 `json:"retry_after"` // seconds
	Unavailable bool    `json:"unavailable"`
}

// understand reads an answer: for which id it is, and what Handle is to return. problem says why the line is no answer.
func (h *handler) understand(line []byte) (id, problem string, result error) {
	var a answer
	switch err := json.Unmarshal(line, &a); {
	case err != nil:
		return "", "not JSON, or of other types", nil
	case a.ID == nil:
		return "", "without an id", nil
	case a.OK == nil && a.Error == nil:
		return "", "neither ok nor an error, as in an echo", nil
	case a.Error == nil && *a.OK:
		return *a.ID, "", nil
	case a.Error == nil:
		a.Error = new(string)
	}
	text := "it answered with an error"
	if h.setup.LogPayloads {
		text = cmp.Or(strings.ToValidUTF8(notify.Cut(*a.Error, 2000), "?"), "it answered that it is not ok, and not why")
	}
	result = fmt.Errorf("%s: %w", h.path, errors.New(text))
	result = notify.RetryAfter(result, time.Duration(max(0, min(a.RetryAfter, 24*3600))*float64(time.Second))) // 0 is none
	if a.Permanent {
		result = notify.Permanent(result)
	}
	if a.Unavailable {
		result = notify.Unavailable(result)
	}
	return *a.ID, "", result
}

// longestLine is the most that is held of a line of the program's.
const longestLine = 1 << 20

// read takes the answers of a program until it closes its stdout. A program that runs on then is stopped.
func (h *handler) read(p *program) {
	r := bufio.NewReaderSize(p.stdout, longestLine) // of which only what is used takes memory
	for err := error(nil); err == nil; {
		var line []byte
		if line, err = r.ReadSlice('\n'); len(line) > 0 {
			h.take(p, line, err == bufio.ErrBufferFull)
		}
		for err == bufio.ErrBufferFull { // skip the rest of the line
			_, err = r.ReadSlice('\n')
		}
	}
	h.mu.Lock()
	p.closed = true
	h.mu.Unlock()
	select {
	case <-p.exited:
	case <-time.After(h.setup.Grace):
		p.deaf = true
		p.stop()
	}
}

// take takes an answer, or tells the log why it is none.
func (h *handler) take(p *program, line []byte, tooLong bool) {
	id, problem, result := "", "too long", error(nil)
	if !tooLong {
		id, problem, result = h.understand(line)
	}
	h.mu.Lock()
	if it := h.items[id]; problem == "" && it != nil && it.program == p {
		p.answers, h.answers, h.failed = p.answers+1, h.answers+1, 0
		h.finish(it, result)
		h.mu.Unlock()
		return
	}
	h.notUnderstood++
	h.mu.Unlock()
	problem = cmp.Or(problem, "an id that is not in flight: unknown, or answered before")
	lines, shouldLog := h.noise.Count(problem)
	if !shouldLog {
		return
	}
	attrs := []any{"program", h.path, "problem", problem, "lines", lines}
	if h.setup.LogPayloads {
		attrs = append(attrs, "line", strings.ToValidUTF8(notify.Cut(string(bytes.TrimSpace(line[:min(len(line), 300)])), 200), "?"))
	}
	if lines == 1 {
		attrs = append(attrs, "hint", `stdout is for answers only, each a line such as {"id":"...","ok":true}; write logs to stderr`)
	}
	h.setup.Log.Warn("a line of the program is no answer", attrs...)
}
