package proc

import (
	"bytes"
	"log/slog"
)

// MaxLine is where a line of a program's output is cut, in bytes: more would be held in memory.
const MaxLine = 8 << 10

// Output logs what is written to it, line by line. One goroutine at a time writes; Flush comes last.
type Output struct {
	Log    *slog.Logger
	Stream string // "stdout" or "stderr"

	Last string // line that was logged

	line []byte
	cut  bool // the line was longer than MaxLine; the rest is skipped
}

// Write implements io.Writer. It never fails.
func (o *Output) Write(p []byte) (int, error) {
	for part := range bytes.Lines(p) {
		part, complete := bytes.CutSuffix(part, []byte("\n"))
		if room := MaxLine - len(o.line); len(part) > room {
			part, o.cut = part[:room], true
		}
		if o.line = append(o.line, part...); complete {
			o.end()
		}
	}
	return len(p), nil
}

// Flush logs a last line that has no newline.
func (o *Output) Flush() {
	if len(o.line) > 0 {
		o.end()
	}
}

func (o *Output) end() {
	o.Last = string(bytes.TrimSuffix(o.line, []byte("\r")))
	attrs := []any{"stream", o.Stream, "line", o.Last}
	if o.cut {
		attrs = append(attrs, "cut_at", MaxLine)
	}
	o.Log.Info("output", attrs...)
	o.line, o.cut = o.line[:0], false
}
