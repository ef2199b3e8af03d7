package main

import (
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// supervisor tells systemd how the service is, as sd_notify(3) describes. The
// zero supervisor, of a process that systemd did not start, tells nobody.
type supervisor struct {
	conn     net.Conn
	watchdog time.Duration // WatchdogSec; 0 when there is none
	status   string        // as told last
	ready    bool
	log      *slog.Logger
}

// newSupervisor connects to NOTIFY_SOCKET, if it is set. lookup is os.LookupEnv but for tests.
func newSupervisor(lookup func(string) (string, bool), log *slog.Logger) *supervisor {
	s := &supervisor{log: log}
	path, _ := lookup("NOTIFY_SOCKET")
	if path == "" {
		return s
	}
	// A leading @ is an abstract socket to systemd and to package net alike.
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		log.Warn("systemd cannot be told anything", "socket", path, "error", err)
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

// beatInterval is how often beat is to be called: twice as often as the watchdog asks, at least.
func (s *supervisor) beatInterval() time.Duration {
	if s.watchdog > 0 {
		return min(beatInterval, s.watchdog/2)
	}
	return beatInterval
}

// beat feeds the watchdog and tells what has changed. The loop calls it, so that a loop
// that is stuck is restarted. deaf is why nothing is heard, or "".
func (s *supervisor) beat(listening bool, deaf string) {
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
	status := "listening"
	if deaf != "" {
		status = "not ready: " + strings.ReplaceAll(deaf, "\n", "; ") // each line is a statement of its own
	}
	if status != s.status {
		s.status = status
		message += "STATUS=" + status + "\n"
	}
	s.tell(message)
}

// stopping says that the service has begun to stop.
func (s *supervisor) stopping() { s.tell("STOPPING=1\n") }

func (s *supervisor) tell(message string) {
	if s.conn == nil || message == "" {
		return
	}
	// A datagram to a local socket; systemd that does not read must not hold up the loop.
	_ = s.conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := s.conn.Write([]byte(message)); err != nil {
		s.log.Debug("systemd was not told", "message", message, "error", err)
	}
}
