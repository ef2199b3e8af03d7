package webhook

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/env"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/retry"
)

// How files are read again when they change.
const (
	lookEvery    = time.Second
	settled      = 100 * time.Millisecond // a change that stands for so long is complete
	settleTries  = 5                      // then the next look goes on
	lookPatience = time.Second            // how long the others wait for the one that looks
)

// view is what one look at the settings and their files saw.
type view struct {
	settings Settings
	problem  string               // why the settings could not be read again
	files    [3][sha256.Size]byte // what settings.files hold
}

// show returns what may be shown of an answer: its beginning, without the secrets.
func (p *prepared) show(answer string) string {
	return notify.Cut(p.shield.Replace(strings.TrimSpace(answer)), shownAnswer)
}

// prepare makes v's settings ready for use. old, which may be nil, is what is in use: its connections are kept if the
// certificates are the same. The error is the first problem.
func (h *handler) prepare(v view, old *prepared) (*prepared, error) {
	if v.problem != "" {
		return nil, errors.New(v.problem)
	}
	p, problems := v.settings.parse()
	if len(problems) > 0 {
		return nil, problems[0]
	}
	if h.basic != "" {
		if p.header["Authorization"] != nil {
			return nil, errors.New("WEBHOOK_AUTHORIZATION: the URL has a user too; set one of them")
		}
		p.header["Authorization"] = []string{h.basic}
	}
	// A shorter one would blank ordinary words.
	p.hidden = slices.DeleteFunc(append(p.hidden, h.hidden...), func(s string) bool { return len(s) < 4 })
	// Where one begins with another, the longer one comes first.
	slices.SortFunc(p.hidden, func(a, b string) int { return len(b) - len(a) })
	var pairs []string
	for _, s := range p.hidden {
		pairs = append(pairs, s, "[hidden]")
	}
	p.from, p.shield = v, strings.NewReplacer(pairs...)
	if old != nil && v.sameFiles(old.from) {
		p.transport = old.transport
	} else {
		p.transport = newTransport(p.tls, h.concurrency)
	}
	return p, nil
}

// newTransport makes the connections of a handler.
func newTransport(config *tls.Config, concurrency int) *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.TLSClientConfig = config
	t.MaxIdleConns, t.MaxIdleConnsPerHost = 0, concurrency // 0: no other limit
	t.MaxResponseHeaderBytes = 64 << 10
	t.DisableCompression = true // answers are short, or not read
	// Without pings all requests of HTTP/2 would use a connection that a firewall has forgotten, each until its time limit.
	t.HTTP2 = &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second}
	return t
}

// current returns what to make a request with. If the last look at the files is a second old it looks first; if somebody else is
// looking it waits for that, but not for long: a disk that hangs must not stop the requests.
func (h *handler) current(ctx context.Context) *prepared {
	p := h.inUse.Load()
	if h.reread == nil && p.from.settings.files() == [3]string{} || time.Duration(h.now().UnixNano()-h.looked.Load()).Abs() < lookEvery {
		return p
	}
	select {
	case h.looking <- struct{}{}:
		if time.Duration(h.now().UnixNano()-h.looked.Load()).Abs() >= lookEvery { // or the clock was set back
			h.look(ctx)
			h.looked.Store(h.now().UnixNano())
		}
		<-h.looking
	case <-time.After(lookPatience):
		h.looked.Store(h.now().UnixNano())
	case <-ctx.Done():
	}
	return h.inUse.Load()
}

// look puts changed settings into use. Those that cannot be read are logged, and the old ones stay. It is called with the token
// of looking.
func (h *handler) look(ctx context.Context) {
	v := h.see()
	if v == h.seen {
		return
	}
	// Whoever writes a file, or a certificate and its key, may be in the middle of it.
	for tries, before := 0, v; ; before = v {
		if tries++; tries > settleTries || !retry.Sleep(ctx, settled) {
			return
		}
		if v = h.see(); v == before {
			break
		}
	}
	h.seen = v
	old := h.inUse.Load()
	p, err := h.prepare(v, old)
	if err != nil {
		h.setup.Log.Warn("the changed settings of the webhook cannot be used; the old ones stay in use", "error", err)
		return
	}
	h.inUse.Store(p)
	if old.transport != p.transport {
		old.transport.CloseIdleConnections() // a request that is under way keeps its own
	}
	h.setup.Log.Info("the settings of the webhook have changed")
}

// see looks at the settings and their files.
func (h *handler) see() (v view) {
	v.settings = h.inUse.Load().from.settings
	if h.reread != nil {
		s, err := h.reread()
		if err == nil {
			v.settings = s
		} else {
			v.problem = err.Error()
		}
	}
	v.files = contents(v.settings)
	return v
}

func contents(s Settings) (all [3][sha256.Size]byte) {
	for i, path := range s.files() {
		data, _ := env.ReadFile(path, largestFile) // a missing one is found when it is used
		all[i] = sha256.Sum256(data)
	}
	return all
}

// sameFiles says whether the files are the same, under the same names.
func (v view) sameFiles(w view) bool {
	return v.files == w.files && v.settings.files() == w.settings.files()
}
