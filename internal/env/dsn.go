package env

import (
	"errors"
	"maps"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/pgconn"
)

// runtimeParameter is what lib/pq sends to the server as a setting because it does not know the key.
var runtimeParameter = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

// CheckDSN returns why a connection string can never work, and the variable to blame. lib/pq's own error holds the string,
// password and all, and a string it accepts may yet carry pieces of a password where they would be shown as a host, a database or
// a setting; none of these is ever part of the error (DESIGN facts 4 and 20). An empty string means the PG* variables, one of
// which must be set then. It reads the PG* variables and the service file, as lib/pq does.
func CheckDSN(dsn string, lookup Lookuper) (name string, err error) {
	if dsn == "" && !slices.ContainsFunc([]string{"PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"}, func(name string) bool { return IsSet(lookup, "", name) }) {
		return "DATABASE_URL", errors.New("not set, nor any of PGHOST, PGDATABASE, PGSERVICE; set it to postgres://user:password@host:port/database")
	}
	if _, err := pq.NewConfig(""); err != nil {
		if os.Getenv("PGSERVICE") != "" {
			return "PGSERVICE", pgconn.ErrService
		}
		// The error names PG* variables; PGPASSWORD is never part of it, for it cannot be wrong.
		return "PG*", errors.New(strings.TrimPrefix(err.Error(), "pq: "))
	}
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		return "DATABASE_URL", pgconn.ErrBadDSN
	}
	keys := slices.Collect(maps.Keys(cfg.Runtime))
	if u, err := url.Parse(dsn); err == nil && strings.HasPrefix(u.Scheme, "postgres") {
		// A "/", "?" or "#" in a password ends the host part early.
		beforeQuery, _, _ := strings.Cut(dsn, "?")
		if u.Fragment != "" || strings.Contains(beforeQuery, "@") && u.User == nil || strings.Count(u.EscapedPath(), "/") > 1 {
			return "DATABASE_URL", pgconn.ErrBadDSN
		}
		keys = slices.AppendSeq(keys, maps.Keys(u.Query()))
	}
	if slices.ContainsFunc(keys, func(key string) bool { return !runtimeParameter.MatchString(key) }) {
		return "DATABASE_URL", pgconn.ErrBadDSN
	}
	return "", nil
}

// WithDefaults adds what holds unless the connection string, the PG* variables or the service file say otherwise: the name that
// pg_stat_activity shows, and sslmode=require, which is lib/pq's own default only until its next release. Neither sslrootcert=system
// nor a unix socket leaves sslmode open.
func WithDefaults(dsn, name string) string {
	dsn = with(dsn, "fallback_application_name", name)
	if cfg, err := pq.NewConfig(dsn); err == nil && cfg.SSLMode == "" {
		dsn = with(dsn, "sslmode", string(pq.SSLModeRequire))
	}
	return dsn
}

// with adds a key to a connection string.
func with(dsn, key, value string) string {
	if !strings.HasPrefix(dsn, "postgres://") && !strings.HasPrefix(dsn, "postgresql://") {
		return key + "=" + value + " " + dsn
	}
	return dsn + map[bool]string{false: "?", true: "&"}[strings.Contains(dsn, "?")] + key + "=" + value
}
