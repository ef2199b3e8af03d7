package notify

import (
	"errors"
	"time"
	"unicode/utf8"
)

// Permanent marks an error that no retry can mend. The nil error stays nil, here and below.
func Permanent(err error) error { return mark(err, marked{permanent: true}) }

// RetryAfter marks an error after which a retry should wait for d at least. A row of the outbox waits for up to an hour, a paused channel
// for up to a minute, and a plain channel or another doorbell for up to half a minute, since everything behind the notification
// waits with it.
func RetryAfter(err error, d time.Duration) error { return mark(err, marked{after: d}) }

// Unavailable marks an error that is not the notification's but the receiver's: it is away, and would have refused any other
// notification too. When several in a row fail so, an outbox or doorbell channel pauses: it spends no more attempts, and tries
// one at a time until one succeeds.
func Unavailable(err error) error { return mark(err, marked{unavailable: true}) }

// IsPermanent says whether err was marked by Permanent.
func IsPermanent(err error) bool {
	return find(err, func(m *marked) bool { return m.permanent }).permanent
}

// IsUnavailable says whether err was marked by Unavailable.
func IsUnavailable(err error) bool {
	return find(err, func(m *marked) bool { return m.unavailable }).unavailable
}

// RetryDelay returns how long a retry should wait at least, as RetryAfter has marked it; 0 where nothing has.
func RetryDelay(err error) time.Duration {
	return find(err, func(m *marked) bool { return m.after > 0 }).after
}

// The causes for which a handler's context ends.
var (
	ErrHandlerTimeout  = errors.New("HANDLER_TIMEOUT has passed")
	ErrShutdownTimeout = errors.New("SHUTDOWN_TIMEOUT has passed")
)

type marked struct {
	error
	permanent, unavailable bool
	after                  time.Duration
}

func (m *marked) Unwrap() error { return m.error }

func mark(err error, m marked) error {
	if err == nil {
		return nil
	}
	m.error = err
	return &m
}

// find returns the outermost mark in err that is as wanted, for an error may have several; if there is none, one that marks nothing.
func find(err error, wanted func(*marked) bool) *marked {
	var m *marked
	for errors.As(err, &m) {
		if wanted(m) {
			return m
		}
		err = m.error
	}
	return &marked{}
}

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
