//go:build linux

package health

import (
	"os"
	"regexp"
	"strconv"
	"syscall"
	"testing"
)

// TestProcessFigures compares the figures with those that the kernel has elsewhere, in other units.
func TestProcessFigures(t *testing.T) {
	t.Parallel()
	used := func() float64 {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			t.Fatal(err)
		}
		return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
	}
	for used() < 0.3 { // seconds, much more than the ticks in which it is served
	}
	got := map[string]float64{}
	for _, s := range process() {
		got[s.Name] = s.Value
	}
	if got, want := got["process_cpu_seconds_total"], used(); got < want/2 || got > want*1.5 {
		t.Errorf("%v s of processor time, and getrusage says %v s", got, want)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		t.Fatalf("no VmRSS in %s", status)
	}
	kB, _ := strconv.ParseFloat(string(m[1]), 64)
	if got, want := got["process_resident_memory_bytes"], kB*1024; got < want/2 || got > want*2 {
		t.Errorf("%v bytes resident, and /proc/self/status says %v", got, want)
	}
}
