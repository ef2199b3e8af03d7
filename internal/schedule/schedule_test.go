package schedule

import (
	"math"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	_ "time/tzdata"
)

func parse(t testing.TB, text string, zone *time.Location) Schedule {
	t.Helper()
	s, err := Parse(text, zone)
	if err != nil {
		t.Fatalf("Parse(%q): %v", text, err)
	}
	return s
}

func zoneOf(t testing.TB, name string) *time.Location {
	t.Helper()
	zone, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return zone
}

func at(t testing.TB, text string) time.Time {
	t.Helper()
	parsed, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// checkRuns compares the runs after from with want, a list separated by blanks.
func checkRuns(t *testing.T, s Schedule, from, want string) {
	t.Helper()
	now := at(t, from)
	for wanted := range strings.FieldsSeq(want) {
		next := s.Next(now, now)
		if got := next.Format(time.RFC3339Nano); got != wanted {
			t.Errorf("%v after %s: %s, want %s", s, now.Format(time.RFC3339Nano), got, wanted)
			return
		}
		now = next
	}
}

var parseErrors = []struct{ text, want string }{
	{"", `schedule is empty, expected five fields`},
	{" \t ", `is empty`},
	{"CRON_TZ=UTC", `schedule is empty`},
	{strings.Repeat(" ", 1000) + "*", `schedule has 1001 bytes, at most 1000`},
	{"0 3 * * *\n", `schedule "0 3 * * *\n" has control characters`},
	{"0 3 *\v* *", `control characters`},
	{"0 3 * * *\x00", `control characters`},
	{"0 3 * *", `schedule "0 3 * *" has 4 fields, expected 5: minute, hour`},
	{"0 0 3 * * *", `schedule "0 0 3 * * *" has 6 fields, expected 5: minute, hour, day of month, month, day of week (no seconds)`},
	{"60 * * * *", `minute "60": 60 is out of range; allowed are 0-59,`},
	{"99999999999999999999 * * * *", `99999999999999999999 is out of range; allowed are 0-59,`},
	{"* 24 * * *", `hour "24": 24 is out of range; allowed are 0-23,`},
	{"* 1,24 * * *", `hour "1,24": 24 is out of range`},
	{"* * 0 * *", `day of month "0": 0 is out of range; allowed are 1-31, L,`},
	{"* * 32 * *", `day of month "32": 32 is out of range`},
	{"* * * 0 *", `month "0": 0 is out of range; allowed are 1-12, jan-dec,`},
	{"* * * 13 *", `month "13": 13 is out of range`},
	{"* * * * 8", `day of week "8": 8 is out of range; allowed are 0-7, sun-sat,`},
	{"* * * * 1-8", `day of week "1-8": 8 is out of range`},
	{"-1 * * * *", `minute "-1": a value is missing`},
	{"+1 * * * *", `minute "+1": "+1" is unknown`},
	{"1- * * * *", `minute "1-": a value is missing`},
	{"1,,2 * * * *", `minute "1,,2": a value is missing`},
	{", * * * *", `minute ",": a value is missing`},
	{"/5 * * * *", `minute "/5": a value is missing`},
	{"1-2-3 * * * *", `minute "1-2-3": "2-3" is unknown`},
	{"*-5 * * * *", `minute "*-5": "*" is unknown`},
	{"** * * * *", `minute "**": "**" is unknown`},
	{"0x1 * * * *", `minute "0x1": "0x1" is unknown`},
	{"1_0 * * * *", `minute "1_0": "1_0" is unknown`},
	{"１ * * * *", `minute "１": "１" is unknown`},
	{"0 mon * * *", `hour "mon": "mon" is unknown`},
	{"0 0 * foo *", `month "foo": "foo" is unknown; allowed are 1-12, jan-dec`},
	{"0 0 * january *", `month "january": "january" is unknown`},
	{"0 0 * * jan", `day of week "jan": "jan" is unknown; allowed are 0-7, sun-sat`},
	{"*/0 * * * *", `minute "*/0": step "0" is not a number from 1 to 60`},
	{"*/61 * * * *", `minute "*/61": step "61" is not a number from 1 to 60`},
	{"*/ * * * *", `minute "*/": step "" is not`},
	{"*/-5 * * * *", `step "-5" is not`},
	{"*/5/5 * * * *", `step "5/5" is not`},
	{"*/99999999999999999999 * * * *", `step "99999999999999999999" is not`},
	{"0 */25 * * *", `hour "*/25": step "25" is not a number from 1 to 24`},
	{"0 22-2 * * *", `hour "22-2": "22-2" runs backwards, write 22-23,0-2; allowed`},
	{"0 0 * * fri-mon", `day of week "fri-mon": "fri-mon" runs backwards, write fri-7,0-mon; allowed`},
	{"0 0 * nov-feb *", `"nov-feb" runs backwards, write nov-12,1-feb;`},
	{"50-10/10 * * * *", `minute "50-10/10": "50-10" runs backwards, write 50-59,0-10;`},
	{"0 0 ? * *", `day of month "?": "?" is unknown; allowed are 1-31, L, *, lists (1,2), ranges (1-5) and steps (*/5), but no ?, # or W`},
	{"0 0 * * mon#2", `day of week "mon#2": "mon#2" is unknown`},
	{"0 0 15W * *", `day of month "15W": "15w" is unknown`},
	{"0 0 LW * *", `day of month "LW": "lw" is unknown`},
	{"0 0 L-3 * *", `"l" is unknown`},
	{"0 0 * * 5L", `day of week "5L": "5l" is unknown`},
	{"L * * * *", `minute "L": "l" is unknown`},
	{"@reboot", `"@reboot" is not supported: a restart is not a time`},
	{"@noon", `"@noon" is unknown, allowed are @hourly,`},
	{"@", `"@" is unknown`},
	{"@daily 5", `"@daily" is complete in itself, remove "5"`},
	{"@every", `@every "" is not a duration from 1s to 3650d, such as 90s, 1h30m or 7d`},
	{"@every 5", `@every "5" is not a duration`},
	{"@every 1h 30m", `@every "1h 30m" is not a duration`},
	{"@every xd", `@every "xd" is not a duration`},
	{"@every -1d", `@every "-1d" is not a duration`},
	{"@every 0", `@every "0" is not a duration`},
	{"@every 999ms", `@every "999ms" is not a duration`},
	{"@every -5m", `@every "-5m" is not a duration`},
	{"@every 3650d1ns", `@every "3650d1ns" is not a duration`},
	{"@every 65535d2562047h", `@every "65535d2562047h" is not a duration`},
	{"@every 213504d", `@every "213504d" is not a duration`}, // 25 minutes if it overflowed
	{"@every 99999h", `@every "99999h" is not a duration`},
	{"CRON_TZ=Europe/Berln 0 3 * * *", `time zone "Europe/Berln" in CRON_TZ is unknown, expected a name such as Europe/Berlin or UTC`},
	{"TZ=../zone 0 3 * * *", `time zone "../zone" in CRON_TZ is unknown`},
	{"CRON_TZ= 0 3 * * *", `time zone "" in CRON_TZ is unknown`},
	{"CRON_TZ=Local 0 3 * * *", `time zone "Local" in CRON_TZ is unknown`},
	{"CRON_TZ=UTC CRON_TZ=UTC 0 3 * * *", `has 6 fields`},
	{"CRON_TZ=UTC @reboot", `"@reboot" is not supported`},
}

func TestParseErrors(t *testing.T) {
	for _, test := range parseErrors {
		s, err := Parse(test.text, time.UTC)
		if err == nil {
			t.Errorf("Parse(%q) = %v, want an error with %s", test.text, s, test.want)
			continue
		}
		checkErrorText(t, err)
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("Parse(%q):\n got %s\nwant %s", test.text, err, test.want)
		}
	}
}

