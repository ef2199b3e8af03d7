package health

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"github.com/pglistener/pglistener/internal/notify"
)

// Exposition writes figures in the Prometheus text format. Those of one name are brought together, as the format asks, in the
// order in which the names first come.
func Exposition(stats []notify.Stat) []byte {
	var names []string
	families := map[string][]notify.Stat{}
	for _, s := range stats {
		if families[s.Name] == nil {
			names = append(names, s.Name)
		}
		families[s.Name] = append(families[s.Name], s)
	}
	var out bytes.Buffer
	for _, name := range names {
		family := families[name]
		fmt.Fprintf(&out, "# HELP %s %s\n# TYPE %s %s\n", name, family[0].Help, name, family[0].Kind)
		for _, s := range family {
			if s.Kind == "histogram" {
				writeHistogram(&out, s)
			} else {
				writeSample(&out, name, s.Value, s.Labels)
			}
		}
	}
	return out.Bytes()
}

func writeHistogram(out *bytes.Buffer, s notify.Stat) {
	h := s.Histogram
	sum := uint64(0)
	bucket := func(le string, value uint64) {
		writeSample(out, s.Name+"_bucket", float64(value), append(s.Labels[:len(s.Labels):len(s.Labels)], "le", le))
	}
	for i, bound := range notify.HistogramBounds {
		sum += h.Buckets[i]
		bucket(formatFloat(bound.Seconds()), sum)
	}
	bucket("+Inf", h.Count)
	writeSample(out, s.Name+"_sum", h.Sum.Seconds(), s.Labels)
	writeSample(out, s.Name+"_count", float64(h.Count), s.Labels)
}

var labelEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// writeSample writes one line; labels are names and values by turns.
func writeSample(out *bytes.Buffer, name string, value float64, labels []string) {
	out.WriteString(name)
	separator := "{"
	for i := 0; i < len(labels); i += 2 {
		out.WriteString(separator + labels[i] + `="` + labelEscaper.Replace(labels[i+1]) + `"`)
		separator = ","
	}
	if len(labels) > 0 {
		out.WriteString("}")
	}
	out.WriteString(" " + formatFloat(value) + "\n")
}

func formatFloat(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }
