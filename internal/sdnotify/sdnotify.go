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

// supervisor is systemd, if it has started this process; otherwise nobody, and nothing is sent. It is used by one goroutine and
// never blocks for long.
type supervisor struct {
	conn     net.Conn
	watchdog time.Duration // WatchdogSec; 0 when there is none
	status   string        // as told last
	ready    bool          // has been told
	stopping bool          // has been told
	log      *slog.Logger
}

// Start connects to NOTIFY_SOCKET, if it is set, and returns how often, at the latest every preset, to call beat with how things
// stand. Nothing is sent when it is not set. The socket is open until the process ends.
func Start(preset time.Duration, lookup func(string) (string, bool), log *slog.Logger) (every time.Duration, beat func(listening, stopping bool, notReady error)) {
	s := connect(lookup, log)
	if s.watchdog > 0 {
		preset = min(preset, s.watchdog/2) // twice as often as it asks for
	}
	return preset, s.beat
}

func connect(lookup func(string) (string, bool), log *slog.Logger) *supervisor {
	s := &supervisor{log: log}
	path, _ := lookup("NOTIFY_SOCKET")
	if path == "" {
		return s
	}
	// A leading @ is an abstract socket to systemd and to package net alike.
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		log.Warn("cannot open NOTIFY_SOCKET", "socket", path, "error", err)
		return s
	}
	s.conn = conn
	usec, _ := lookup("WATCHDOG_USEC")
	pid, _ := lookup("WATCHDOG_PID")
	if n, err := strconv.ParseInt(usec, 10, 64); err == nil && n > 0 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		s.watchdog = time.Duration(n) * time.Microsecond
	}
	return s
}

// beat feeds the watchdog and tells systemd what has changed. The select loop calls it, so that systemd restarts a loop that is
// stuck. listening is whether it has ever listened, notReady why it is not ready, or nil.
func (s *supervisor) beat(listening, stopping bool, notReady error) {
	if s.conn == nil {
		return
	}
	message := ""
	if s.watchdog > 0 {
		message = "WATCHDOG=1\n"
	}
	if listening && !s.ready {
		s.ready = true
		message += "READY=1\n"
	}
	if stopping && !s.stopping {
		s.stopping = true
		message += "STOPPING=1\n"
	}
	status := "listening"
	if notReady != nil {
		status = "not ready: " + strings.ReplaceAll(notReady.Error(), "\n", "; ") // each line is a statement of its own
	}
	if status != s.status {
		s.status = status
		message += "STATUS=" + status + "\n"
	}
	if message != "" {
		s.tell(message)
	}
}

func (s *supervisor) tell(message string) {
	// It is a datagram to a local socket; a systemd that does not read must not hold up the loop.
	_ = s.conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := s.conn.Write([]byte(message)); err != nil {
		s.log.Debug("systemd does not take messages", "message", message, "error", err)
	}
}