func checkErrorText(t *testing.T, err error) {
	t.Helper()
	text := err.Error()
	if strings.ContainsAny(text, "\n\r") || strings.HasSuffix(text, ".") || strings.ToLower(text[:1]) != text[:1] {
		t.Errorf("an error must be one line, lower case, without a full stop: %q", text)
	}
}

// What is written in other words, or with other blanks or letters, is the same schedule.
func TestSpellings(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"0 3 * * *", "0 3 * * *"},
		{" \t*/5\t 1-2   l  Jul  mon-FRI ", "*/5 1-2 L JUL MON-FRI"},
		{"@hourly", "0 * * * *"},
		{"@Daily", "0 0 * * *"},
		{"@midnight", "0 0 * * *"},
		{"@weekly", "0 0 * * 0"},
		{"@monthly", "0 0 1 * *"},
		{"@yearly", "0 0 1 1 *"},
		{"@annually", "0 0 1 1 *"},
		{"@every 90s", "@every 1m30s"},
		{"@EVERY 1d12h", "@every 36h0m0s"},
		{"@every 3650d", "@every 87600h0m0s"},
		{"TZ=Europe/Berlin 0 3 * * *", "CRON_TZ=Europe/Berlin 0 3 * * *"},
		{"CRON_TZ=UTC   @daily", "CRON_TZ=UTC 0 0 * * *"},
		{"CRON_TZ=Asia/Tokyo @every 1s", "CRON_TZ=Asia/Tokyo @every 1s"},
	} {
		s, want := parse(t, test.text, time.UTC), parse(t, test.want, time.UTC)
		if s.zone.String() != want.zone.String() {
			t.Errorf("%q is in %v, %q in %v", test.text, s.zone, test.want, want.zone)
		}
		if s.zone, want.zone = nil, nil; s != want {
			t.Errorf("%q is %v, %q is %v", test.text, s, test.want, want)
		}
	}
}

// TestZones: a schedule's own zone wins over the given one, and results are in it.
func TestZones(t *testing.T) {
	berlin := zoneOf(t, "Europe/Berlin")
	now := at(t, "2026-07-01T12:00:00Z")
	for _, test := range []struct {
		text string
		zone *time.Location
		want string
		name string
	}{
		{"0 3 * * *", nil, "2026-07-02T03:00:00Z", "UTC"},
		{"0 3 * * *", berlin, "2026-07-02T03:00:00+02:00", "Europe/Berlin"},
		{"CRON_TZ=America/New_York 0 3 * * *", berlin, "2026-07-02T03:00:00-04:00", "America/New_York"},
		{"TZ=Asia/Kolkata @daily", nil, "2026-07-02T00:00:00+05:30", "Asia/Kolkata"},
		{"TZ=Asia/Kolkata @every 1h", berlin, "2026-07-01T18:30:00+05:30", "Asia/Kolkata"},
	} {
		next := parse(t, test.text, test.zone).Next(now, now)
		if next.Format(time.RFC3339) != test.want || next.Location().String() != test.name {
			t.Errorf("%q: %v in %v, want %s in %s", test.text, next, next.Location(), test.want, test.name)
		}
	}
}

