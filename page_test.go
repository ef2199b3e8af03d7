// feature: page

package main

import (
	"net"
	"testing"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// endSession has the server end the session that a program listens on, and waits until it hears again.
func endSession(t *testing.T, p *process) {
	t.Helper()
	_, port, _ := net.SplitHostPort(p.Wait(t, "listening", 1)["local"].(string))
	testkit.Exec(t, testkit.DB(t), "select pg_terminate_backend(pid) from pg_stat_activity where client_port = $1", port)
	p.Wait(t, "reconnected", 1)
}
