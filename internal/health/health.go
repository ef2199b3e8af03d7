// Package health answers /livez, /readyz and /metrics, all from memory.
package health

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
)

// Settings are the variables of health.
type Settings struct {
	Addr string `env:"HTTP_ADDR" usage:"address for /livez, /readyz and /metrics, such as :8080; if empty, nothing listens"`
}

// Validate returns why the address cannot be served.
func (s Settings) Validate() []error {
	if _, port, err := net.SplitHostPort(s.Addr); s.Addr != "" && (err != nil || port == "") {
		return []error{fmt.Errorf("HTTP_ADDR: %q is not an address to serve; write :8080 or 127.0.0.1:8080", s.Addr)}
	}
	return nil
}

// Source is what is asked. Its methods may be called from any goroutine and do not block.
type Source interface {
	Alive() error // why the loop does not turn, or nil
	Ready() error // why a notification that is sent now might not be heard, or nil
	notify.Meter
}

// Server serves until Close. Its Addr is the address that is served, with the port that was chosen for port 0.
type Server struct {
	http.Server
	served sync.WaitGroup
}

// Serve serves the address of the settings on a goroutine of its own, or does nothing if there is none. root answers GET /,
// version is shown as a metric's label, more adds figures. The Server is never nil.
func Serve(at Settings, root http.Handler, source Source, version string, log *slog.Logger, more ...notify.Meter) (*Server, error) {
	s := &Server{}
	if at.Addr == "" {
		return s, nil
	}
	ln, err := net.Listen("tcp", at.Addr)
	if err != nil {
		return s, fmt.Errorf("HTTP_ADDR: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", root)
	mux.HandleFunc("GET /livez", answer(source.Alive)) // GET includes HEAD
	mux.HandleFunc("GET /readyz", answer(source.Ready))
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		stats := append(source.Stats(), process()...)
		for _, m := range more {
			stats = append(stats, m.Stats()...)
		}
		_, _ = w.Write(Exposition(append(stats, notify.Stat{
			Name: "pglistener_build_info", Kind: "gauge", Help: "1, with the version as a label.", Labels: []string{"version", version}, Value: 1,
		})))
	})
	// No question needs more; a slow or silent client holds little, for a short while.
	s.Addr, s.Handler, s.MaxHeaderBytes = ln.Addr().String(), mux, 8<<10
	s.ReadTimeout, s.WriteTimeout, s.IdleTimeout = 5*time.Second, 10*time.Second, time.Minute // the first is for the header too
	s.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	s.served.Go(func() { _ = s.Serve(ln) }) // ends with ErrServerClosed, and with nothing else that can be helped
	log.Info("serving health", "addr", s.Addr)
	return s, nil
}

// Close stops serving and waits for the answers under way, for a second at most.
func (s *Server) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.Shutdown(ctx) != nil {
		s.Server.Close()
	}
	s.served.Wait()
}

// Ask asks the listener that serves HTTP_ADDR for a path, for a container's health check, where there is no curl. It prints the
// answer, and returns the exit code: 0 when it was 200, else 1. It blocks for three seconds at most.
func Ask(lookup func(string) (string, bool), path string, stdout io.Writer) (code int) {
	addr, _ := lookup("HTTP_ADDR")
	host, port, err := net.SplitHostPort(strings.Trim(addr, "'\" ")) // as docker's --env-file keeps them
	if err != nil || port == "" {
		fmt.Fprintln(stdout, "HTTP_ADDR is not set: the listener cannot be asked")
		return 1
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	// The transport has no proxy: HTTP_PROXY is for the receivers.
	res, err := (&http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}}).Get("http://" + net.JoinHostPort(host, port) + path)
	if err != nil {
		fmt.Fprintln(stdout, "no answer:", err)
		return 1
	}
	defer res.Body.Close()
	_, _ = io.CopyN(stdout, res.Body, 4<<10) // ends with an EOF that is no error here
	if res.StatusCode != http.StatusOK {
		return 1
	}
	return 0
}

// answer makes 200 of nil and 503 of an error.
func answer(ask func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		text := "ok"
		if err := ask(); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			text = err.Error()
		}
		_, _ = io.WriteString(w, text+"\n")
	}
}