// TestZoneOfSchedulesWithoutOne is UTC unless TZ says otherwise, whatever the machine's own zone: a container that moves to another
// machine runs at the same times.
func TestZoneOfSchedulesWithoutOne(t *testing.T) {
	defer func(l *time.Location) { time.Local = l }(time.Local)
	time.Local = zoneOf(t, "Asia/Tokyo")
	now := at(t, "2026-07-01T12:00:00Z")
	for tz, want := range map[string]string{"": "2026-07-02T03:00:00Z", "Asia/Tokyo": "2026-07-02T03:00:00+09:00"} {
		t.Setenv("TZ", tz)
		next, err := Next("0 3 * * *", now, now)
		if err != nil || next.Format(time.RFC3339) != want {
			t.Errorf("TZ=%s: %v, %v, want %s", tz, next, err, want)
		}
	}
}

func TestNext(t *testing.T) {
	// 1 July 2026 is a Wednesday.
	const now = "2026-07-01T12:34:56.789Z"
	for _, test := range []struct{ text, from, want string }{
		{"* * * * *", now, "2026-07-01T12:35:00Z 2026-07-01T12:36:00Z"},
		{"35 12 * * *", "2026-07-01T12:34:59.999999999Z", "2026-07-01T12:35:00Z 2026-07-02T12:35:00Z"},
		{"35 12 * * *", "2026-07-01T12:35:00Z", "2026-07-02T12:35:00Z"},
		{"35 12 * * *", "2026-07-01T12:35:00.000000001Z", "2026-07-02T12:35:00Z"},
		{"0,59 23 31 12 *", now, "2026-12-31T23:00:00Z 2026-12-31T23:59:00Z 2027-12-31T23:00:00Z"},
		{"*/20 13 * * *", now, "2026-07-01T13:00:00Z 2026-07-01T13:20:00Z 2026-07-01T13:40:00Z 2026-07-02T13:00:00Z"},
		{"10-50/20 13 * * *", now, "2026-07-01T13:10:00Z 2026-07-01T13:30:00Z 2026-07-01T13:50:00Z 2026-07-02T13:10:00Z"},
		{"5/25 13 * * *", now, "2026-07-01T13:05:00Z 2026-07-01T13:30:00Z 2026-07-01T13:55:00Z 2026-07-02T13:05:00Z"},
		{"5-6,40/15,59 13 * * *", now, "2026-07-01T13:05:00Z 2026-07-01T13:06:00Z 2026-07-01T13:40:00Z 2026-07-01T13:55:00Z 2026-07-01T13:59:00Z 2026-07-02T13:05:00Z"},
		{"*/60 */24 * * *", now, "2026-07-02T00:00:00Z 2026-07-03T00:00:00Z"},
		{"007 013 * * *", now, "2026-07-01T13:07:00Z"},
		{"0 0 1 feb,NOV-Dec *", now, "2026-11-01T00:00:00Z 2026-12-01T00:00:00Z 2027-02-01T00:00:00Z 2027-11-01T00:00:00Z"},
		{"0 0 1 oct/2 *", now, "2026-10-01T00:00:00Z 2026-12-01T00:00:00Z 2027-10-01T00:00:00Z"},
		{"0 0 * * 0", now, "2026-07-05T00:00:00Z 2026-07-12T00:00:00Z"},
		{"0 0 * * 7", now, "2026-07-05T00:00:00Z 2026-07-12T00:00:00Z"},
		{"0 0 * * Sun", now, "2026-07-05T00:00:00Z 2026-07-12T00:00:00Z"},
		{"0 0 * * fri-sun", now, "2026-07-03T00:00:00Z 2026-07-04T00:00:00Z 2026-07-05T00:00:00Z 2026-07-10T00:00:00Z"},
		{"0 0 * * 5-7", now, "2026-07-03T00:00:00Z 2026-07-04T00:00:00Z 2026-07-05T00:00:00Z 2026-07-10T00:00:00Z"},
		{"0 0 * * 0-1", now, "2026-07-05T00:00:00Z 2026-07-06T00:00:00Z 2026-07-12T00:00:00Z"},
		{"0 0 * * 1/2", now, "2026-07-03T00:00:00Z 2026-07-05T00:00:00Z 2026-07-06T00:00:00Z 2026-07-08T00:00:00Z"},
		{"0 0 * * mon,WED", now, "2026-07-06T00:00:00Z 2026-07-08T00:00:00Z"},
		// The day fields: either one, unless one begins with *.
		{"0 0 13 * fri", now, "2026-07-03T00:00:00Z 2026-07-10T00:00:00Z 2026-07-13T00:00:00Z 2026-07-17T00:00:00Z"},
		{"0 0 */2 * fri", now, "2026-07-03T00:00:00Z 2026-07-17T00:00:00Z 2026-07-31T00:00:00Z 2026-08-07T00:00:00Z"},
		{"0 0 1-7 * */7", now, "2026-07-05T00:00:00Z 2026-08-02T00:00:00Z 2026-09-06T00:00:00Z"},
		{"0 0 * * fri", now, "2026-07-03T00:00:00Z 2026-07-10T00:00:00Z"},
		{"0 0 13 * *", now, "2026-07-13T00:00:00Z 2026-08-13T00:00:00Z"},
		{"0 0 1-31 * fri", now, "2026-07-02T00:00:00Z 2026-07-03T00:00:00Z"},
		// The last day of the month.
		{"0 0 L * *", now, "2026-07-31T00:00:00Z 2026-08-31T00:00:00Z 2026-09-30T00:00:00Z"},
		{"0 0 l 2 *", now, "2027-02-28T00:00:00Z 2028-02-29T00:00:00Z 2029-02-28T00:00:00Z"},
		{"0 0 15,L 2 *", now, "2027-02-15T00:00:00Z 2027-02-28T00:00:00Z"},
		{"0 0 L * mon", now, "2026-07-06T00:00:00Z 2026-07-13T00:00:00Z 2026-07-20T00:00:00Z 2026-07-27T00:00:00Z 2026-07-31T00:00:00Z 2026-08-03T00:00:00Z"},
		{"0 0 L * */7", now, "2027-01-31T00:00:00Z 2027-02-28T00:00:00Z"},
		{"0 0 31 * *", now, "2026-07-31T00:00:00Z 2026-08-31T00:00:00Z 2026-10-31T00:00:00Z"},
		// Leap years: 2000 is one, 2100 is none.
		{"0 0 29 2 *", now, "2028-02-29T00:00:00Z 2032-02-29T00:00:00Z"},
		{"0 0 29 2 *", "1999-01-01T00:00:00Z", "2000-02-29T00:00:00Z 2004-02-29T00:00:00Z"},
		{"0 0 29 2 *", "2096-03-01T00:00:00Z", "2104-02-29T00:00:00Z"},
		{"0 0 29 2 */7", now, "2032-02-29T00:00:00Z 2060-02-29T00:00:00Z 2088-02-29T00:00:00Z 2128-02-29T00:00:00Z"},
		// Far away.
		{"0 12 * * *", "0001-01-01T00:00:00Z", "0001-01-01T12:00:00Z"},
		{"0 12 * * *", "1600-02-28T13:00:00Z", "1600-02-29T12:00:00Z"},
		{"0 12 * * *", "9999-12-30T13:00:00Z", "9999-12-31T12:00:00Z"},
	} {
		checkRuns(t, parse(t, test.text, time.UTC), test.from, test.want)
	}
}

