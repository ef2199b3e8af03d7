package schedule

import (
	"fmt"
	"os"
	"time"
	_ "time/tzdata" // an image from scratch has no zones
)

// Settings are the variables of schedules.
type Settings struct {
	Text string `env:"SCHEDULE" only:"channel" usage:"when a channel runs by itself: five crontab fields, @hourly to @yearly or @every 90s, after CRON_TZ=ZONE if need be"`
}

// Validate returns why the schedule cannot be read.
func (s Settings) Validate() []error {
	if _, err := Parse(s.Text, zone()); s.Text != "" && err != nil {
		return []error{fmt.Errorf("SCHEDULE: %w", err)}
	}
	return nil
}

// Times returns Next of a schedule that has been validated.
func (s Settings) Times() func(nominal, now time.Time) time.Time {
	parsed, _ := Parse(s.Text, zone())
	return parsed.Next
}

// Next returns the next time after now of a schedule in the default zone; nominal is that of the run before. The zero
// time means never.
func Next(text string, nominal, now time.Time) (time.Time, error) {
	s, err := Parse(text, zone())
	return s.Next(nominal, now), err
}

// zone is what schedules without one are in: TZ, else UTC.
func zone() *time.Location {
	if os.Getenv("TZ") == "" {
		return time.UTC
	}
	return time.Local // which Go makes of TZ
}
