// Package schedule computes the next time of a crontab line.
package schedule

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Seconds of Unix times and wall clocks.
const (
	minute   = 60
	day      = 24 * 60 * minute
	lookBack = 2 * day            // more than any zone has ever repeated at once: Alaska repeated 24 hours in 1867
	horizon  = 41 * 366 * day     // 29 February falls on a given weekday at least once in 40 years
	farthest = 10_000_000_000_000 // from 1970, about 317,000 years: more than PostgreSQL can store
)

// Schedule is a parsed schedule. It never changes, so any goroutine may use it. The zero value never runs.
type Schedule struct {
	zone  *time.Location
	every time.Duration // 0: the fields below count

	// Bit n is set when the field allows the value n. Bit 0 of days stands for the last day of the month.
	minutes, hours, days, months, weekdays uint64

	eitherDay bool // days or weekdays must match, not both
	realClock bool // all hours are allowed, see Next
}

// shorthands stand alone; only @every, which is not among them, has an argument.
var shorthands = map[string]string{
	"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
	"@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}

// field says what one of the five fields may contain.
type field struct {
	name     string
	min, max int
	names    []string // of the values from min on
	allowed  string
}

var fields = [...]field{
	{"minute", 0, 59, nil, "0-59"},
	{"hour", 0, 23, nil, "0-23"},
	{"day of month", 1, 31, nil, "1-31, L"},
	{"month", 1, 12, strings.Fields("jan feb mar apr may jun jul aug sep oct nov dec"), "1-12, jan-dec"},
	{"day of week", 0, 7, strings.Fields("sun mon tue wed thu fri sat"), "0-7, sun-sat"},
}

// Parse reads a schedule: five crontab fields, @hourly, @daily, @midnight, @weekly, @monthly, @yearly, @annually, or @every with
// a duration from 1s to ten years such as 90s, 1h30m or 7d (a day is 24 hours). CRON_TZ=NAME or TZ=NAME before it sets the time
// zone; otherwise it is zone, or UTC if zone is nil.
//
// Fields are Vixie cron's: lists, ranges, steps (5/15 means 5-59/15), names in any case, 0 and 7 for Sunday. A date must match
// both day fields, but when neither begins with * one is enough. L is the last day of the month.
//
// The error is one line that says what is wrong and what is allowed. Parse may read the system's time zone files.
func Parse(text string, zone *time.Location) (Schedule, error) {
	if len(text) > 1000 {
		return Schedule{}, fmt.Errorf("schedule has %d bytes, at most 1000 are allowed", len(text))
	}
	if strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) && r != '\t' }) {
		return Schedule{}, fmt.Errorf("schedule %q has control characters, it must be one line of text, blanks and tabs", text)
	}
	s := Schedule{zone: cmp.Or(zone, time.UTC)}
	line := strings.Join(strings.Fields(text), " ")
	if after, ok := strings.CutPrefix(strings.TrimPrefix(line, "CRON_"), "TZ="); ok {
		name, rest, _ := strings.Cut(after, " ")
		var err error
		// Only Go knows the names "", for UTC, and Local, which differs from machine to machine.
		if s.zone, err = time.LoadLocation(name); err != nil || name == "" || name == "Local" {
			return Schedule{}, fmt.Errorf("time zone %q in CRON_TZ is unknown, expected a name such as Europe/Berlin or UTC", name)
		}
		line = rest
	}
	err := s.parseLine(line)
	return s, err
}

// parseLine reads words that are separated by single blanks.
func (s *Schedule) parseLine(line string) error {
	name, rest, _ := strings.Cut(line, " ")
	name = strings.ToLower(name)
	crontab, known := shorthands[name]
	switch {
	case line == "":
		return errors.New("schedule is empty, expected five fields such as 0 3 * * *, or @daily, or @every 90s")
	case name[0] != '@':
		return s.parseFields(line)
	case name == "@every":
		return s.parseEvery(rest)
	case name == "@reboot":
		return fmt.Errorf("%q is not supported: a restart is not a time; use five fields, @hourly or @every", name)
	case !known:
		return fmt.Errorf("%q is unknown, allowed are @hourly, @daily, @weekly, @monthly, @yearly and @every", name)
	case rest != "":
		return fmt.Errorf("%q is complete in itself, remove %q after it", name, rest)
	}
	return s.parseFields(crontab)
}

