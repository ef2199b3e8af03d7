package webhook

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// reloading makes a handler that reads its settings again, with a clock that the test moves by the function.
func reloading(t *testing.T, address string, s Settings, reread func() (Settings, error)) (h *handler, lg *testkit.Logs, pass func(time.Duration)) {
	t.Helper()
	lg = testkit.NewLogs(t)
	made, err := New(address, s, reread, 1, notify.Setup{Log: lg.Logger(), LogPayloads: true})
	if err != nil {
		t.Fatal(err)
	}
	h = made.(*handler)
	var passed atomic.Int64
	began := time.Now()
	h.now = func() time.Time { return began.Add(time.Duration(passed.Load())) }
	return h, lg, func(d time.Duration) { passed.Add(int64(d)) }
}

// post sends one notification, which must succeed.
func post(t *testing.T, h *handler) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	if err := h.Handle(ctx, notify.Notification{Key: "1", Payload: "{}"}); err != nil {
		t.Fatal(err)
	}
}

// signedWith says with which of the one-letter secrets a request is signed.
func signedWith(req *http.Request, body, letters string) (with string) {
	for _, letter := range letters {
		mac := hmac.New(sha256.New, []byte(strings.Repeat(string(letter), 32)))
		fmt.Fprintf(mac, "%s.%s.%s", req.Header.Get("webhook-id"), req.Header.Get("webhook-timestamp"), body)
		if strings.Contains(req.Header.Get("webhook-signature"), base64.StdEncoding.EncodeToString(mac.Sum(nil))) {
			with += string(letter)
		}
	}
	return with
}

// strictReceiver demands a client certificate of an authority, and a signature, and knows what was used last.
type strictReceiver struct {
	*httptest.Server
	mu       sync.Mutex
	identity tls.Certificate // the server's own
	seen     map[string]bool // what was used: "secret a", "token a", "certificate SERIAL"
	refused  []string
}

func newStrictReceiver(t *testing.T, a *testkit.Authority) *strictReceiver {
	t.Helper()
	r := &strictReceiver{seen: map[string]bool{}}
	r.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		with := signedWith(req, string(body), "abc")
		r.mu.Lock()
		defer r.mu.Unlock()
		if with == "" {
			r.refused = append(r.refused, req.Header.Get("webhook-signature"))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		r.seen["secret "+with], r.seen["token "+req.Header.Get("Authorization")] = true, true
		r.seen["certificate "+req.TLS.PeerCertificates[0].SerialNumber.String()] = true
	}))
	clients := pool(t, a)
	r.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		return &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients, Certificates: []tls.Certificate{r.identity}}, nil
	}}
	r.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	r.identify(t, a)
	r.StartTLS()
	t.Cleanup(r.Close)
	return r
}

// identify gives the server a certificate of a.
func (r *strictReceiver) identify(t *testing.T, a *testkit.Authority) {
	t.Helper()
	cert, err := tls.X509KeyPair(pair(t, a))
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.identity = cert
}

// forget forgets what was used.
func (r *strictReceiver) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.seen)
}

// uses waits until all of what has been used.
func (r *strictReceiver) uses(t *testing.T, what ...string) {
	t.Helper()
	testkit.Eventually(t, fmt.Sprintf("%q are not all used", what), func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, w := range what {
			if !r.seen[w] {
				return false
			}
		}
		return true
	})
}

// rewrite writes a file as a careless tool does: in place, in two halves.
func rewrite(t *testing.T, path string, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, half := range [][]byte{data[:len(data)/2], data[len(data)/2:]} {
		if _, err := f.Write(half); err != nil {
			t.Fatal(err)
		}
	}
}

func serial(t *testing.T, cert, key []byte) string {
	t.Helper()
	c, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return "certificate " + c.Leaf.SerialNumber.String()
}

