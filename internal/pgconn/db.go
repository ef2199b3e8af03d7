package pgconn

import (
	"context"
	"database/sql"
	"errors"
	"net"
	"time"

	"github.com/lib/pq"
)

// ErrBadDSN says how to write a connection string, and not what is wrong with this one: any piece of it may be the password.
var ErrBadDSN = errors.New("not a valid connection string (not shown: it may hold a password); " +
	"write postgres://user:password@host:port/database?sslmode=..., with any of % @ : / ? # and blanks in the password percent-encoded")

// ErrService is what a service file is to blame for. lib/pq quotes the line, which may be the password.
var ErrService = errors.New("the service file cannot be read or has no such service (its text is not shown because it may hold a password)")

// MaxIdentifier is NAMEDATALEN-1, the longest name that PostgreSQL keeps, in bytes: LISTEN cuts a longer channel in silence and
// pg_notify rejects it, so such a channel would never hear anything (DESIGN fact 16).
const MaxIdentifier = 63

// sqlDialer opens the connections of database/sql. As these are read only while an answer is due, the timeout bounds every read.
type sqlDialer struct{ timeout time.Duration }

// Dial implements pq.Dialer.
func (d sqlDialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

// DialTimeout implements pq.Dialer.
func (d sqlDialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	return sqlDialer{min(timeout, d.timeout)}.Dial(network, address)
}

// DialContext implements pq.DialerContext: lib/pq prefers it.
func (d sqlDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := (&net.Dialer{Timeout: d.timeout}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &Conn{Conn: nc, timeout: d.timeout, silence: d.timeout, heard: func() {}}, nil
}

// OpenDB returns a pool for short statements, whose every wait is bounded by timeout. It connects when it is first used.
func OpenDB(dsn string, timeout time.Duration) (*sql.DB, error) {
	cfg, wrong := pq.NewConfig(dsn)
	// One round trip per statement, and none that a pooler could tear apart.
	cfg.BinaryParameters = true
	c, err := pq.NewConnectorConfig(cfg)
	if wrong != nil || err != nil {
		return nil, ErrBadDSN // not the error itself: it may hold the password
	}
	c.Dialer(sqlDialer{timeout})
	return sql.OpenDB(c), nil
}

// Once makes a connection, lets use work with it, and closes it. It blocks for timeout at most, if use obeys its context.
func Once(dsn string, timeout time.Duration, use func(context.Context, *sql.DB) error) error {
	db, err := OpenDB(dsn, timeout)
	if err != nil {
		return err
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return use(ctx, db)
}
