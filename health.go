package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// healthServer answers /livez, /readyz and /metrics, all from memory.
type healthServer struct {
	server *http.Server
	ln     net.Listener
	served chan struct{}
}

// startHealth serves on addr, if it is not empty, until what it returns is called.
func startHealth(addr string, l *Listener, log *slog.Logger) (closeHealth func(), err error) {
	if addr == "" {
		return func() {}, nil
	}
	h, err := serveHealth(addr, l, log)
	if err != nil {
		return nil, err
	}
	return h.close, nil
}

// serveHealth listens on addr and serves on a goroutine of its own until close.
func serveHealth(addr string, l *Listener, log *slog.Logger) (*healthServer, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("HTTP_ADDR: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", answer(l.alive)) // GET includes HEAD
	mux.HandleFunc("GET /readyz", answer(l.deafness))
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = w.Write(l.metrics())
	})
	h := &healthServer{
		// Nothing that is asked needs more; a slow or silent client holds little for a short while.
		server: &http.Server{
			Handler:           mux,
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       5 * time.Second,
			WriteTimeout:      10 * time.Second,
			IdleTimeout:       time.Minute,
			MaxHeaderBytes:    8 << 10,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		},
		ln:     ln,
		served: make(chan struct{}),
	}
	go func() {
		defer close(h.served)
		_ = h.server.Serve(ln) // ends with ErrServerClosed, and with nothing else that can be helped
	}()
	log.Info("serving health", "addr", ln.Addr().String())
	return h, nil
}

// close stops serving and waits for the answers under way, for a second at most.
func (h *healthServer) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if h.server.Shutdown(ctx) != nil {
		h.server.Close()
	}
	<-h.served
}

// askHealth is the flag -healthy: it asks the listener of the same environment
// whether it is ready, for a container's health check, where there is no curl.
func askHealth(lookup func(string) (string, bool), stdout io.Writer) int {
	addr, _ := lookup("HTTP_ADDR")
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port == "" {
		fmt.Fprintln(stdout, "HTTP_ADDR is not set: the listener cannot be asked")
		return exitFailed
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	client := http.Client{Timeout: 3 * time.Second}
	res, err := client.Get("http://" + net.JoinHostPort(host, port) + "/readyz")
	if err != nil {
		fmt.Fprintln(stdout, "no answer:", err)
		return exitFailed
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(res.Body, 4<<10))
	fmt.Fprint(stdout, string(text))
	if res.StatusCode != http.StatusOK {
		return exitFailed
	}
	return exitOK
}

// answer makes 200 of "" and 503 of a reason.
func answer(reason func() string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		text := reason()
		if text != "" {
			w.WriteHeader(http.StatusServiceUnavailable)
		} else {
			text = "ok"
		}
		_, _ = io.WriteString(w, text+"\n")
	}
}

