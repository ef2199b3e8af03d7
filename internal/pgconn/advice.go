package pgconn

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"syscall"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// Hopeless says whether waiting cannot mend what kept the first connection from being made: a wrong password, an unknown role or
// database, TLS that cannot be verified or is not spoken. Of several hosts, all must be hopeless.
func Hopeless(err error) bool {
	return !slices.ContainsFunc(causes(err), func(e error) bool { return advise(e).waiting })
}

// Advice returns what a person can do about an error that the server, TLS or the network gave. It is empty when the error says
// all there is to say.
func Advice(err error) string { return advise(err).text }

// help is what to do about an error; waiting says whether it may go away by itself.
type help struct {
	text    string
	waiting bool
}

func advise(err error) help {
	if e := pq.As(err); e != nil {
		switch e.Code {
		case pqerror.InvalidPassword: // 28P01
			return help{"the user or the password in DATABASE_URL is wrong", false}
		case pqerror.InvalidAuthorizationSpecification: // 28000
			return help{"the server lets this user in only as its pg_hba.conf says: check user, database and sslmode in DATABASE_URL", false}
		case pqerror.InvalidCatalogName: // 3D000
			return help{"check the database name at the end of DATABASE_URL", false}
		case pqerror.UndefinedObject: // 42704
			return help{"if this is a parameter in DATABASE_URL, the server does not know it: take it out", false}
		case pqerror.QueryCanceled: // 57014
			return help{"unless a person did so, it was because PING_TIMEOUT had passed, as when somebody has locked the table", true}
		case pqerror.ReadOnlySQLTransaction: // 25006
			return help{"the server is a standby, where LISTEN is not possible; waiting until it is promoted", true}
		case pqerror.TooManyConnections: // 53300
			return help{"all connection slots are taken; waiting for one", true}
		case pqerror.UndefinedFile: // 58P01
			return help{"if it cannot access the status of a transaction, this is a bug of the server, fixed in 14.21, 15.16, 16.12, 17.8 and 18.2: update it", true}
		}
		return help{waiting: true}
	}
	if errors.Is(err, pq.ErrSSLNotSupported) {
		return help{"the server does not speak TLS; add sslmode=disable to DATABASE_URL if the network is trusted", false}
	}
	if errors.As(err, new(*tls.CertificateVerificationError)) || errors.As(err, new(x509.UnknownAuthorityError)) ||
		errors.As(err, new(x509.HostnameError)) || errors.As(err, new(x509.CertificateInvalidError)) {
		return help{"the server's certificate cannot be verified: check its dates and its host name, and sslrootcert in DATABASE_URL", false}
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return help{"nothing listens there: check host and port in DATABASE_URL, and whether the server runs", true}
	}
	return help{waiting: true}
}

// Explain is an error and what to do about it, in one line.
func Explain(err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	for _, e := range causes(err) {
		if h := advise(e).text; h != "" {
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

// IsTimeout says whether err is a deadline that passed.
func IsTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
}

// Kind is a text that is the same for errors that differ in a port number only, for retry.Failures.
func Kind(err error) string {
	var errno syscall.Errno
	switch {
	case pq.As(err) != nil:
		return "server: " + string(pq.As(err).Code)
	case errors.As(err, &errno):
		return "system: " + errno.Error()
	case IsTimeout(err):
		return "timeout"
	}
	return err.Error()
}