// TestRotationUnderLoad: secrets, a token, a client certificate, and the authority of the server's certificate
// are replaced while twenty post. Nothing fails, and nothing is restarted.
func TestRotationUnderLoad(t *testing.T) {
	t.Parallel()
	authority, next := testkit.NewAuthority(t), testkit.NewAuthority(t)
	r := newStrictReceiver(t, authority)
	secretFile, tokenFile, caFile := write(t, "secret", []byte(secretOf("a"))), write(t, "token", []byte("old")), authority.File()
	cert, key := pair(t, authority)
	certFile, keyFile := write(t, "cert", cert), write(t, "key", key)
	reread := func() (Settings, error) {
		s := Settings{CAFile: caFile, CertFile: certFile, KeyFile: keyFile}
		for path, value := range map[string]*string{secretFile: &s.Secret, tokenFile: &s.Authorization} {
			data, err := os.ReadFile(path)
			if err == nil && len(data) == 0 {
				err = errors.New("empty")
			}
			if err != nil {
				return s, err
			}
			*value = strings.TrimSpace(string(data))
		}
		return s, nil
	}
	s, err := reread()
	if err != nil {
		t.Fatal(err)
	}
	made, err := New(r.URL, s, reread, 20, notify.Setup{Log: testkit.NewLogs(t).Logger(), LogPayloads: true})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	made.(*handler).now = func() time.Time { return began.Add(20 * time.Since(began)) } // 20 looks a second

	ctx, stop := context.WithCancel(context.Background())
	var posting sync.WaitGroup
	defer posting.Wait()
	defer stop()
	var done, failed atomic.Int64
	for range 20 {
		posting.Go(func() {
			for ctx.Err() == nil {
				if err := made.Handle(context.Background(), notify.Notification{Payload: "{}", Serial: uint64(done.Add(1))}); err != nil && failed.Add(1) < 10 {
					t.Error(err)
				}
			}
		})
	}
	r.uses(t, "secret a", "token old", serial(t, cert, key))
	rewrite(t, secretFile, []byte(secretOf("a")+","+secretOf("b")))
	r.uses(t, "secret ab")
	cert, key = pair(t, authority)
	rewrite(t, certFile, cert)
	rewrite(t, keyFile, key)
	write(t, tokenFile, []byte("new"))
	r.uses(t, "token new", serial(t, cert, key))
	// The server gets a certificate of another authority; both are trusted meanwhile.
	both := append([]byte(testkit.ReadFile(t, authority.File())), testkit.ReadFile(t, next.File())...)
	rewrite(t, caFile, both)
	cert, key = pair(t, authority)
	write(t, certFile, cert)
	write(t, keyFile, key)
	r.uses(t, serial(t, cert, key)) // so it has been read again
	r.identify(t, next)
	write(t, caFile, []byte(testkit.ReadFile(t, next.File())))
	write(t, secretFile, []byte(secretOf("b")))
	r.uses(t, "secret b")
	stop()
	posting.Wait()
	r.forget()
	post(t, made.(*handler))
	r.uses(t, "secret b", "token new", serial(t, cert, key))
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.refused) > 0 || failed.Load() > 0 {
		t.Errorf("of %d requests %d failed; refused: %q", done.Load(), failed.Load(), r.refused)
	}
}

// A file is not used while somebody is writing it, even where what is there makes sense.
func TestHalfWrittenSettingsAreNotUsed(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, testkit.Accept)
	values := []string{"a", "b", "c", "c", "c"}
	looks := 0
	h, _, _ := reloading(t, r.URL, Settings{Secret: secretOf("a")}, func() (Settings, error) {
		looks++
		return Settings{Secret: secretOf(values[min(looks, len(values))-1])}, nil
	})
	for h.looked.Store(0); looks < len(values); h.looked.Store(0) {
		post(t, h)
		req, body := r.Last()
		if with := signedWith(req, body, "abc"); with != "a" && with != "c" || with == "a" && looks > 3 {
			t.Errorf("after %d looks: signed with %q", looks, with)
		}
	}
	if req, body := r.Last(); signedWith(req, body, "abc") != "c" {
		t.Error("the complete change is not used")
	}
}

// Settings that change at every look do not hold up a request.
func TestUnsettledSettingsAreLeftForLater(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, testkit.Accept)
	looks := 0
	h, lg, _ := reloading(t, r.URL, Settings{}, func() (Settings, error) {
		looks++
		return Settings{Authorization: fmt.Sprint(looks)}, nil
	})
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 {
		h.looked.Store(0)
		if err := h.Handle(ended, notify.Notification{}); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	if looks > 20 {
		t.Errorf("%d looks, although nobody waits for the result", looks)
	}
	h.looked.Store(0)
	looks = 0
	post(t, h)
	if req, _ := r.Last(); req.Header.Get("Authorization") != "" || looks > 10 || len(lg.All("the settings")) > 0 {
		t.Errorf("%q after %d looks", req.Header.Get("Authorization"), looks)
	}
}

