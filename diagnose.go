package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// hopeless says whether waiting cannot mend what kept the first connection from
// being made: a wrong password, an unknown role or database, TLS that cannot be
// verified or is not spoken. Of several hosts, all must be hopeless.
func hopeless(err error) bool {
	for _, e := range causes(err) {
		if advice(e).waiting {
			return false
		}
	}
	return true
}

// help is what to do about an error; waiting says whether it may go away by itself.
type help struct {
	text    string
	waiting bool
}

// advice returns what a person can do about an error that the server, TLS or the
// network gave. The text is empty when the error says all there is to say.
func advice(err error) help {
	if e := pq.As(err); e != nil {
		switch e.Code {
		case pqerror.InvalidPassword: // 28P01
			return help{"the user or the password in DATABASE_URL is wrong", false}
		case pqerror.InvalidAuthorizationSpecification: // 28000
			return help{"the server lets this user in only as its pg_hba.conf says: check user, database and sslmode in DATABASE_URL", false}
		case pqerror.InvalidCatalogName: // 3D000
			return help{"check the database name at the end of DATABASE_URL", false}
		case pqerror.ReadOnlySQLTransaction: // 25006
			return help{"the server is a standby, where LISTEN is not possible; waiting until it is promoted", true}
		case pqerror.TooManyConnections: // 53300
			return help{"all connection slots are taken; waiting for one", true}
		}
		return help{waiting: true}
	}
	if errors.Is(err, pq.ErrSSLNotSupported) {
		return help{"the server does not speak TLS; add sslmode=disable to DATABASE_URL if the network is trusted", false}
	}
	if is[*tls.CertificateVerificationError](err) || is[x509.UnknownAuthorityError](err) ||
		is[x509.HostnameError](err) || is[x509.CertificateInvalidError](err) {
		return help{"the server's certificate cannot be verified: check its dates and its host name, and sslrootcert in DATABASE_URL", false}
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return help{"nothing listens there: check host and port in DATABASE_URL, and whether the server runs", true}
	}
	return help{waiting: true}
}

// explain is an error and what to do about it, in one line.
func explain(err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	for _, e := range causes(err) {
		if h := advice(e).text; h != "" {
			return text + ": " + h
		}
	}
	return text
}

// causes takes an error about several hosts apart.
func causes(err error) []error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if joined, ok := e.(interface{ Unwrap() []error }); ok {
			return joined.Unwrap()
		}
	}
	return []error{err}
}

// is says whether err is or wraps an E.
func is[E error](err error) bool {
	var e E
	return errors.As(err, &e)
}

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
}

// repeated counts failures that may go on for hours, and says which of them are
// worth a line in the log: of each kind the 1st, 2nd, 4th, 8th, ...
type repeated struct {
	attempt int
	alike   map[string]int
}

func (r *repeated) reset() { *r = repeated{} }

func (r *repeated) count(err error) (attempt int, worth bool) {
	// A server that fails in ever new ways is not worth more memory than this.
	if r.alike == nil || len(r.alike) > 100 {
		r.alike = map[string]int{}
	}
	r.attempt++
	kind := errorKind(err)
	r.alike[kind]++
	n := r.alike[kind]
	return r.attempt, n&(n-1) == 0
}

// errorKind is the same for errors that differ in a port number only.
func errorKind(err error) string {
	var errno syscall.Errno
	switch {
	case pq.As(err) != nil:
		return "server: " + string(pq.As(err).Code)
	case errors.As(err, &errno):
		return "system: " + errno.Error()
	case isTimeout(err):
		return "timeout"
	}
	return err.Error()
}

// cutText cuts s to at most n bytes, not within a character.
func cutText(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