func TestNextFarAway(t *testing.T) {
	berlin := zoneOf(t, "Europe/Berlin")
	daily, hourly := parse(t, "0 12 * * *", berlin), parse(t, "@every 1h", berlin)
	for _, year := range []int{-290_000, -1, 10_000, 294_276, 310_000} {
		now := time.Date(year, 6, 1, 13, 0, 0, 0, berlin)
		if got, want := daily.Next(now, now), time.Date(year, 6, 2, 12, 0, 0, 0, berlin); !got.Equal(want) {
			t.Errorf("after %v: %v, want %v", now, got, want)
		}
		if got, want := hourly.Next(at(t, "2026-01-01T00:00:00Z"), now), now.Truncate(time.Hour).Add(time.Hour); !got.Equal(want) {
			t.Errorf("@every after %v: %v, want %v", now, got, want)
		}
	}
	for _, now := range []int64{math.MinInt64, math.MinInt64 / 2, -farthest - 1, farthest + 1, math.MaxInt64 / 2, math.MaxInt64} {
		for _, s := range []Schedule{daily, hourly} {
			if got := s.Next(time.Time{}, time.Unix(now, 0)); !got.IsZero() {
				t.Errorf("%v after Unix time %d: %v, want never", s, now, got)
			}
		}
	}
}

func TestNextNever(t *testing.T) {
	for _, text := range []string{"0 0 30 2 *", "* * 31 feb,apr,jun,sep,nov *", "0 0 30,31 2 */2"} {
		for _, zone := range []string{"UTC", "Europe/Berlin"} {
			if got := parse(t, text, zoneOf(t, zone)).Next(time.Time{}, at(t, "2026-07-01T00:00:00Z")); !got.IsZero() {
				t.Errorf("%q: %v, want never", text, got)
			}
		}
	}
	if got := (Schedule{}).Next(time.Time{}, time.Now()); !got.IsZero() {
		t.Errorf("the zero Schedule: %v, want never", got)
	}
}

