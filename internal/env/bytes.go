package env

import (
	"errors"
	"strconv"
	"strings"
)

// Bytes is a variable that says how much: a whole number with KB, MB or GB behind it, each 1,024 times the one before.
type Bytes int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Bytes) UnmarshalText(text []byte) error {
	for i, unit := range []string{"KB", "MB", "GB"} {
		number, ok := strings.CutSuffix(strings.ToUpper(string(text)), unit)
		n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
		if ok && err == nil && n >= 0 && n < 1<<20 {
			*b = Bytes(n << (10 * (i + 1)))
			return nil
		}
	}
	return errors.New("not a size")
}
