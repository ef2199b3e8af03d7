package webhook

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
)

// Settings are the variables of a webhook.
type Settings struct {
	Secret        string `env:"WEBHOOK_SECRET" file:"true" usage:"signs POSTs as Standard Webhooks do: whsec_...; of several, separated by commas, each signs"`
	Authorization string `env:"WEBHOOK_AUTHORIZATION" file:"true" usage:"the header Authorization, such as Bearer%20TOKEN; %20 is a blank, %25 is %"`
	Headers       string `env:"WEBHOOK_HEADERS" file:"true" usage:"more headers, Name:value, separated by commas; in a value %20 is a blank, %2C a comma, %25 is %"`
	CAFile        string `env:"WEBHOOK_CA_FILE" usage:"PEM file of the authorities to trust instead of the system's"`
	CertFile      string `env:"WEBHOOK_CERT_FILE" usage:"PEM file of the client certificate, with those between it and its authority"`
	KeyFile       string `env:"WEBHOOK_KEY_FILE" usage:"PEM file of the client certificate's private key"`
}

// files are the paths of the files that the handler itself reads; empty where there is none.
func (s Settings) files() [3]string { return [...]string{s.CAFile, s.CertFile, s.KeyFile} }

// Validate returns everything that is wrong with s, one error a variable, beginning with its name. No error
// shows a secret.
func (s Settings) Validate() []error {
	_, problems := s.parse()
	return problems
}

// parsed is what Settings mean.
type parsed struct {
	signers []*signer
	header  http.Header // that each request has
	tls     *tls.Config // nil: nothing is set
	hidden  []string    // the secrets, in the forms in which a receiver may repeat them
}

// parse reads s, and the files that it names.
func (s Settings) parse() (p parsed, problems []error) {
	p.header = http.Header{"User-Agent": {"pglistener"}}
	report := func(name string, err error) {
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", name, err))
		}
	}
	report("WEBHOOK_SECRET", p.addSecrets(s.Secret))
	report("WEBHOOK_AUTHORIZATION", p.addAuthorization(s.Authorization))
	report("WEBHOOK_HEADERS", p.addHeaders(s.Headers))
	switch {
	case s.CertFile != "" && s.KeyFile == "":
		report("WEBHOOK_CERT_FILE", errors.New("WEBHOOK_KEY_FILE is not set; a client certificate needs both"))
	case s.CertFile == "" && s.KeyFile != "":
		report("WEBHOOK_KEY_FILE", errors.New("WEBHOOK_CERT_FILE is not set; a client certificate needs both"))
	case s.CertFile != "":
		name, err := p.addClientCertificate(s.CertFile, s.KeyFile)
		report(name, err)
	}
	if s.CAFile != "" {
		report("WEBHOOK_CA_FILE", p.addAuthorities(s.CAFile))
	}
	return p, problems
}

// separates says whether r stands between two of several values: one can write a comma in any file of
// variables, blanks and newlines only where they need no quotes.
func separates(r rune) bool { return strings.ContainsRune(", \t\r\n", r) }

// addSecrets reads secrets as the specification has them: whsec_ and the key in base64.
func (p *parsed) addSecrets(list string) error {
	secrets := strings.FieldsFunc(list, separates)
	if list != "" && len(secrets) == 0 {
		return errors.New("holds no secret; unset it to send without a signature")
	}
	for i, s := range secrets {
		encoded, ok := strings.CutPrefix(s, "whsec_")
		key, err := base64.StdEncoding.DecodeString(encoded)
		if !ok || err != nil || len(key) < 24 || len(key) > 64 {
			which := ""
			if len(secrets) > 1 {
				which = fmt.Sprintf("number %d of %d ", i+1, len(secrets))
			}
			return errors.New(which + "must be whsec_ and 24 to 64 bytes in base64; make one: echo whsec_$(head -c 32 /dev/urandom | base64)")
		}
		p.signers = append(p.signers, newSigner(key))
		p.hide(encoded)
	}
	return nil
}

// addAuthorization reads the value of the header Authorization.
func (p *parsed) addAuthorization(value string) error {
	if value == "" {
		return nil
	}
	value, err := headerValue(value)
	if err != nil {
		return err
	}
	p.header["Authorization"] = []string{value}
	p.hide(value, value[strings.LastIndexByte(value, ' ')+1:])
	return nil
}

// taken are the headers that are made for each request, and those that only the connection may set.
var taken = map[string]string{
	"Authorization": "has a variable of its own, WEBHOOK_AUTHORIZATION", "Host": "comes from the URL",
	"Content-Type": "comes from the payload", "Content-Length": "comes from the payload", "Content-Encoding": "comes from the payload",
	"Connection": "is the connection's", "Keep-Alive": "is the connection's", "Proxy-Authorization": "is the proxy's", "Proxy-Connection": "is the proxy's",
	"Te": "is the connection's", "Trailer": "is the connection's", "Transfer-Encoding": "is the connection's", "Upgrade": "is the connection's", "Expect": "is the connection's",
}