func TestNextEvery(t *testing.T) {
	const none = "0001-01-01T00:00:00Z"
	for _, test := range []struct{ text, nominal, now, want string }{
		{"@every 90s", "2026-07-01T12:00:00Z", "2026-07-01T12:00:00Z", "2026-07-01T12:01:30Z"},
		{"@every 90s", "2026-07-01T12:00:00Z", "2026-07-01T12:01:29.999Z", "2026-07-01T12:01:30Z"},
		{"@every 90s", "2026-07-01T12:00:00Z", "2026-07-01T12:01:30Z", "2026-07-01T12:03:00Z"},
		{"@every 90s", "2026-07-01T12:00:00.25Z", "2026-07-01T12:10:00Z", "2026-07-01T12:10:30.25Z"},
		{"@every 1.5s", "2026-07-01T12:00:00Z", "2026-07-01T12:00:01.6Z", "2026-07-01T12:00:03Z"},
		{"@every 7d", "2026-07-01T12:00:00Z", "2026-07-20T00:00:00Z", "2026-07-22T12:00:00Z"},
		// The clock was put back: it goes on at once.
		{"@every 1h", "2026-07-01T12:20:00Z", "2026-07-01T09:30:00Z", "2026-07-01T10:20:00Z"},
		// No run before.
		{"@every 1h", none, "2026-07-01T09:30:01.5Z", "2026-07-01T10:30:01.5Z"},
		// Further apart than a time.Duration can say.
		{"@every 24h", "0001-01-01T06:00:00Z", "2026-07-01T09:00:00Z", "2026-07-02T06:00:00Z"},
		{"@every 24h", "9999-01-01T06:00:00Z", "2026-07-01T09:00:00Z", "2026-07-02T06:00:00Z"},
	} {
		got := parse(t, test.text, time.UTC).Next(at(t, test.nominal), at(t, test.now))
		if got.Format(time.RFC3339Nano) != test.want {
			t.Errorf("%s from %s after %s: %s, want %s", test.text, test.nominal, test.now, got.Format(time.RFC3339Nano), test.want)
		}
	}
	// Elapsed time counts, not the wall clock.
	checkRuns(t, parse(t, "@every 12h", zoneOf(t, "Europe/Berlin")), "2026-03-28T18:00:00+01:00",
		"2026-03-29T07:00:00+02:00 2026-03-29T19:00:00+02:00")
	// Neither the nominal time nor its zone matters to fields.
	s, now := parse(t, "0 3 * * *", time.UTC), at(t, "2026-07-01T12:00:00Z")
	if got := s.Next(at(t, "2030-01-01T00:00:00+05:00"), now); !got.Equal(s.Next(time.Time{}, now)) {
		t.Errorf("fields look at the nominal time: %v", got)
	}
	if got := parse(t, "@every 1h", time.UTC).Next(time.Time{}, time.Now()); strings.Contains(got.String(), "m=") {
		t.Errorf("the result has a monotonic reading: %v", got)
	}
}

func TestDaylightSaving(t *testing.T) {
	for _, test := range []struct{ name, zone, text, from, want string }{
		{"skipped", "Europe/Berlin", "30 2 * * *", "2026-03-28T12:00:00+01:00", "2026-03-29T03:00:00+02:00 2026-03-30T02:30:00+02:00"},
		{"several skipped", "Europe/Berlin", "*/15 2 * * *", "2026-03-28T12:00:00+01:00", "2026-03-29T03:00:00+02:00 2026-03-30T02:00:00+02:00"},
		{"skipped and due", "Europe/Berlin", "0 2,3 * * *", "2026-03-28T12:00:00+01:00", "2026-03-29T03:00:00+02:00 2026-03-30T02:00:00+02:00"},
		{"beside the gap", "Europe/Berlin", "59 1,3 * * *", "2026-03-28T12:00:00+01:00", "2026-03-29T01:59:00+01:00 2026-03-29T03:59:00+02:00"},
		{"repeated", "Europe/Berlin", "30 2 * * *", "2026-10-24T12:00:00+02:00", "2026-10-25T02:30:00+02:00 2026-10-26T02:30:00+01:00"},
		{"between the two", "Europe/Berlin", "30 2 * * *", "2026-10-25T02:10:00+01:00", "2026-10-26T02:30:00+01:00"},
		{"some hours", "Europe/Berlin", "30 1-3 * * *", "2026-10-25T01:00:00+02:00", "2026-10-25T01:30:00+02:00 2026-10-25T02:30:00+02:00 2026-10-25T03:30:00+01:00"},
		{"03:00 in spring", "Europe/Berlin", "0 3 * * *", "2026-03-28T00:00:00+01:00", "2026-03-28T03:00:00+01:00 2026-03-29T03:00:00+02:00 2026-03-30T03:00:00+02:00"},
		{"03:00 in autumn", "Europe/Berlin", "0 3 * * *", "2026-10-24T00:00:00+02:00", "2026-10-24T03:00:00+02:00 2026-10-25T03:00:00+01:00 2026-10-26T03:00:00+01:00"},
		{"hourly in spring", "Europe/Berlin", "0 * * * *", "2026-03-29T00:30:00+01:00", "2026-03-29T01:00:00+01:00 2026-03-29T03:00:00+02:00 2026-03-29T04:00:00+02:00"},
		{"hourly in autumn", "Europe/Berlin", "0 * * * *", "2026-10-25T01:30:00+02:00", "2026-10-25T02:00:00+02:00 2026-10-25T02:00:00+01:00 2026-10-25T03:00:00+01:00"},
		{"0-23 is hourly", "Europe/Berlin", "0 0-23 * * *", "2026-10-25T01:30:00+02:00", "2026-10-25T02:00:00+02:00 2026-10-25T02:00:00+01:00 2026-10-25T03:00:00+01:00"},
		{"0 0-22 is not", "Europe/Berlin", "0 0-22 * * *", "2026-10-25T01:30:00+02:00", "2026-10-25T02:00:00+02:00 2026-10-25T03:00:00+01:00"},
		{"half an hour skipped", "Australia/Lord_Howe", "15 2 * * *", "2026-10-03T12:00:00+10:30", "2026-10-04T02:30:00+11:00 2026-10-05T02:15:00+11:00"},
		{"half an hour repeated", "Australia/Lord_Howe", "45 1 * * *", "2026-04-04T12:00:00+11:00", "2026-04-05T01:45:00+11:00 2026-04-06T01:45:00+10:30"},
		{"both half hours", "Australia/Lord_Howe", "*/15 * * * *", "2026-04-05T01:40:00+11:00", "2026-04-05T01:45:00+11:00 2026-04-05T01:30:00+10:30 2026-04-05T01:45:00+10:30 2026-04-05T02:00:00+10:30"},
		{"no midnight", "America/Sao_Paulo", "0 0 * * *", "2018-11-03T12:00:00-03:00", "2018-11-04T01:00:00-02:00 2018-11-05T00:00:00-02:00"},
		{"23:30 twice", "America/Sao_Paulo", "30 23 * * *", "2018-02-17T12:00:00-02:00", "2018-02-17T23:30:00-02:00 2018-02-18T23:30:00-03:00"},
		{"midnight once", "America/Sao_Paulo", "@daily", "2018-02-17T12:00:00-02:00", "2018-02-18T00:00:00-03:00 2018-02-19T00:00:00-03:00"},
		{"no midnight", "Asia/Beirut", "@daily", "2026-03-28T12:00:00+02:00", "2026-03-29T01:00:00+03:00 2026-03-30T00:00:00+03:00"},
		{"midnight once", "Asia/Beirut", "@daily", "2026-10-24T12:00:00+03:00", "2026-10-25T00:00:00+02:00 2026-10-26T00:00:00+02:00"},
		{"no midnight", "Africa/Cairo", "@daily", "2026-04-23T12:00:00+02:00", "2026-04-24T01:00:00+03:00 2026-04-25T00:00:00+03:00"},
		{"midnight once", "Africa/Cairo", "@daily", "2026-10-29T12:00:00+03:00", "2026-10-30T00:00:00+02:00 2026-10-31T00:00:00+02:00"},
		{"a skipped noon", "Pacific/Apia", "0 12 * * *", "2011-12-29T13:00:00-10:00", "2011-12-31T00:00:00+14:00 2011-12-31T12:00:00+14:00"},
		{"a skipped midnight", "Pacific/Apia", "0 0 * * *", "2011-12-29T13:00:00-10:00", "2011-12-31T00:00:00+14:00 2012-01-01T00:00:00+14:00"},
		{"a skipped date", "Pacific/Apia", "0 6,18 30 12 *", "2011-12-29T13:00:00-10:00", "2011-12-31T00:00:00+14:00 2012-12-30T06:00:00+14:00"},
		{"hourly of a skipped date", "Pacific/Apia", "0 * 30 12 *", "2011-12-29T13:00:00-10:00", "2012-12-30T00:00:00+14:00"},
		{"the last day", "Pacific/Apia", "0 0 L * *", "2011-12-29T13:00:00-10:00", "2011-12-31T00:00:00+14:00 2012-01-31T00:00:00+14:00"},
		{"standard time in summer", "Europe/Dublin", "30 1 * * *", "2026-03-28T12:00:00Z", "2026-03-29T02:00:00+01:00 2026-03-30T01:30:00+01:00"},
		{"far future", "Europe/Berlin", "30 2 * * *", "2500-03-27T12:00:00+01:00", "2500-03-28T03:00:00+02:00 2500-03-29T02:30:00+02:00"},
		{"end of a leap year", "Europe/Berlin", "30 2 * * *", "2040-12-30T12:00:00+01:00", "2040-12-31T02:30:00+01:00 2041-01-01T02:30:00+01:00"},
		{"in it", "Europe/Berlin", "@hourly", "2040-12-31T12:00:00+01:00", "2040-12-31T13:00:00+01:00 2040-12-31T14:00:00+01:00"},
		{"from it", "Europe/Berlin", "0 12 1 7 *", "2040-12-31T12:00:00+01:00", "2041-07-01T12:00:00+02:00"},
		{"between a gap and the next full minute", "Europe/Berlin", "3 0 * * *", "1893-04-01T00:06:40+01:00", "1893-04-01T00:07:00+01:00"},
		{"a gap of 6 minutes and 32 seconds", "Europe/Berlin", "3 0 * * *", "1893-03-31T12:00:00+00:53", "1893-04-01T00:07:00+01:00 1893-04-02T00:03:00+01:00"},
	} {
		t.Run(test.zone+" "+test.name, func(t *testing.T) {
			checkRuns(t, parse(t, test.text, zoneOf(t, test.zone)), test.from, test.want)
		})
	}
}

