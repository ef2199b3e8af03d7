package schedule

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
	_ "time/tzdata" // an image from scratch has no zones
)

// Settings are the variables of schedules.
type Settings struct {
	Text string `env:"SCHEDULE" only:"channel" usage:"when a channel runs by itself: five crontab fields, @hourly to @yearly or @every 90s, after CRON_TZ=ZONE if need be"`
}

// Validate returns why the schedule cannot be read. A zone in TZ that is unknown is a problem even without one: the schedules of rows
// would be in UTC, which is what Go takes for it in silence.
func (s Settings) Validate() (problems []error) {
	tz := strings.TrimPrefix(os.Getenv("TZ"), ":")
	_, missing := os.Stat(tz) // it may name a file
	if _, err := time.LoadLocation(tz); err != nil && (tz[0] != '/' || missing != nil) {
		problems = append(problems, fmt.Errorf("TZ: %q is unknown, expected a name such as Europe/Berlin", tz))
	}
	if _, err := Next(s.Text, time.Time{}, time.Now()); s.Text != "" && err != nil {
		problems = append(problems, fmt.Errorf("SCHEDULE: %w", err))
	}
	return problems
}

// Clock returns a Clock of a schedule that has been validated.
func (s Settings) Clock() *Clock {
	parsed, _ := Parse(s.Text, zone())
	return newClock(parsed.Next, func() time.Time { return time.Now().Round(0) }) // without the monotonic clock
}

// Clock says when the times of a schedule come, by this machine's clock. Times that were missed, because the clock was set
// forward or the machine slept, are made up for once; none is repeated when it is set back, unless it was wrong by more than three hours.
// It is used by one goroutine at a time.
type Clock struct {
	times func(nominal, now time.Time) time.Time
	wall  func() time.Time
	next  time.Time
	asked time.Time // when Due last was
}

func newClock(times func(nominal, now time.Time) time.Time, wall func() time.Time) *Clock {
	return &Clock{times: times, wall: wall, next: times(wall(), wall())}
}

// lookAgain is how long to wait at most before the clock is looked at again: it may have been set.
const lookAgain = 20 * time.Second

// Wait returns for how long to wait until Due is asked.
func (c *Clock) Wait() time.Duration {
	if c.next.IsZero() { // it never comes
		return time.Hour
	}
	return max(0, min(c.next.Sub(c.wall()), lookAgain))
}

// Due says whether a time has come, and which.
func (c *Clock) Due() (nominal time.Time, due bool) {
	now := c.wall()
	if now.Before(c.asked.Add(-3 * time.Hour)) { // it was wrong: to wait until it is as late again would be to run nothing
		c.next = c.times(now, now)
	}
	if c.asked = now; c.next.IsZero() || now.Before(c.next) {
		return time.Time{}, false
	}
	nominal = c.next
	c.next = c.times(nominal, now)
	return nominal, true
}

// Next returns the next time after now of a schedule in the default zone; nominal is that of the run before. That it never comes is an
// error.
func Next(text string, nominal, now time.Time) (time.Time, error) {
	s, err := Parse(text, zone())
	if next := s.Next(nominal, now); err != nil || !next.IsZero() {
		return next, err
	}
	return time.Time{}, errors.New("it never comes")
}

// zone is what schedules without one are in: TZ, else UTC.
func zone() *time.Location {
	if os.Getenv("TZ") == "" {
		return time.UTC
	}
	return time.Local // which Go makes of TZ
}
