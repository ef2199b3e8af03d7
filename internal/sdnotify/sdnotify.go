// Package sdnotify tells systemd how the service is, as sd_notify(3) describes.
package sdnotify

import (
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// supervisor is systemd, which has started this process. It is used by one goroutine and never blocks for long.
type supervisor struct {
	conn     net.Conn
	watchdog bool              // WatchdogSec is set
	told     map[string]string // the last value of each variable but WATCHDOG
	log      *slog.Logger
}

// Start connects to NOTIFY_SOCKET, if it is set, and returns how often, at the latest every preset, to call beat with how things
// stand. Nothing is sent when it is not set. The socket is open until the process ends.
func Start(preset time.Duration, lookup func(string) (string, bool), log *slog.Logger) (every time.Duration, beat func(listening, stopping bool, notReady error)) {
	path, _ := lookup("NOTIFY_SOCKET")
	if path == "" {
		return preset, func(bool, bool, error) {}
	}
	// A leading @ is an abstract socket to systemd and to package net alike.
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		log.Warn("cannot open NOTIFY_SOCKET", "socket", path, "error", err)
		return preset, func(bool, bool, error) {}
	}
	s := &supervisor{conn: conn, log: log, told: map[string]string{}}
	usec, _ := lookup("WATCHDOG_USEC")
	pid, _ := lookup("WATCHDOG_PID")
	if n, err := strconv.ParseInt(usec, 10, 64); err == nil && n > 0 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		s.watchdog = true
		preset = min(preset, time.Duration(n)*time.Microsecond/2) // twice as often as it asks for
	}
	return preset, s.beat
}

// beat feeds the watchdog and tells systemd what has changed. The select loop calls it, so that systemd restarts a loop that is
// stuck. listening is whether it has ever listened, notReady why it is not ready, or nil.
func (s *supervisor) beat(listening, stopping bool, notReady error) {
	message := ""
	if s.watchdog {
		message = "WATCHDOG=1\n"
	}
	tell := func(when bool, name, value string) {
		if when && s.told[name] != value {
			s.told[name] = value
			message += name + "=" + value + "\n"
		}
	}
	tell(listening, "READY", "1")
	tell(stopping, "STOPPING", "1")
	tell(notReady == nil, "STATUS", "listening")
	if notReady != nil {
		why := strings.ReplaceAll(notReady.Error(), "\n", "; ")                                // each line is a statement of its own
		tell(true, "STATUS", "not ready: "+strings.ToValidUTF8(why[:min(len(why), 1000)], "")) // a message that is too long is ignored whole
	}
	if message == "" {
		return
	}
	// It is a datagram to a local socket; a systemd that does not read must not hold up the loop.
	_ = s.conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := s.conn.Write([]byte(message)); err != nil {
		s.log.Debug("systemd does not take messages", "message", message, "error", err)
		clear(s.told) // so that all of it is said again
	}
}