// expressions are compared with the walk below. "* * * * *" and the like are few: they take most of the time.
var expressions = []string{
	"*/5 * * * *", "7,37 * * * *", "0 * * * *", "59 * * * *", "30 * 1-7 * *", "15 0-23 * * 6", "*/20 */1 L * *", "45 * * 3,4,9-12 *",
	"* 2 * * *", "*/10 0-3 * * *", "*/15 1-5 * * *", "0 0-22 * * *", "20 1-23 * * *", "*/30 */2 * * *", "0 1/3 * * *", "5 23,0 * * *",
	"0 0 * * *", "1 0 * * *", "30 0 * * *", "59 23 * * *", "30 23 * * *", "0 1 * * *", "30 1 * * *", "45 1 * * *", "0 2 * * *",
	"15 2 * * *", "30 2 * * *", "59 2 * * *", "0 3 * * *", "1 3 * * *", "30 3 * * *", "0 4 * * *", "0 12 * * *", "0 2,3 * * *",
	"0 0 1 * *", "0 0 L * *", "30 2 L * *", "0 12 15,L * *", "0 0 31 * *", "15 2 29 2 *", "0 0 L 2 *", "0 12 30 12 *", "30 5 1 1 *",
	"0 0 * * 0", "30 2 * * sun", "30 2 * * 7", "0 1 * * fri-sun", "0 3 * * 1-5", "0 6 * * */2", "0 6 * * 1/2", "30 2 1-7 * */7",
	"0 0 13 * fri", "0 0 */2 * fri", "15 2 L * mon", "0 0 1-7,L * 3", "0 0 1 */3 *", "0 0 1 JAN,jul-SEP/2 *", "0 0 28-31 2 *",
	"0 0 30 2 *", "30 2 31 3,10 */7", "*/17 3/5 10-20/3 feb-nov/2 tue-sat/2",
}

