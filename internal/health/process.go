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
func process() []notify.Stat {
	gauge := func(name, help string, value float64) notify.Stat {
		return notify.Stat{Name: name, Kind: "gauge", Help: help, Value: value}
	}
	samples := []metrics.Sample{{Name: "/sched/goroutines:goroutines"}, {Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(samples)
	stats := []notify.Stat{
		gauge("process_start_time_seconds", "When the process started, in seconds since 1970.", float64(startedAt.UnixMilli())/1000),
		gauge("go_goroutines", "Goroutines.", float64(samples[0].Value.Uint64())),
		gauge("go_memstats_alloc_bytes", "Memory of objects in the heap.", float64(samples[1].Value.Uint64())),
	}
	if pages, ok := procField("/proc/self/statm", 1); ok {
		stats = append(stats, gauge("process_resident_memory_bytes", "Resident memory.", pages*float64(os.Getpagesize())))
	}
	user, ok1 := procField("/proc/self/stat", 11)
	system, ok2 := procField("/proc/self/stat", 12)
	if ok1 && ok2 { // in ticks of 10 ms
		stats = append(stats, notify.Stat{Name: "process_cpu_seconds_total", Kind: "counter", Help: "Processor time, user and system.", Value: (user + system) / 100})
	}
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		stats = append(stats, gauge("process_open_fds", "Open file descriptors.", float64(len(fds)-1))) // one is the directory's own
	}
	return stats
}

// procField is a number in a file of /proc, counted from 0; in stat, whose second field is the program's name in parentheses,
// after that.
func procField(path string, n int) (value float64, ok bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	if i := bytes.LastIndexByte(data, ')'); i >= 0 {
		data = data[i+1:]
	}
	fields := bytes.Fields(data)
	if n >= len(fields) {
		return 0, false
	}
	value, err = strconv.ParseFloat(string(fields[n]), 64)
	return value, err == nil
}