// TestBrokenFilesKeepTheOldOnes: what cannot be read is told once, and the old settings stay until it can.
func TestBrokenFilesKeepTheOldOnes(t *testing.T) {
	t.Parallel()
	authority := testkit.NewAuthority(t)
	r := newStrictReceiver(t, authority)
	cert, key := pair(t, authority)
	s := Settings{Secret: secretOf("a"), CAFile: authority.File(), CertFile: write(t, "cert", cert), KeyFile: write(t, "key", key)}
	var secret string
	var rereadErr error
	h, lg, pass := reloading(t, r.URL, s, func() (Settings, error) {
		now := s
		now.Secret = secret
		return now, rereadErr
	})
	newCert, newKey := pair(t, authority)
	secret = s.Secret
	warnings, changes := 0, 0
	for _, c := range []struct {
		name   string
		change func()
		warns  bool
		uses   []string
	}{
		{"nothing", func() {}, false, []string{"secret a", serial(t, cert, key)}},
		{"only the settings are unreadable", func() { rereadErr = errors.New("WEBHOOK_SECRET_FILE: gone") }, true, []string{"secret a"}},
		{"they are readable again", func() { rereadErr = nil }, false, []string{"secret a"}},
		{"a certificate without its key", func() { write(t, s.CertFile, newCert) }, true, []string{"secret a", serial(t, cert, key)}},
		{"nothing again", func() {}, false, nil},
		{"cut", func() { rewrite(t, s.CertFile, newCert[:len(newCert)/2]) }, true, nil},
		{"gone", func() { os.Remove(s.CertFile) }, true, nil},
		{"gone, and a broken secret", func() { secret = "hunter2" }, true, nil},
		{"unreadable settings", func() { rereadErr = errors.New("WEBHOOK_SECRET_FILE: gone") }, true, nil},
		{"all is well, but a broken secret", func() {
			rereadErr = nil
			write(t, s.CertFile, newCert)
			write(t, s.KeyFile, newKey)
		}, true, []string{"secret a", serial(t, cert, key)}},
		{"a good secret", func() { secret = secretOf("b") }, false, []string{"secret b", serial(t, newCert, newKey)}},
	} {
		c.change()
		r.forget()
		for range 3 {
			pass(lookEvery)
			post(t, h)
		}
		if c.uses != nil {
			r.uses(t, c.uses...)
		}
		if c.warns {
			warnings++
		}
		if c.name == "a good secret" || c.name == "they are readable again" {
			changes++
		}
		if w, i := lg.All("the changed settings"), lg.All("the settings"); len(w) != warnings || len(i) != changes {
			t.Fatalf("%s: %d warnings, %d changes: %v %v", c.name, len(w), len(i), w, i)
		}
	}
	if strings.Contains(lg.String(), "hunter2") {
		t.Error("a secret is in the log")
	}
}

func TestSettingsAreLookedAtOnceASecond(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, testkit.Accept)
	looks := 0
	h, _, pass := reloading(t, r.URL, Settings{}, func() (Settings, error) {
		looks++
		return Settings{}, nil
	})
	for want := 1; want <= 3; want++ {
		for range 10 {
			post(t, h)
		}
		if looks != want {
			t.Errorf("%d looks in second %d", looks, want)
		}
		pass(lookEvery - 1)
		post(t, h)
		if looks != want {
			t.Errorf("%d looks before second %d has passed", looks, want)
		}
		pass(1)
	}
	looks = 0
	pass(-24 * time.Hour) // somebody has set the clock back
	post(t, h)
	post(t, h)
	if looks != 1 {
		t.Errorf("%d looks after the clock was set back", looks)
	}
}