// naive is a second reading of the fields: for each value, whether the field allows it.
type naive struct {
	text                                   string
	minutes, hours, days, months, weekdays [60]bool
	last, either, anyHour                  bool
}

func readNaively(text string) *naive {
	words := strings.Fields(strings.ToLower(text))
	n := &naive{text: text, last: strings.Contains(words[2], "l")}
	months := "   janfebmaraprmayjunjulaugsepoctnovdec"
	for v := range 60 {
		n.minutes[v] = allows(words[0], v, 59, "")
		n.hours[v] = allows(words[1], v, 23, "")
		n.days[v] = allows(words[2], v, 31, "")
		n.months[v] = allows(words[3], v, 12, months)
		n.weekdays[v] = allows(words[4], v, 7, "sunmontuewedthufrisat") || v == 0 && allows(words[4], 7, 7, "sunmontuewedthufrisatsun")
	}
	n.either = !strings.HasPrefix(words[2], "*") && !strings.HasPrefix(words[4], "*")
	n.anyHour = !slices.Contains(n.hours[:24], false)
	return n
}

// allows reports whether v, at most top, is in a list such as 1,3-5,*/7,10/2. Weekdays may end in sun.
func allows(list string, v, top int, names string) bool {
	number := func(word string) int {
		if i := strings.Index(names, word); i >= 0 && len(word) == 3 {
			return i / 3
		}
		i, err := strconv.Atoi(word)
		if err != nil {
			return -1
		}
		return i
	}
	for _, item := range strings.Split(list, ",") {
		parts := strings.Split(item, "/")
		step := 1
		if len(parts) == 2 {
			step = number(parts[1])
		}
		from, to := 0, top
		if top == 31 || top == 12 {
			from = 1
		}
		if parts[0] != "*" {
			ends := strings.Split(parts[0], "-")
			from = number(ends[0])
			if len(parts) == 1 {
				to = from
			}
			if len(ends) == 2 {
				to = number(ends[1])
				if to == 0 {
					to = 7
				}
			}
		}
		if from >= 0 && v >= from && v <= to && (v-from)%step == 0 {
			return true
		}
	}
	return false
}

// reading is what a wall clock and a calendar show.
type reading struct {
	minute, hour, day int
	month             time.Month
	weekday           time.Weekday
	lastDay           bool
}

func read(t time.Time) reading {
	year, month, day := t.Date()
	return reading{t.Minute(), t.Hour(), day, month, t.Weekday(), day >= 28 && day == time.Date(year, month+1, 0, 0, 0, 0, 0, time.UTC).Day()}
}

func (n *naive) matches(r reading) bool {
	if !n.minutes[r.minute] || !n.hours[r.hour] || !n.months[r.month] {
		return false
	}
	date, weekday := n.days[r.day] || n.last && r.lastDay, n.weekdays[r.weekday]
	return date && weekday || n.either && (date || weekday)
}

// walker is one expression of a walk.
type walker struct {
	*naive
	schedule Schedule
	next     time.Time // what Next said
}

// walk goes from one time to another in steps, looks at the wall clock at each, and compares all runs that it finds by
// doing so with Next. Sometimes, and often on the days around a change of the offset, it also asks Next between runs.
func walk(t *testing.T, zone *time.Location, from, to time.Time, step time.Duration) (runs int) {
	var all []*walker
	var byMinute [60][]*walker // those that may be due when the clock shows this minute
	for _, text := range expressions {
		w := &walker{naive: readNaively(text), schedule: parse(t, text, zone)}
		w.next = w.schedule.Next(time.Time{}, from.Add(-1))
		all = append(all, w)
		for minute := range byMinute {
			if w.minutes[minute] {
				byMinute[minute] = append(byMinute[minute], w)
			}
		}
	}
	newest := time.Time{} // the latest wall clock, as if it were UTC
	lastOffset, changed := 0, 0
	random := rand.New(rand.NewPCG(1, 2))
	for now := from; now.Before(to); now = now.Add(step) {
		_, offset := now.In(zone).Zone()
		wall := now.Add(time.Duration(offset) * time.Second).UTC()
		if wall.Second() != 0 {
			continue
		}
		if offset != lastOffset {
			lastOffset, changed = offset, 3*24*60
		}
		changed--
		due := byMinute[wall.Minute()]
		ask := random.IntN(2000) == 0 || changed > 0 && random.IntN(20) == 0
		if ask {
			due = all
		}
		var skipped []reading
		if gap := newest.Add(time.Minute); !newest.IsZero() && gap.Before(wall) {
			due = all
			for ; gap.Before(wall); gap = gap.Add(time.Minute) {
				skipped = append(skipped, read(gap))
			}
		}
		isNew := wall.After(newest)
		if isNew {
			newest = wall
		}
		shown := read(wall)
		for _, w := range due {
			due := w.matches(shown) && (isNew || w.anyHour) || !w.anyHour && slices.ContainsFunc(skipped, w.matches)
			if due != w.next.Equal(now) {
				t.Errorf("%q: at %v it is due: %v, but Next says %v", w.text, now.In(zone), due, w.next)
				return runs
			}
			if due {
				runs++
				w.next = w.schedule.Next(now, now)
			}
			if ask {
				between := now.Add(time.Duration(random.Int64N(int64(time.Minute))))
				if got := w.schedule.Next(now, between); !got.Equal(w.next) {
					t.Errorf("%q: after %v comes %v, want %v", w.text, between.In(zone), got, w.next)
					return runs
				}
			}
		}
	}
	for _, w := range all {
		if !w.next.IsZero() && w.next.Before(to) {
			t.Errorf("%q: not due at %v as Next says", w.text, w.next)
		}
	}
	return runs
}

