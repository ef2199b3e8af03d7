package schedule

import (
	"strings"
	"testing"
	"time"
)

// The clock may jump either way: no time is left out or repeated.
func TestClockThatJumps(t *testing.T) {
	clock := time.Date(2026, 3, 1, 10, 59, 0, 0, time.UTC)
	c := newClock(func(_, now time.Time) time.Time { return now.Truncate(time.Hour).Add(time.Hour) }, func() time.Time { return clock })
	for i, step := range []struct {
		set  string
		runs string // the time that has come, or ""
	}{
		{"10:59", ""}, {"11:00", "11:00"}, {"11:01", ""},
		{"10:30", ""}, {"10:59", ""}, {"11:00", ""}, {"11:30", ""}, {"12:00", "12:00"}, // set back: 11:00 is not repeated
		{"15:10", "13:00"}, {"15:11", ""}, {"16:00", "16:00"}, // set forward: made up for once
		{"13:01", ""}, {"14:00", ""}, {"16:00", ""}, {"17:00", "17:00"}, // set back by three hours
		{"13:59", ""}, {"14:00", "14:00"}, {"15:00", "15:00"}, // by more: it was wrong
	} {
		at, err := time.Parse("15:04", step.set)
		if err != nil {
			t.Fatal(err)
		}
		clock = time.Date(2026, 3, 1, at.Hour(), at.Minute(), 0, 0, time.UTC)
		ran := ""
		if nominal, due := c.Due(); due {
			ran = nominal.Format("15:04")
		}
		if ran != step.runs {
			t.Errorf("step %d, %s: ran %q, want %q", i, step.set, ran, step.runs)
		}
		if w := c.Wait(); w > 20*time.Second { // though the next time is up to an hour away
			t.Errorf("step %d: looks at the clock again only after %v", i, w)
		}
	}
}

// TestZoneOfTheEnvironment: Go takes a TZ that it does not know for UTC, in silence.
func TestZoneOfTheEnvironment(t *testing.T) {
	for tz, unknown := range map[string]bool{
		"": false, "UTC": false, "Europe/Berlin": false, ":Europe/Berlin": false, "/": false, "/no/such/file": true,
		"Europe/Berln": true, "'Europe/Berlin'": true, "CET-1CEST": true, ":Mars": true,
	} {
		t.Setenv("TZ", tz)
		for _, text := range []string{"0 3 * * *", ""} { // rows may have schedules where no channel has
			problems := Settings{Text: text}.Validate()
			if unknown != (len(problems) == 1 && strings.HasPrefix(problems[0].Error(), "TZ: ")) || !unknown && len(problems) > 0 {
				t.Errorf("TZ=%s, %q: %v", tz, text, problems)
			}
		}
	}
}
