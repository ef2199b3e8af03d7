package health

import (
	"bytes"
	"os"
	"runtime/metrics"
	"strconv"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
)

var startedAt = time.Now()

// process are the figures of the process and of Go's runtime that every dashboard has, under the names that Prometheus's own
// clients give them.
func process() (stats []notify.Stat) {
	add := func(known bool, name, kind, help string, value float64) {
		if known {
			stats = append(stats, notify.Stat{Name: name, Kind: kind, Help: help, Value: value})
		}
	}
	samples := []metrics.Sample{{Name: "/sched/goroutines:goroutines"}, {Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(samples)
	add(true, "process_start_time_seconds", "gauge", "When the process started, in seconds since 1970.", float64(startedAt.UnixMilli())/1000)
	add(true, "go_goroutines", "gauge", "Goroutines.", float64(samples[0].Value.Uint64()))
	add(true, "go_memstats_alloc_bytes", "gauge", "Memory of objects in the heap.", float64(samples[1].Value.Uint64()))
	pages, ok := procField("/proc/self/statm", 1)
	add(ok, "process_resident_memory_bytes", "gauge", "Resident memory.", pages*float64(os.Getpagesize()))
	user, ok1 := procField("/proc/self/stat", 11)
	system, ok2 := procField("/proc/self/stat", 12)
	add(ok1 && ok2, "process_cpu_seconds_total", "counter", "Processor time, user and system.", (user+system)/100) // in ticks of 10 ms
	fds, err := os.ReadDir("/proc/self/fd")
	add(err == nil, "process_open_fds", "gauge", "Open file descriptors.", float64(len(fds)-1)) // one is the directory's own
	return stats
}

// procField is a number in a file of /proc, counted from 0; in stat, whose second field is the program's name in parentheses,
// after that.
func procField(path string, n int) (value float64, ok bool) {
	data, _ := os.ReadFile(path) // empty where there is none
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if n >= len(fields) {
		return 0, false
	}
	value, err := strconv.ParseFloat(string(fields[n]), 64)
	return value, err == nil
}