// metrics is everything worth watching, in the Prometheus text format.
func (l *Listener) metrics() []byte {
	var m exposition
	s := l.published.Load()
	if s == nil {
		return nil
	}
	m.gauge("pglistener_connected", "1 while a connection to the server is open.", bit(s.connected))
	m.gauge("pglistener_ready", "1 while /readyz answers 200.", bit(l.deafness() == ""))
	m.gauge("pglistener_last_byte_age_seconds", "Time since the last byte came from the server.", time.Since(l.dialer.lastHeard()).Seconds())
	m.counter("pglistener_gaps_total", "Times in which notifications may have been lost.", float64(s.gaps))
	m.counter("pglistener_gap_seconds_total", "Length of all gaps together.", s.gapTotal.Seconds())
	m.counter("pglistener_reconnects_total", "Connections made after the first.", float64(s.reconnects))
	m.counter("pglistener_connection_attempts_failed_total", "Attempts to connect and LISTEN that failed.", float64(s.failedAttempts))
	m.gauge("pglistener_probe_round_trip_seconds", "How long the last probe took from a second connection to this listener.", s.roundTrip.Seconds())
	m.counter("pglistener_probes_lost_total", "Probes that did not come back.", float64(s.probesLost))
	m.gauge("pglistener_notification_queue_usage_ratio", "How full the server's NOTIFY queue was at the last probe, 0 to 1.", s.queueUsage)

	channels := slices.Sorted(maps.Keys(l.workers))
	waiting, all := map[string]int{}, map[string]counts{}
	for _, c := range channels {
		waiting[c], all[c] = l.workers[c].stats()
	}
	perChannel := func(name, help string, value func(counts) int) {
		m.family(name, "counter", help)
		for _, c := range channels {
			m.sample(name, float64(value(all[c])), "channel", c)
		}
	}
	perChannel("pglistener_notifications_received_total", "Notifications that arrived.", func(c counts) int { return c.received })
	perChannel("pglistener_notifications_handled_total", "Notifications whose handler succeeded.", func(c counts) int { return c.handled })
	perChannel("pglistener_notifications_dropped_total", "Notifications discarded because the queue was full.", func(c counts) int { return c.dropped })
	perChannel("pglistener_notifications_given_up_total", "Notifications and catch-ups that failed at every attempt.", func(c counts) int { return c.gaveUp })
	perChannel("pglistener_catch_ups_total", "Catch-ups, doorbell runs included, that succeeded.", func(c counts) int { return c.caughtUp })
	perChannel("pglistener_handler_failures_total", "Calls of a handler that failed.", func(c counts) int { return c.failed })
	perChannel("pglistener_handler_retries_total", "Failed calls that were to be repeated.", func(c counts) int { return c.retried })

	const queue = "pglistener_queue_length"
	m.family(queue, "gauge", "Notifications that wait for their handler.")
	for _, c := range channels {
		m.sample(queue, float64(waiting[c]), "channel", c)
	}

	const duration = "pglistener_handler_duration_seconds"
	m.family(duration, "histogram", "Length of the calls of a handler.")
	for _, c := range channels {
		h := all[c].seconds
		sum := uint64(0)
		for i, bound := range histogramBounds {
			sum += h.buckets[i]
			m.sample(duration+"_bucket", float64(sum), "channel", c, "le", formatFloat(bound.Seconds()))
		}
		m.sample(duration+"_bucket", float64(h.count), "channel", c, "le", "+Inf")
		m.sample(duration+"_sum", h.sum.Seconds(), "channel", c)
		m.sample(duration+"_count", float64(h.count), "channel", c)
	}

	l.handlerStats(&m)

	m.family("pglistener_build_info", "gauge", "1, with the version as a label.")
	m.sample("pglistener_build_info", 1, "version", buildVersion())
	return m.Bytes()
}

// handlerStats adds what handlers say of themselves: a family must stand in one
// place, so the channels are gathered under it.
func (l *Listener) handlerStats(m *exposition) {
	type sample struct {
		channel string
		Stat
	}
	families := map[string][]sample{}
	for channel, h := range l.handlers {
		if h, ok := h.(Meter); ok {
			for _, s := range h.Stats() {
				families[s.Name] = append(families[s.Name], sample{channel, s})
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(families)) {
		samples := families[name]
		slices.SortFunc(samples, func(a, b sample) int { return strings.Compare(a.channel, b.channel) })
		m.family(name, samples[0].Kind, samples[0].Help)
		for _, s := range samples {
			m.sample(name, s.Value, "channel", s.channel)
		}
	}
}

func bit(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// exposition writes the Prometheus text format.
type exposition struct{ bytes.Buffer }

func (m *exposition) gauge(name, help string, value float64) {
	m.family(name, "gauge", help)
	m.sample(name, value)
}

func (m *exposition) counter(name, help string, value float64) {
	m.family(name, "counter", help)
	m.sample(name, value)
}

func (m *exposition) family(name, kind, help string) {
	fmt.Fprintf(m, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

var labelEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// sample writes one line; labels are names and values by turns.
func (m *exposition) sample(name string, value float64, labels ...string) {
	m.WriteString(name)
	for i := 0; i < len(labels); i += 2 {
		m.WriteString(map[bool]string{true: "{", false: ","}[i == 0])
		m.WriteString(labels[i] + `="` + labelEscaper.Replace(labels[i+1]) + `"`)
	}
	if len(labels) > 0 {
		m.WriteString("}")
	}
	m.WriteString(" " + formatFloat(value) + "\n")
}

func formatFloat(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }
