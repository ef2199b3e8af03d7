package notify

import (
	"errors"
	"time"
	"unicode/utf8"
)

// Permanent marks an error that no retry can mend. The nil error stays nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &marked{error: err, permanent: true}
}

// RetryAfter marks an error after which a retry should wait for d at least. The
// outbox waits for up to an hour, a plain channel or a doorbell for up to half a
// minute, since everything behind the notification waits with it.
func RetryAfter(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return &marked{error: err, after: d}
}

// IsPermanent says whether err was marked by Permanent.
func IsPermanent(err error) bool {
	var m *marked
	return errors.As(err, &m) && m.permanent
}

// RetryDelay returns how long a retry should wait at least, as RetryAfter has
// marked it; 0 where nothing has.
func RetryDelay(err error) time.Duration {
	var m *marked
	if errors.As(err, &m) {
		return m.after
	}
	return 0
}

// The causes for which a handler's context ends.
var (
	ErrHandlerTimeout  = errors.New("HANDLER_TIMEOUT has passed")
	ErrShutdownTimeout = errors.New("SHUTDOWN_TIMEOUT has passed")
)

type marked struct {
	error
	permanent bool
	after     time.Duration
}

func (m *marked) Unwrap() error { return m.error }

// Cut cuts a text for an error to at most n bytes, not within a character.
func Cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