func (s *Schedule) parseEvery(text string) error {
	days, clock, err := uint64(0), text, error(nil)
	if before, after, ok := strings.Cut(text, "d"); ok {
		days, err = strconv.ParseUint(before, 10, 16)
		clock = "0s" + after
	}
	d, clockErr := time.ParseDuration(clock)
	s.every = time.Duration(days)*24*time.Hour + d
	if err != nil || clockErr != nil || s.every < time.Second || s.every > 3650*24*time.Hour {
		return fmt.Errorf("@every %q is not a duration from 1s to 3650d, such as 90s, 1h30m or 7d", text)
	}
	return nil
}

func (s *Schedule) parseFields(line string) error {
	words := strings.Split(line, " ")
	if len(words) != len(fields) {
		return fmt.Errorf("schedule %q has %d fields, expected 5: minute, hour, day of month, month, day of week (no seconds)",
			line, len(words))
	}
	for i, set := range []*uint64{&s.minutes, &s.hours, &s.days, &s.months, &s.weekdays} {
		var err error
		if *set, err = fields[i].parse(words[i]); err != nil {
			return fmt.Errorf("%s %q: %w; allowed are %s, *, lists (1,2), ranges (1-5) and steps (*/5), but no ?, # or W",
				fields[i].name, words[i], err, fields[i].allowed)
		}
	}
	s.weekdays |= s.weekdays >> 7 // 7 is Sunday too
	s.eitherDay = words[2][0] != '*' && words[4][0] != '*'
	s.realClock = s.hours == 1<<24-1
	return nil
}

// parse returns the set of values of a field, or what is wrong with it.
func (f field) parse(text string) (set uint64, err error) {
	for item := range strings.SplitSeq(strings.ToLower(text), ",") {
		if item == "l" && f.max == 31 {
			set |= 1
			continue
		}
		span, stepText, hasStep := strings.Cut(item, "/")
		lowText, highText, isRange := strings.Cut(span, "-")
		low, high, step := f.min, f.max, 1
		if span != "*" {
			low, err = f.value(lowText)
			if isRange && err == nil {
				high, err = f.value(highText)
			} else if !hasStep {
				high = low
			}
			if err != nil {
				return 0, err
			}
		}
		if f.max == 7 && high == 0 && low > 0 {
			high = 7 // fri-sun
		}
		if low > high {
			return 0, fmt.Errorf("%q runs backwards, write %s-%d,%d-%s", span, lowText, f.max, f.min, highText)
		}
		if hasStep {
			steps := field{min: 1, max: f.max - f.min + 1}
			if step, err = steps.value(stepText); err != nil {
				return 0, fmt.Errorf("step %q is not a number from 1 to %d", stepText, steps.max)
			}
		}
		for v := low; v <= high; v += step {
			set |= 1 << v
		}
	}
	return set, nil
}

