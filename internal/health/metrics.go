package health

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pglistener/pglistener/internal/notify"
)

// Exposition writes figures in the Prometheus text format. Those of one name are brought together, as the format asks, in the
// order in which the names first come.
func Exposition(stats []notify.Stat) []byte {
	first := map[string]int{} // where a name first comes
	for i, s := range stats {
		if _, known := first[s.Name]; !known {
			first[s.Name] = i
		}
	}
	var out bytes.Buffer
	last := ""
	for _, s := range slices.SortedStableFunc(slices.Values(stats), func(a, b notify.Stat) int { return first[a.Name] - first[b.Name] }) {
		if s.Name != last {
			fmt.Fprintf(&out, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", s.Name, s.Help, s.Kind)
		}
		if last = s.Name; s.Kind == "histogram" {
			writeHistogram(&out, s)
		} else {
			writeSample(&out, s.Name, s.Value, s.Labels)
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
	var pairs []string
	for pair := range slices.Chunk(labels, 2) {
		pairs = append(pairs, pair[0]+`="`+labelEscaper.Replace(pair[1])+`"`)
	}
	if len(pairs) > 0 {
		name += "{" + strings.Join(pairs, ",") + "}"
	}
	out.WriteString(name + " " + formatFloat(value) + "\n")
}

func formatFloat(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }
