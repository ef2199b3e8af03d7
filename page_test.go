// feature: page

package main

import (
	"html"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// statusPage asks a program for its status page, between two questions for its readiness. If those had the same answer the page must
// have it too.
type statusPage struct {
	address string
	agreed  map[bool]int // by readiness
}

// words are what the page says, without markup.
func (s *statusPage) words(t *testing.T) string {
	t.Helper()
	before, was := get(t, s.address+"/readyz")
	code, page := get(t, s.address+"/")
	after, why := get(t, s.address+"/readyz")
	if code != http.StatusOK {
		t.Fatalf("%d: %s", code, page)
	}
	if ready := before == http.StatusOK; before == after && was == why { // else it was ready in between, perhaps
		s.agreed[ready]++
		if fire := strings.Contains(page, `<html lang="en" class="fire">`); fire == ready {
			t.Fatalf("/readyz says %d %s, and the page:\n%s", after, why, page)
		}
	}
	page = regexp.MustCompile(`(?s)<style>.*?</style>|<[^>]*>`).ReplaceAllString(page, " ")
	return strings.Join(strings.Fields(html.UnescapeString(page)), " ")
}

// says waits until the page says all of this.
func (s *statusPage) says(t *testing.T, wants ...string) string {
	t.Helper()
	said := ""
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the page said last: %s", said)
		}
	})
	for _, want := range wants {
		testkit.Eventually(t, "the page does not say "+want, func() bool {
			said = s.words(t)
			return strings.Contains(said, want)
		})
	}
	return said
}

// TestPageTellsWhatHappens runs the program, and causes what the page is for.
func TestPageTellsWhatHappens(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/dev/full"); err != nil {
		testkit.Skip(t, "needs a file that cannot be written: "+err.Error())
	}
	channel := testkit.ChannelName(t)
	bad := channel + "_bad"
	dsn, proxy := testkit.Proxied(t, testkit.WithParams(testkit.DSN(t), "application_name", channel))
	p := runProgram(t, fast(dsn, channel+","+bad+"=append:/dev/full", vars{
		"HTTP_ADDR": "127.0.0.1:0", "PROBE_INTERVAL": "2s", "HANDLER_ATTEMPTS": "1000", "HANDLER_TIMEOUT": "200ms", "LATE_AFTER": "1s",
	}))
	s := &statusPage{"http://" + p.Wait(t, "serving health", 1)["addr"].(string), map[bool]int{}}
	p.Wait(t, "delivery proven", 1)
	testkit.Send(t, channel, "hunter2")
	s.says(t, "✓ hears, work is done", "It hears, and the work is done.", "nothing was missed", channel+" plain log at most 1 done a minute 1 1 0 0", bad+" plain append:/dev/full nothing done 0 0 0 0 – ✓ done")

	for _, pid := range testkit.Backends(t, testkit.DB(t), channel) {
		testkit.Exec(t, testkit.DB(t), "select pg_terminate_backend($1)", pid)
	}
	s.says(t, "terminating connection due to administrator command (57P01)", "It hears, and the work is done.")
	proxy.Silence()
	s.says(t, "the connection fell silent", "It hears, and the work is done.", "Gaps in the last 24 hours 2")
	proxy.Refuse(true)
	proxy.Reset()
	s.says(t, "It does not hear.", "What to do It keeps trying by itself.")
	proxy.Refuse(false)
	s.says(t, "It hears, and the work is done.", "Gaps in the last 24 hours 3")

	testkit.Send(t, bad, "hunter2")
	s.says(t, "It hears. Something needs a look.", "The last call of "+bad+" failed.", "write /dev/full: no space left on device")
	s.says(t, "It hears, but the work of "+bad+" is not done.", "its handler has not succeeded for", "✗ not done since")
	if said := s.words(t); strings.Contains(said, "hunter2") {
		t.Errorf("the page has a payload: %s", said)
	}
	if s.agreed[true] < 5 || s.agreed[false] < 2 {
		t.Errorf("only compared %v times", s.agreed)
	}
}