func (f field) value(text string) (int, error) {
	if i := slices.Index(f.names, text); i >= 0 {
		return f.min + i, nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	switch {
	case text == "":
		return 0, errors.New("a value is missing")
	case err != nil && !errors.Is(err, strconv.ErrRange):
		return 0, fmt.Errorf("%q is unknown", text)
	case n < uint64(f.min) || n > uint64(f.max):
		return 0, fmt.Errorf("%s is out of range", text)
	}
	return int(n), nil
}

// Next returns the first time of the schedule after now, in its zone; the zero Time if there is none, as for 30 February. It
// takes microseconds, and less than one millisecond in the worst case.
//
// @every counts from nominal, the nominal time of the run before: nominal + k times the duration, for any integer k. If nominal
// is zero it counts from now. Fields do not look at nominal.
//
// Fields are about the zone's wall clock. If all hours are allowed, every minute that this clock shows counts, even if it shows
// it twice, and minutes that it skips are missed. Otherwise each wall-clock time runs once: when the clock first shows it, or in
// the first full minute after the gap if the clock skips it.
func (s Schedule) Next(nominal, now time.Time) time.Time {
	if s.zone == nil || now.Unix() > farthest || now.Unix() < -farthest {
		return time.Time{}
	}
	if s.every == 0 {
		return s.nextMatch(now.Unix())
	}
	if nominal.IsZero() {
		nominal = now
	}
	// Truncate counts from the zero Time, so these remainders are right where now.Sub(nominal) would overflow.
	since := now.Sub(now.Truncate(s.every)) - nominal.Sub(nominal.Truncate(s.every))
	if since < 0 {
		since += s.every
	}
	return now.Add(s.every - since).In(s.zone)
}

// nextMatch walks through the stretches of time in which the zone's offset stays the same, and ends one at now. It begins before
// now to learn which wall-clock times have come already.
func (s Schedule) nextMatch(now int64) time.Time {
	limit := now + horizon
	unseen := int64(math.MinInt64) // the first full minute that the wall clock has not shown or skipped
	for at := now - lookBack; at < limit; {
		offset, end := s.stretch(at, limit)
		if at <= now {
			end = min(end, now+1)
		}
		first, next := roundUp(at+offset, minute), roundUp(end+offset, minute) // full minutes of this and the next stretch
		if first < next {
			if s.realClock {
				unseen = first // neither repeats nor gaps matter
			}
			if at > now {
				if wall, ok := s.match(unseen, next); ok {
					return time.Unix(max(wall, first)-offset, 0).In(s.zone)
				}
			}
			unseen = max(unseen, next)
		}
		at = end
	}
	return time.Time{}
}

// stretch returns the zone's offset at the Unix time at, and a later time, at most limit, until which it is the same.
func (s Schedule) stretch(at, limit int64) (offset, end int64) {
	t := time.Unix(at, 0).In(s.zone)
	_, seconds := t.Zone()
	_, bound := t.ZoneBounds()
	if end = bound.Unix(); bound.IsZero() {
		end = limit
	} else if end <= at {
		end = roundUp(at+1, day) // as of Go 1.26 a year's bound is its 365th day, which has passed on 31 December of leap years
	}
	return int64(seconds), min(end, limit)
}

// match returns the first full minute in [from, end) that the fields allow. All three are wall-clock times, as the Unix times at
// which UTC shows them.
func (s Schedule) match(from, end int64) (int64, bool) {
	for midnight := roundUp(from+1, day) - day; midnight < end; midnight += day {
		t := time.Unix(midnight, 0).UTC()
		year, month, date := t.Date()
		if s.months>>month&1 == 0 {
			midnight = time.Date(year, month+1, 0, 0, 0, 0, 0, time.UTC).Unix() // the last day of this month
			continue
		}
		inMonth := s.days>>date&1 == 1 || s.days&1 == 1 && t.AddDate(0, 0, 1).Day() == 1
		inWeek := s.weekdays>>t.Weekday()&1 == 1
		if !(inMonth && inWeek || s.eitherDay && (inMonth || inWeek)) {
			continue
		}
		start := max(from-midnight, 0) / minute
		for hour, since := start/60, start%60; hour < 24; hour, since = hour+1, 0 {
			if later := s.minutes >> since << since; s.hours>>hour&1 == 1 && later != 0 {
				wall := midnight + (hour*60+int64(bits.TrailingZeros64(later)))*minute
				return wall, wall < end
			}
		}
	}
	return 0, false
}

// roundUp returns the first multiple of unit that is not before n.
func roundUp(n, unit int64) int64 { return n + ((-n)%unit+unit)%unit }
