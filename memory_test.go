// feature: execcmd

//go:build linux

package main

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestMemoryIsBounded: half a gigabyte for 32 channels whose handlers hang takes less than 128 MB, whether queues drop or block.
func TestMemoryIsBounded(t *testing.T) {
	extra(t)
	for _, overflow := range []string{"drop", "block"} {
		t.Run(overflow, func(t *testing.T) {
			t.Parallel()
			server := testkit.OwnServer(t)
			db := testkit.Open(t, server.DSN())
			var channels, entries []string
			for i := range 32 {
				channels = append(channels, fmt.Sprintf("hung%d", i))
				entries = append(entries, channels[i]+"=exec:sleep 600")
			}
			p := runProgram(t, fast(server.DSN(), strings.Join(entries, ","), vars{"OVERFLOW": overflow, "HANDLER_TIMEOUT": "10m"}))
			p.Wait(t, "listening", 1)
			for i, channel := range channels {
				testkit.Exec(t, db, `select pg_notify($1, lpad(n::text, 7900, 'x')) from generate_series(1, 2000) n`, channel)
				if overflow == "drop" && i >= 2 { // the first two find room
					p.Wait(t, "queue full: new notifications are dropped", i-1)
				}
			}
			if overflow == "block" {
				p.Wait(t, "queue full: reading stopped", 1)
			}
			if peak := peakMemory(t, p.cmd.Process.Pid); peak > 128<<20 {
				t.Errorf("it took %d MB", peak>>20)
			} else {
				t.Logf("it took %d MB", peak>>20)
			}
		})
	}
}

// peakMemory is the most memory that a process has had resident.
func peakMemory(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		t.Fatalf("no VmHWM in %s", status)
	}
	kB, _ := strconv.Atoi(string(m[1]))
	return kB << 10
}