// A new secret does not cost the connections; new certificates do, and the old ones are not left open.
func TestConnectionsOutliveANewSecretOnly(t *testing.T) {
	t.Parallel()
	var opened, closed atomic.Int64
	r := httptest.NewUnstartedServer(http.HandlerFunc(testkit.Accept))
	r.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			opened.Add(1)
		case http.StateClosed:
			closed.Add(1)
		}
	}
	r.Start()
	t.Cleanup(r.Close)
	s := Settings{Secret: secretOf("a"), CAFile: testkit.NewAuthority(t).File()}
	h, lg, pass := reloading(t, r.URL, s, func() (Settings, error) { return s, nil })
	post(t, h)
	s.Secret = secretOf("b")
	pass(lookEvery)
	post(t, h)
	if len(lg.All("the settings")) != 1 || opened.Load() != 1 {
		t.Errorf("%d connections after a new secret", opened.Load())
	}
	write(t, s.CAFile, []byte(testkit.ReadFile(t, testkit.NewAuthority(t).File())))
	pass(lookEvery)
	post(t, h)
	if len(lg.All("the settings")) != 2 || opened.Load() != 2 {
		t.Errorf("%d connections after a new authority", opened.Load())
	}
	testkit.Eventually(t, "the old connection is left open", func() bool { return closed.Load() == 1 })
}

// TestEachKindOfChangeIsSeen: what a file holds is what counts, however it was written and whatever it says of its age.
func TestEachKindOfChangeIsSeen(t *testing.T) {
	t.Parallel()
	path := write(t, "file", []byte("1234"))
	at := time.Now().Add(-time.Hour)
	before := contents(Settings{CAFile: path})
	for _, c := range []struct {
		name    string
		change  func()
		changes bool
	}{
		{"touched", func() {}, false}, // by Chtimes below
		{"written anew, as long as before", func() { rewrite(t, path, []byte("abcd")) }, true}, // by whom it hides its time
		{"replaced by the same", func() { write(t, path, []byte("abcd")) }, false},
		{"replaced", func() { write(t, path, []byte("efgh")) }, true},
		{"shortened", func() { rewrite(t, path, []byte("efg")) }, true},
		{"gone", func() { os.Remove(path) }, true},
	} {
		c.change()
		if err := os.Chtimes(path, at, at); err != nil && c.name != "gone" {
			t.Fatal(err)
		}
		after := contents(Settings{CAFile: path})
		if same := (view{files: after}).sameFiles(view{files: before}); same == c.changes {
			t.Errorf("%s: the same: %v", c.name, same)
		}
		before = after
	}
	if files := contents(Settings{CAFile: path, KeyFile: path}); (view{files: files, settings: Settings{CAFile: path}}).sameFiles(view{files: files}) {
		t.Error("another path with the same in it is the same file")
	}
}

// TestWhoComesDuringALookWaitsForIt: after a quiet weekend the old secret may be worth nothing, so none of the
// first requests may use it.
func TestWhoComesDuringALookWaitsForIt(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, testkit.Accept)
	looking := make(chan struct{})
	var once sync.Once
	h, _, _ := reloading(t, r.URL, Settings{Secret: secretOf("a")}, func() (Settings, error) {
		once.Do(func() { close(looking) })
		return Settings{Secret: secretOf("b")}, nil
	})
	var all sync.WaitGroup
	all.Go(func() { post(t, h) })
	<-looking
	for range 9 {
		all.Go(func() { post(t, h) })
	}
	all.Wait()
	if n := len(r.Requests()); n != 10 {
		t.Errorf("%d requests", n)
	}
	for _, req := range r.Requests() {
		if with := signedWith(req, "{}", "ab"); with != "b" {
			t.Fatalf("signed with %q", with)
		}
	}
}

// TestDiskThatHangsStopsNobodyElse: one request is lost in a read; the others go on as before.
func TestDiskThatHangsStopsNobodyElse(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, testkit.Accept)
	hang, looking := make(chan struct{}), make(chan struct{})
	h, _, _ := reloading(t, r.URL, Settings{}, func() (Settings, error) {
		close(looking)
		<-hang
		return Settings{}, nil
	})
	var lost sync.WaitGroup
	lost.Go(func() { post(t, h) })
	<-looking
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Handle(ended, notify.Notification{}); !errors.Is(err, context.Canceled) || h.looked.Load() != 0 {
		t.Errorf("%v; it has waited although its time was over", err)
	}
	post(t, h)
	if n := len(r.Requests()); n != 1 {
		t.Errorf("%d requests", n)
	}
	close(hang)
	lost.Wait()
}
