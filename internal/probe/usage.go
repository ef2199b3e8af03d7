package probe

import (
	"log/slog"

	"github.com/pglistener/pglistener/internal/notify"
)

// Usage watches how full the server's NOTIFY queue is: when it is full, every transaction that notifies fails (DESIGN fact 13).
type Usage struct {
	Bounds [2]float64 // when to warn, and when to raise an error; 0 to 1
	level  int        // how many of them were exceeded the last time
}

// Tell logs when a usage has crossed a bound. fullChannel is the channel whose full queue has stopped this listener from reading,
// or "": it says who is to blame.
func (u *Usage) Tell(usage float64, fullChannel string, log *slog.Logger) {
	exceeded := 0
	for _, bound := range u.Bounds {
		if usage > bound {
			exceeded++
		}
	}
	if exceeded == u.level {
		return
	}
	u.level = exceeded
	attrs := []any{"usage", usage, "cause", "another listener does not read"}
	if fullChannel != "" {
		attrs = []any{"usage", usage, "cause", "this listener: the queue of a channel is full", "channel", fullChannel}
	}
	switch exceeded {
	case 0:
		log.Info("the server's NOTIFY queue has emptied", "usage", usage)
	case 1:
		log.Warn("the server's NOTIFY queue is filling up; when it is full every transaction that notifies fails", attrs...)
	default:
		log.Error("the server's NOTIFY queue is more than half full; when it is full every transaction that notifies fails", attrs...)
	}
}

// Stats are the figures of a Status, and how full the server's queue was.
func (s Status) Stats(usage float64) []notify.Stat {
	return []notify.Stat{
		{Name: "pglistener_probe_round_trip_seconds", Kind: "gauge", Help: "How long the last probe took from a second connection to this listener.", Value: s.RoundTrip.Seconds()},
		{Name: "pglistener_probes_lost_total", Kind: "counter", Help: "Probes that did not come back.", Value: float64(s.Lost)},
		{Name: "pglistener_notification_queue_usage_ratio", Kind: "gauge", Help: "How full the server's NOTIFY queue was at the last probe, 0 to 1.", Value: usage},
	}
}