// TestNextAgainstWalk compares Next with ten years of looking at the clock each minute; with one year, which has the
// changes that matter, if -short or -race is given.
func TestNextAgainstWalk(t *testing.T) {
	years := 10
	if testing.Short() || hasRace() {
		years = 1
	}
	for _, test := range []struct {
		zone  string
		first int
		one   int // the year to look at if there is time for one only
	}{
		{"Europe/Berlin", 2020, 2024},
		{"America/New_York", 2002, 2007},
		{"Australia/Lord_Howe", 2019, 2024},
		{"Pacific/Apia", 2005, 2011},
		{"UTC", 2020, 2024},
	} {
		t.Run(test.zone, func(t *testing.T) {
			t.Parallel()
			zone, first := zoneOf(t, test.zone), test.first
			if years == 1 {
				first = test.one
			}
			// Ten days more, to see the first of January as well.
			runs := walk(t, zone, time.Date(first, 1, 1, 0, 0, 0, 0, zone), time.Date(first+years, 1, 10, 0, 0, 0, 0, zone), time.Minute)
			t.Logf("%d runs of %d expressions", runs, len(expressions))
		})
	}
}

// TestNextAgainstWalkAtOddChanges does the same around changes at midnight, by odd seconds, or by a whole day.
func TestNextAgainstWalkAtOddChanges(t *testing.T) {
	for _, test := range []struct {
		zone, date string
		step       time.Duration
	}{
		{"America/Sao_Paulo", "2018-02-18", time.Minute},
		{"America/Sao_Paulo", "2018-11-04", time.Minute},
		{"Asia/Beirut", "2026-03-29", time.Minute},
		{"Asia/Beirut", "2026-10-25", time.Minute},
		{"Africa/Cairo", "2026-04-24", time.Minute},
		{"Africa/Cairo", "2026-10-30", time.Minute},
		{"Africa/Casablanca", "2026-02-15", time.Minute},
		{"America/Caracas", "2007-12-09", time.Minute},
		{"Asia/Kathmandu", "1986-01-01", time.Minute},
		{"Antarctica/Troll", "2026-03-29", time.Minute},
		{"Antarctica/Troll", "2026-10-25", time.Minute},
		{"Europe/Berlin", "2096-12-31", time.Minute},
		{"America/Juneau", "1867-10-18", time.Second},
		{"Asia/Manila", "1844-12-31", time.Second},
		{"Europe/Berlin", "1893-04-01", time.Second},
		{"Europe/Amsterdam", "1937-07-01", time.Second},
		{"Africa/Monrovia", "1972-01-07", time.Second},
	} {
		t.Run(test.zone+" "+test.date, func(t *testing.T) {
			t.Parallel()
			middle := at(t, test.date+"T00:00:00Z")
			walk(t, zoneOf(t, test.zone), middle.AddDate(0, 0, -2), middle.AddDate(0, 0, 3), test.step)
		})
	}
}

func hasRace() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

func FuzzParse(f *testing.F) {
	for _, text := range append(expressions, "", "@daily", "@every 1d12h", "CRON_TZ=Pacific/Apia 30 2 * * *", "TZ= @hourly", "* * * * * *",
		"0 0 L-3 * 5#2", "fri-mon ? 15W * */0", "\x00\n", "@every 9999999999h", "٣ * * * *") {
		f.Add(text, int64(1_774_746_000), int64(0))
	}
	berlin := zoneOf(f, "Europe/Berlin")
	f.Fuzz(func(t *testing.T, text string, unix, nominal int64) {
		s, err := Parse(text, berlin)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\r") {
				t.Errorf("the error has several lines: %q", err)
			}
			return
		}
		again := parse(t, strings.ReplaceAll(text, " ", "\t"), berlin)
		if again != s && !strings.Contains(text, "TZ=") { // a zone is read anew each time
			t.Errorf("%q is %v, and with tabs %v", text, s, again)
		}
		now := time.Unix(unix, 0)
		next := s.Next(time.Unix(nominal, 0), now)
		if !next.Equal(again.Next(time.Unix(nominal, 0), now)) {
			t.Errorf("%q differs after %v when it has tabs", text, now)
		}
		if next.IsZero() {
			return
		}
		if !next.After(now) || s.every == 0 && (next.Second() != 0 || next.Nanosecond() != 0) {
			t.Errorf("%q after %v: %v", text, now, next)
		}
	})
}

func BenchmarkNext(b *testing.B) {
	now := time.Date(2026, 7, 1, 12, 34, 56, 0, time.UTC)
	for _, text := range []string{"* * * * *", "0 3 * * *", "0 0 29 2 */7", "0 0 30 2 *", "@every 90s"} {
		for _, zone := range []string{"UTC", "Europe/Berlin"} {
			s := parse(b, text, zoneOf(b, zone))
			b.Run(strings.ReplaceAll(text, "/", "÷")+" "+zone, func(b *testing.B) {
				for b.Loop() {
					s.Next(now, now)
				}
			})
		}
	}
}
