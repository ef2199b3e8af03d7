package proc

import (
	"strings"
	"testing"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestOutputIsLoggedByLines, whatever the pieces in which it comes; only a line that was cut says so.
func TestOutputIsLoggedByLines(t *testing.T) {
	t.Parallel()
	exact := strings.Repeat("x", MaxLine)
	for _, piece := range []int{1, 7, MaxLine, 1 << 20} {
		lg := testkit.NewLogs(t)
		o := Output{Log: lg.Logger(), Stream: "stderr"}
		for rest := exact + "yz\n" + exact + "\nshort\r\n\n" + exact + "y"; rest != ""; {
			n := min(piece, len(rest))
			if written, err := o.Write([]byte(rest[:n])); written != n || err != nil {
				t.Fatalf("%d, %v", written, err)
			}
			rest = rest[n:]
		}
		o.Flush()
		o.Flush()
		lines := lg.All("output")
		want := []struct {
			text string
			cut  any
		}{{exact, float64(MaxLine)}, {exact, nil}, {"short", nil}, {"", nil}, {exact, float64(MaxLine)}}
		if len(lines) != len(want) {
			t.Fatalf("in pieces of %d: %d lines, want %d", piece, len(lines), len(want))
		}
		for i, w := range want {
			if l := lines[i]; l["line"] != w.text || l["cut_at"] != w.cut || l["stream"] != "stderr" {
				t.Errorf("in pieces of %d, line %d: %.40v, cut_at %v", piece, i, l["line"], l["cut_at"])
			}
		}
		if o.Last != exact {
			t.Errorf("in pieces of %d: the last line is %.40q", piece, o.Last)
		}
	}
}
