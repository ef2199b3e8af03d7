// feature: health outbox

package main

import (
	"regexp"
	"testing"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestMetricsAreDocumented compares docs/metrics.md with /metrics, both ways.
func TestMetricsAreDocumented(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	channels := channel + "=outbox:log"
	channels += "," + channel + "_pipe=outbox:pipe:cat" // feature: pipe
	r := start(t, fast(testkit.DSN(t), channels, sending(outboxTable(t, testkit.DB(t)))), nil).listening(t)
	_, body := r.web(t)("/metrics")
	served := map[string]bool{}
	help := regexp.MustCompile(`(?m)^# HELP (\S+) (.*)\n# TYPE \S+ (\S+)$`)
	for _, m := range help.FindAllStringSubmatch(body, -1) {
		served["| `"+m[1]+"` | "+m[3]+" | "+m[2]+" |"] = true
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `[a-z_]+` \\| (?:gauge|counter|histogram) \\| .*\\|$").FindAllString(testkit.ReadFile(t, "docs/metrics.md"), -1) {
		documented[m] = true
	}
	for row := range served {
		if !documented[row] {
			t.Errorf("docs/metrics.md lacks the row\n%s", row)
		}
	}
	for row := range documented {
		if !served[row] {
			t.Errorf("/metrics does not have\n%s", row)
		}
	}
	if len(served) < 10 {
		t.Errorf("only %d metrics found", len(served))
	}
}
