package main

import "time"

// histogramBounds are the upper bounds of all buckets but the last, which has none.
var histogramBounds = [...]time.Duration{
	time.Millisecond, 5 * time.Millisecond, 25 * time.Millisecond, 100 * time.Millisecond,
	500 * time.Millisecond, time.Second, 5 * time.Second, 10 * time.Second, 30 * time.Second, time.Minute,
}

// histogram counts durations. Its owner locks.
type histogram struct {
	buckets [len(histogramBounds)]uint64 // each without those before it
	count   uint64
	sum     time.Duration
}

func (h *histogram) observe(d time.Duration) {
	h.count++
	h.sum += d
	for i, bound := range histogramBounds {
		if d <= bound {
			h.buckets[i]++
			return
		}
	}
}
