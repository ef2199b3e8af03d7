package webhook

import (
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/pglistener/pglistener/internal/env"
)

// Settings are the variables of a webhook.
type Settings struct {
	Secret        string `env:"WEBHOOK_SECRET" file:"true" usage:"signs POSTs as Standard Webhooks do: whsec_...; of several, separated by commas, each signs"`
	Authorization string `env:"WEBHOOK_AUTHORIZATION" file:"true" usage:"the header Authorization, such as Bearer%20TOKEN; %20 is a blank, %25 is %"`
	Headers       string `env:"WEBHOOK_HEADERS" file:"true" usage:"more headers, Name:value, separated by commas; in a value %20 is a blank, %2C a comma, %25 is %"`
	CAFile        string `env:"WEBHOOK_CA_FILE" usage:"PEM file of the authorities to trust instead of the system's"`
	CertFile      string `env:"WEBHOOK_CERT_FILE" usage:"PEM file of the client certificate, followed by those between it and its authority"`
	KeyFile       string `env:"WEBHOOK_KEY_FILE" usage:"PEM file of the client certificate's private key"`
}

// files are the paths of the files that the handler itself reads; empty where there is none.
func (s Settings) files() [3]string { return [...]string{s.CAFile, s.CertFile, s.KeyFile} }

// Validate returns everything that is wrong with s, one error a variable, beginning with its name. No error shows a secret.
func (s Settings) Validate() []error {
	_, problems := s.parse()
	return problems
}

// prepared is what requests are made with: what Settings mean. It never changes once it is in use.
type prepared struct {
	macs   []*sync.Pool // of hash.Hash, one for each secret
	header http.Header  // of each request
	tls    *tls.Config
	hidden []string // the secrets, in the forms in which a receiver may repeat them

	// These are added by handler.prepare.
	from      view
	transport *http.Transport
	shield    *strings.Replacer // hides the secrets in a text
}

// parse reads s, and the files that it names.
func (s Settings) parse() (p *prepared, problems []error) {
	p = &prepared{header: http.Header{"User-Agent": {"pglistener"}}, tls: &tls.Config{}}
	check := func(name, value string, read func(string) error) {
		if value != "" {
			if err := read(value); err != nil {
				problems = append(problems, fmt.Errorf("%s: %w", name, err))
			}
		}
	}
	check("WEBHOOK_SECRET", s.Secret, p.readSecrets)
	check("WEBHOOK_AUTHORIZATION", s.Authorization, p.readAuthorization)
	check("WEBHOOK_HEADERS", s.Headers, p.readHeaders)
	check("WEBHOOK_CA_FILE", s.CAFile, p.readAuthorities)
	check("WEBHOOK_CERT_FILE, WEBHOOK_KEY_FILE", s.CertFile+s.KeyFile, func(string) error { return p.readCertificate(s.CertFile, s.KeyFile) })
	return p, problems
}

// readSecrets reads secrets as the specification has them: whsec_ and the key in base64. A comma between two can stand in any
// file of variables; blanks and newlines do as well.
func (p *prepared) readSecrets(list string) error {
	secrets := strings.FieldsFunc(list, func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) })
	if len(secrets) == 0 {
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
		p.macs = append(p.macs, &sync.Pool{New: func() any { return hmac.New(sha256.New, key) }})
		p.hidden = append(p.hidden, encoded)
	}
	return nil
}

func (p *prepared) readAuthorization(value string) error {
	value, err := headerValue(value)
	if err != nil {
		return err
	}
	p.header["Authorization"] = []string{value}
	p.hidden = append(p.hidden, value, value[strings.LastIndexByte(value, ' ')+1:])
	return nil
}

// Headers that WEBHOOK_HEADERS cannot set: what the signature and the body rest on, and what belongs to the connection. Those
// that begin with Webhook- or Pglistener- cannot be set either.
var taken = []string{"Authorization", "Connection", "Content-Length", "Content-Type", "Host", "Trailer", "Transfer-Encoding", "Upgrade"}

const tokenCharacters = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

// readHeaders reads "Name:value,Name:value"; a semicolon or a newline separates as well as a comma. Its errors count the pairs,
// for what is taken for a name may be a piece of a value.
func (p *prepared) readHeaders(list string) error {
	for i, pair := range strings.FieldsFunc(list, func(r rune) bool { return strings.ContainsRune(",;\r\n", r) }) {
		name, text, ok := strings.Cut(pair, ":")
		name = strings.TrimSpace(name)
		if !ok || name == "" || strings.Trim(name, tokenCharacters) != "" {
			return fmt.Errorf("number %d is not Name:value; within a value write %%2C for a comma and %%3B for a semicolon", i+1)
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		if slices.Contains(taken, name) || strings.HasPrefix(name, "Webhook-") || strings.HasPrefix(name, "Pglistener-") {
			return fmt.Errorf("%s cannot be set here: it comes from the payload, the URL, the connection or WEBHOOK_AUTHORIZATION", name)
		}
		value, err := headerValue(text)
		if err != nil {
			return fmt.Errorf("number %d: %w", i+1, err)
		}
		if p.header[name] != nil && name != "User-Agent" {
			return fmt.Errorf("number %d has the name of one before it", i+1)
		}
		p.header[name] = []string{value}
		p.hidden = append(p.hidden, value)
	}
	return nil
}

// headerValue decodes %XX, by which a value may hold what a line of a file of variables cannot.
func headerValue(s string) (string, error) {
	s, err := url.PathUnescape(strings.TrimSpace(s))
	switch {
	case err != nil: // its text shows a piece of the value
		return "", errors.New("a % must be followed by two hexadecimal digits; write %25 for the sign itself")
	case strings.TrimSpace(s) == "":
		return "", errors.New("the value is empty")
	case strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
		return "", errors.New("a header cannot hold a line break or another control character")
	}
	return s, nil
}

// readAuthorities reads those that are trusted instead of the system's, as curl's --cacert does. A file that is cut off within a
// certificate is an error.
func (p *prepared) readAuthorities(path string) error {
	data, err := env.ReadFile(path, largestFile)
	if err != nil {
		return err
	}
	begun, read := bytes.Count(data, []byte("-----BEGIN CERTIFICATE-----")), 0
	p.tls.RootCAs = x509.NewCertPool()
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			p.tls.RootCAs.AddCert(c)
			read++
		}
	}
	if read == 0 || read != begun {
		return fmt.Errorf("of the %d certificates in PEM in %q, %d can be read", begun, path, read)
	}
	return nil
}

func (p *prepared) readCertificate(certPath, keyPath string) error {
	if certPath == "" || keyPath == "" {
		return errors.New("a client certificate needs both; set the other one too")
	}
	cert, certErr := env.ReadFile(certPath, largestFile)
	key, keyErr := env.ReadFile(keyPath, largestFile)
	pair, err := tls.X509KeyPair(cert, key)
	if err := cmp.Or(certErr, keyErr, err); err != nil {
		return err
	}
	p.tls.Certificates = []tls.Certificate{pair}
	return nil
}

const largestFile = 4 << 20 // of certificates or keys