// addHeaders reads "Name:value,Name:value"; a semicolon or a newline separates as well as a comma.
func (p *parsed) addHeaders(list string) error {
	number := 0
	for pair := range strings.FieldsFuncSeq(list, func(r rune) bool { return strings.ContainsRune(",;\r\n", r) }) {
		if strings.TrimSpace(pair) == "" {
			continue
		}
		number++
		name, value, ok := strings.Cut(pair, ":")
		name = strings.TrimSpace(name)
		// What is not a name may be a piece of a value, so it is not shown.
		if !ok || !isToken(name) {
			return fmt.Errorf("number %d is not Name:value; within a value write %%2C for a comma and %%3B for a semicolon", number)
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		if why, is := taken[name]; is {
			return fmt.Errorf("%s cannot be set: it %s", name, why)
		}
		if strings.HasPrefix(name, "Webhook-") || strings.HasPrefix(name, "Pglistener-") {
			return fmt.Errorf("number %d cannot be set: the headers Webhook-... and Pglistener-... are made for each request", number)
		}
		value, err := headerValue(value)
		if err != nil {
			return fmt.Errorf("number %d: %w", number, err)
		}
		if _, twice := p.header[name]; twice && name != "User-Agent" {
			return fmt.Errorf("number %d has the name of one before it", number)
		}
		p.header[name] = []string{value}
		p.hide(value)
	}
	return nil
}

// headerValue decodes %XX, by which a value may hold what a file of variables cannot.
func headerValue(s string) (string, error) {
	s, err := url.PathUnescape(strings.TrimSpace(s))
	switch {
	case err != nil: // its text shows a piece of the value
		return "", errors.New("a % must be followed by two hexadecimal digits; write %25 for the sign itself")
	case s == "":
		return "", errors.New("the value is empty")
	case strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
		return "", errors.New("a header cannot hold a line break or another control character")
	}
	return s, nil
}

// isToken says whether s may be the name of a header.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
}

// addClientCertificate reads it. The name is of the variable that the error is about.
func (p *parsed) addClientCertificate(certFile, keyFile string) (name string, err error) {
	cert, err := readPEM(certFile)
	if err == nil {
		_, err = certificates(cert)
	}
	if err != nil {
		return "WEBHOOK_CERT_FILE", err
	}
	key, err := readPEM(keyFile)
	if err != nil {
		return "WEBHOOK_KEY_FILE", err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return "WEBHOOK_KEY_FILE", fmt.Errorf("%q: %w", keyFile, err)
	}
	p.config().Certificates = []tls.Certificate{pair}
	return "", nil
}

// addAuthorities reads those that are trusted instead of the system's, as curl's --cacert does.
func (p *parsed) addAuthorities(file string) error {
	data, err := readPEM(file)
	if err != nil {
		return err
	}
	all, err := certificates(data)
	if err != nil {
		return err
	}
	p.config().RootCAs = x509.NewCertPool()
	for _, c := range all {
		p.tls.RootCAs.AddCert(c)
	}
	return nil
}

// config returns p's TLS configuration, and makes it where there is none.
func (p *parsed) config() *tls.Config {
	if p.tls == nil {
		p.tls = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return p.tls
}

// readPEM reads a file that can be read again, so not a pipe; a wrong path cannot fill the memory.
func readPEM(path string) ([]byte, error) {
	const limit = 4 << 20
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%q is not a file of certificates or keys", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// certificates reads them all: a file that is cut within one, as while it is being written, is an error.
func certificates(data []byte) (all []*x509.Certificate, err error) {
	begun := bytes.Count(data, []byte("-----BEGIN CERTIFICATE-----"))
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if len(all) == 0 || len(all) != begun {
		return nil, fmt.Errorf("of %d certificates in PEM, %d can be read", begun, len(all))
	}
	return all, nil
}

// hide adds secrets that no error may show. What is shorter would blank ordinary words.
func (p *parsed) hide(secrets ...string) {
	for _, s := range secrets {
		if len(s) >= 4 && !slices.Contains(p.hidden, s) {
			p.hidden = append(p.hidden, s)
		}
	}
}

// signer signs with one key. Several goroutines may use it.
type signer struct{ macs sync.Pool }

func newSigner(key []byte) *signer {
	return &signer{macs: sync.Pool{New: func() any { return hmac.New(sha256.New, key) }}}
}

// sign returns the signature of message, in base64.
func (s *signer) sign(message []byte) string {
	mac := s.macs.Get().(hash.Hash)
	defer s.macs.Put(mac)
	mac.Reset()
	mac.Write(message)
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}
