package webhook

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// secretOf is a good secret, of one letter.
func secretOf(letter string) string {
	return "whsec_" + base64.StdEncoding.EncodeToString([]byte(strings.Repeat(letter, 32)))
}

// write writes a file of a test, by a rename as tools that rotate do, and returns its path.
func write(t *testing.T, path string, data []byte) string {
	t.Helper()
	if !filepath.IsAbs(path) {
		path = filepath.Join(t.TempDir(), path)
	}
	err := os.WriteFile(path+".new", data, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// pair is a certificate for 127.0.0.1 from a, and its key, as PEM.
func pair(t *testing.T, a *testkit.Authority) (cert, key []byte) {
	t.Helper()
	c, k := a.Issue(&x509.Certificate{
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return testkit.CertPEM(c), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

func TestSettingsAreChecked(t *testing.T) {
	t.Parallel()
	cert, key := pair(t, testkit.NewAuthority(t))
	_, otherKey := pair(t, testkit.NewAuthority(t))
	file := func(data ...byte) string { return write(t, "file", data) }
	certFile, keyFile := file(cert...), file(key...)
	cut := file(append(slices.Clone(cert), cert[:len(cert)/2]...)...)
	for name, c := range map[string]struct {
		s    Settings
		want []string // the beginnings of the errors
	}{
		"nothing":           {Settings{}, nil},
		"everything":        {Settings{secretOf("a") + ", " + secretOf("b") + "\n", "Bearer%20x", "A:1,B:2", certFile, certFile, keyFile}, nil},
		"no whsec":          {Settings{Secret: "hunter2"}, []string{"WEBHOOK_SECRET: must be whsec_"}},
		"too short":         {Settings{Secret: "whsec_aHVudGVyMg=="}, []string{"WEBHOOK_SECRET: must be whsec_"}},
		"too long":          {Settings{Secret: "whsec_" + base64.StdEncoding.EncodeToString(make([]byte, 65))}, []string{"WEBHOOK_SECRET: must be whsec_"}},
		"the second":        {Settings{Secret: secretOf("a") + ",whsec_hunter2"}, []string{"WEBHOOK_SECRET: number 2 of 2 must be whsec_"}},
		"no secret at all":  {Settings{Secret: " , "}, []string{"WEBHOOK_SECRET: holds no secret"}},
		"newline":           {Settings{Authorization: "Bearer%20hunter2%0d%0aX:y"}, []string{"WEBHOOK_AUTHORIZATION: a header cannot hold a line break"}},
		"escape":            {Settings{Authorization: "Bearer hunter2%zz"}, []string{"WEBHOOK_AUTHORIZATION: a % must be followed"}},
		"blank":             {Settings{Authorization: "%20"}, []string{"WEBHOOK_AUTHORIZATION: the value is empty"}},
		"empty":             {Settings{Authorization: " "}, []string{"WEBHOOK_AUTHORIZATION: the value is empty"}},
		"no colon":          {Settings{Headers: "A:1,hunter2"}, []string{"WEBHOOK_HEADERS: number 2 is not Name:value"}},
		"not a name":        {Settings{Headers: "hunter2 x:1"}, []string{"WEBHOOK_HEADERS: number 1 is not Name:value"}},
		"no name":           {Settings{Headers: ":hunter2"}, []string{"WEBHOOK_HEADERS: number 1 is not Name:value"}},
		"no value":          {Settings{Headers: "A:1;hunter2: "}, []string{"WEBHOOK_HEADERS: number 2: the value is empty"}},
		"value escape":      {Settings{Headers: "A:hunter2%"}, []string{"WEBHOOK_HEADERS: number 1: a % must be followed"}},
		"value newline":     {Settings{Headers: "A:hunter2%0A"}, []string{"WEBHOOK_HEADERS: number 1: a header cannot hold"}},
		"twice":             {Settings{Headers: "hunter2:1\nHunter2:2"}, []string{"WEBHOOK_HEADERS: number 2 has the name of one before it"}},
		"id":                {Settings{Headers: "webhook-id:hunter2"}, []string{"WEBHOOK_HEADERS: Webhook-Id cannot be set here"}},
		"signature":         {Settings{Headers: "WEBHOOK-SIGNATURE:hunter2"}, []string{"WEBHOOK_HEADERS: Webhook-Signature cannot be set here"}},
		"ours":              {Settings{Headers: "pglistener-attempt:hunter2"}, []string{"WEBHOOK_HEADERS: Pglistener-Attempt cannot be set here"}},
		"host":              {Settings{Headers: "host:hunter2"}, []string{"WEBHOOK_HEADERS: Host cannot be set here"}},
		"content type":      {Settings{Headers: "content-type:hunter2"}, []string{"WEBHOOK_HEADERS: Content-Type cannot be set here"}},
		"transfer encoding": {Settings{Headers: "transfer-encoding:hunter2"}, []string{"WEBHOOK_HEADERS: Transfer-Encoding cannot be set here"}},
		"authorization":     {Settings{Headers: "authorization:hunter2"}, []string{"WEBHOOK_HEADERS: Authorization cannot be set here: it comes from the payload, the URL, the connection or WEBHOOK_AUTHORIZATION"}},
		"missing":           {Settings{CAFile: "/nowhere/ca.pem"}, []string{"WEBHOOK_CA_FILE: open /nowhere/ca.pem: "}},
		"a directory":       {Settings{CAFile: t.TempDir()}, []string{"WEBHOOK_CA_FILE: "}},
		"endless":           {Settings{CAFile: "/dev/zero"}, []string{"WEBHOOK_CA_FILE: \"/dev/zero\" is larger than 4194304 bytes"}},
		"not PEM":           {Settings{CAFile: file([]byte("hunter2")...)}, []string{"WEBHOOK_CA_FILE: of the 0 certificates in PEM in "}},
		"only a key":        {Settings{CAFile: keyFile}, []string{"WEBHOOK_CA_FILE: of the 0 certificates in PEM in "}},
		"cut":               {Settings{CAFile: cut}, []string{"WEBHOOK_CA_FILE: of the 2 certificates in PEM in "}},
		"no key":            {Settings{CertFile: certFile}, []string{"WEBHOOK_CERT_FILE, WEBHOOK_KEY_FILE: a client certificate needs both"}},
		"no certificate":    {Settings{KeyFile: keyFile}, []string{"WEBHOOK_CERT_FILE, WEBHOOK_KEY_FILE: a client certificate needs both"}},
		"missing key":       {Settings{CertFile: certFile, KeyFile: "/nowhere/key.pem"}, []string{"WEBHOOK_CERT_FILE, WEBHOOK_KEY_FILE: open /nowhere/key.pem: "}},
		"another's key":     {Settings{CertFile: certFile, KeyFile: file(otherKey...)}, []string{"WEBHOOK_CERT_FILE, WEBHOOK_KEY_FILE: tls: private key does not match"}},
		"a broken key":      {Settings{CertFile: certFile, KeyFile: file([]byte("-----BEGIN PRIVATE KEY-----\naHVudGVyMg==\n-----END PRIVATE KEY-----\n")...)}, []string{"WEBHOOK_CERT_FILE, WEBHOOK_KEY_FILE: tls: failed to parse private key"}},
		"all of them":       {Settings{"hunter2", "hunter2%", "hunter2", "/nowhere", "/nowhere", "/nowhere"}, []string{"WEBHOOK_SECRET: ", "WEBHOOK_AUTHORIZATION: ", "WEBHOOK_HEADERS: ", "WEBHOOK_CA_FILE: ", "WEBHOOK_CERT_FILE, WEBHOOK_KEY_FILE: "}},
	} {
		problems := c.s.Validate()
		ok := len(problems) == len(c.want)
		for i := range problems {
			text := problems[i].Error()
			ok = ok && strings.HasPrefix(text, c.want[i]) && !strings.Contains(text, "hunter2") && !strings.Contains(text, "aHVudGVyMg") && !strings.Contains(text, "\n")
		}
		if !ok {
			t.Errorf("%s: want %q, got %v", name, c.want, problems)
		}
		_, err := New("http://localhost/", c.s, nil, 1, notify.Setup{})
		if (err == nil) != (len(c.want) == 0) || err != nil && err.Error() != problems[0].Error() {
			t.Errorf("%s: New says %v", name, err)
		}
	}
}

func TestSettingsAreSent(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, testkit.Accept)
	at := time.Date(2026, 3, 1, 12, 0, 0, 123_456_000, time.FixedZone("", 3600))
	n := notify.Notification{Key: "1", Payload: "{}", CreatedAt: at, RunAt: at.Add(time.Hour)}
	for name, c := range map[string]struct {
		user string
		s    Settings
		n    notify.Notification
		want map[string]string
	}{
		"nothing": {"", Settings{}, notify.Notification{}, map[string]string{
			"User-Agent": "pglistener", "Authorization": "", "Webhook-Signature": "", "Pglistener-Created-At": "", "Pglistener-Run-At": "",
		}},
		"times":                     {"", Settings{}, n, map[string]string{"Pglistener-Created-At": "2026-03-01T11:00:00.123456Z", "Pglistener-Run-At": "2026-03-01T12:00:00.123456Z"}},
		"a token":                   {"", Settings{Authorization: "Bearer%20hunter%252"}, n, map[string]string{"Authorization": "Bearer hunter%2"}},
		"from a file":               {"", Settings{Authorization: "Bearer hunter2"}, n, map[string]string{"Authorization": "Bearer hunter2"}},
		"a user":                    {"u%40x:p%2Fw@", Settings{}, n, map[string]string{"Authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte("u@x:p/w"))}},
		"a user without a password": {"key@", Settings{}, n, map[string]string{"Authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte("key:"))}},
		"headers": {"", Settings{Headers: "x-api-key:hunter2,X-List:a%2C%20b%3B;\nuser-agent: mine \n"}, n, map[string]string{
			"X-Api-Key": "hunter2", "X-List": "a, b;", "User-Agent": "mine", "Content-Type": "application/json",
		}},
	} {
		h := hook(t, strings.Replace(r.URL, "http://", "http://"+c.user, 1), c.s)
		if err := h.Handle(t.Context(), c.n); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		req, _ := r.Last()
		for header, want := range c.want {
			if got := strings.Join(req.Header.Values(header), "|"); got != want {
				t.Errorf("%s: %s is %q, want %q", name, header, got, want)
			}
		}
	}
}

func TestEachSecretSigns(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, testkit.Accept)
	signatures := func(secret string) string {
		h := hook(t, r.URL, Settings{Secret: secret})
		h.now = func() time.Time { return time.Unix(1614265330, 0) }
		if err := h.Handle(t.Context(), notify.Notification{Key: "1", Payload: "{}"}); err != nil {
			t.Fatal(err)
		}
		req, _ := r.Last()
		return req.Header.Get("webhook-signature")
	}
	a, b := signatures(secretOf("a")), signatures(secretOf("b"))
	for _, separator := range []string{",", " ", ", ", "\n", "\r\n"} {
		if both := signatures(secretOf("a") + separator + secretOf("b")); a == b || both != a+" "+b {
			t.Errorf("%q: %q, want %q and %q", separator, both, a, b)
		}
	}
}

func TestOneAuthorization(t *testing.T) {
	t.Parallel()
	_, err := New("http://hunter2@localhost/", Settings{Authorization: "Bearer hunter2"}, nil, 1, notify.Setup{})
	if err == nil || err.Error() != "WEBHOOK_AUTHORIZATION: the URL has a user too; set one of them" {
		t.Error(err)
	}
}

// TestNoSecretIsShown: whatever a receiver answers, even our own request, no error and no log line has a secret.
func TestNoSecretIsShown(t *testing.T) {
	t.Parallel()
	secrets := []string{"alpha1", "bravo2", "charlie3", "delta4", "echo5", "foxtrot6", "golf7", "hotel8", "india9", secretOf("a")[6:]}
	secrets = append(secrets, base64.StdEncoding.EncodeToString([]byte("user-alpha1:password-bravo2")))
	cert, key := pair(t, testkit.NewAuthority(t))
	secrets = append(secrets, strings.Split(string(key), "\n")[1])
	keyFile := write(t, "key", key)

	repeats := testkit.NewReceiver(t, func(w http.ResponseWriter, req *http.Request) {
		user, password, _ := req.BasicAuth()
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, "unknown token %s ", strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer "))
		fmt.Fprintf(w, "%s %s %s %s %s %q %s", user, password, req.Header.Get("X-Key"), req.Header.Get("Authorization"), req.URL, req.URL.Query(), secretOf("a"))
	})
	// Not HTTP: it sends back what it is sent, from that text on.
	echoes := func(from string) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for c, err := l.Accept(); err == nil; c, err = l.Accept() {
				b := make([]byte, 64<<10)
				n, _ := c.Read(b)
				if _, rest, ok := strings.Cut(string(b[:n]), from); ok {
					_, _ = io.WriteString(c, from+rest)
				}
				c.Close()
			}
		}()
		return "http://" + l.Addr().String()
	}
	for _, payloads := range []bool{true, false} {
		for name, address := range map[string]string{
			"repeats": repeats.URL, "echoes": echoes("POST"), "echoes the path": echoes("/rota"), "echoes the payload": echoes("payload-"),
			"refused": "http://" + testkit.FreshAddress(t),
			"no TLS":  strings.Replace(repeats.URL, "http:", "https:", 1), "no such host": "https://receiver.invalid", "bad port": "http://127.0.0.1:99999",
		} {
			for _, user := range []string{"user-alpha1:password-bravo2@", ""} {
				s := Settings{Secret: secretOf("a"), Headers: "X-Key:header-golf7", CertFile: write(t, "cert", cert), KeyFile: keyFile}
				if user == "" {
					s.Authorization = "Bearer token-foxtrot6"
				}
				lg := testkit.NewLogs(t)
				h, err := New(strings.Replace(address, "://", "://"+user, 1)+"/rota/rota-india9/path-charlie3?a=query-delta4&b=slash%2Fecho5", s, nil, 1, notify.Setup{Log: lg.Logger(), LogPayloads: payloads})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
				defer cancel()
				err = h.Handle(ctx, notify.Notification{Payload: "payload-hotel8"})
				if err == nil {
					t.Fatalf("%s: no error", name)
				}
				_, checked := h.(notify.Checker).Check(ctx)
				text := fmt.Sprintf("%v %+v %s %v", err, err, lg.String(), checked)
				for _, secret := range secrets {
					// A payload may stand in a log unless LOG_PAYLOADS=false.
					if strings.Contains(text, secret) && (secret != "hotel8" || !payloads) {
						t.Errorf("%s: %q is shown: %s", name, secret, text)
					}
				}
			}
		}
	}
}

// TestShortWordsAreNotHidden: the words of a URL are taken for secrets, but a short one would blank what the receiver says.
func TestShortWordsAreNotHidden(t *testing.T) {
	t.Parallel()
	r := testkit.NewReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, "no such id: hook")
	})
	h, err := New(r.URL+"/id/no/hook", Settings{}, nil, 1, notify.Setup{Log: testkit.NewLogs(t).Logger(), LogPayloads: true})
	if err != nil {
		t.Fatal(err)
	}
	if err = h.Handle(t.Context(), notify.Notification{}); err == nil || !strings.Contains(err.Error(), "no such id: [hidden]") {
		t.Error(err)
	}
}

const innerEnv = "WEBHOOK_TEST_INNER"

// TestProxy runs itself again, for net/http reads the variables of a proxy once.
func TestProxy(t *testing.T) {
	t.Parallel()
	if want := os.Getenv(innerEnv); want != "" {
		h := hook(t, "http://receiver.invalid/path", Settings{})
		err := h.Handle(t.Context(), notify.Notification{Payload: "hello"})
		text, checked := h.Check(t.Context())
		fmt.Println(err, text, checked)
		return
	}
	run := func(proxy string) string {
		cmd := exec.Command(os.Args[0], "-test.run=^TestProxy$")
		cmd.Env = append(os.Environ(), innerEnv+"=yes", "HTTP_PROXY="+proxy, "http_proxy=", "NO_PROXY=", "no_proxy=")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	proxied := make(chan string, 10)
	proxy := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		proxied <- req.Method + " " + req.URL.String() + " " + string(body)
	}))
	t.Cleanup(proxy.Close)
	u, _ := url.Parse(proxy.URL)
	if out := run("http://user:hunter2@" + u.Host); !strings.Contains(out, "<nil> http://receiver.invalid would be reached through the proxy "+u.Host+" <nil>") {
		t.Error(out)
	}
	if got := <-proxied; got != "POST http://receiver.invalid/path hello" || len(proxied) > 0 {
		t.Errorf("%q, and %d more", got, len(proxied))
	}
	away := testkit.FreshAddress(t)
	if out := run("http://user:hunter2@" + away); strings.Contains(out, "hunter2") || strings.Count(out, "dial tcp "+away) != 2 {
		t.Error(out)
	}
}
