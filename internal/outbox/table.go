package outbox

import (
	"cmp"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
)

// table is the name of the outbox's table and of what belongs to it.
type table struct {
	name     string // as in OUTBOX_TABLE
	replacer *strings.Replacer
}

// parseTable reads OUTBOX_TABLE: NAME or SCHEMA.NAME. A part that contains a dot is written in double quotes; upper and lower
// case are kept.
func parseTable(s string) (table, error) {
	var parts []string
	for rest := s; ; {
		var part string
		if strings.HasPrefix(rest, `"`) {
			end := strings.Index(rest[1:], `"`)
			if end < 0 {
				return table{}, fmt.Errorf("%q has an open quote", s)
			}
			part, rest = rest[1:1+end], rest[end+2:]
		} else {
			end := strings.IndexByte(rest, '.')
			if end < 0 {
				end = len(rest)
			}
			part, rest = rest[:end], rest[end:]
		}
		if part == "" || len(part) > pgconn.MaxIdentifier || !utf8.ValidString(part) || strings.ContainsAny(part, "\x00\"") {
			return table{}, fmt.Errorf("%q is not a table name: NAME or SCHEMA.NAME, of 1 to %d bytes each", s, pgconn.MaxIdentifier)
		}
		parts = append(parts, part)
		if rest == "" {
			break
		}
		if !strings.HasPrefix(rest, ".") || len(parts) == 2 {
			return table{}, fmt.Errorf("%q is not a table name: NAME or SCHEMA.NAME", s)
		}
		rest = rest[1:]
	}
	name := parts[len(parts)-1]
	schema, usage := "", ""
	if len(parts) == 2 {
		schema = pq.QuoteIdentifier(parts[0]) + "."
		usage = ", and usage on schema " + pq.QuoteIdentifier(parts[0])
	}
	// PostgreSQL would cut a name that is too long, perhaps to one that is taken.
	with := func(suffix string) string {
		return pq.QuoteIdentifier(notify.Cut(name, pgconn.MaxIdentifier-len(suffix)) + suffix)
	}
	return table{name: s, replacer: strings.NewReplacer(
		"{table}", schema+pq.QuoteIdentifier(name),
		"{due}", with("_due"),
		"{failed}", with("_failed"),
		"{key}", with("_key"),
		"{schedule}", with("_schedule"),
		"{touch}", with("_touch"),
		"{change}", schema+with("_change"),
		"{notify}", schema+with("_notify"),
		"{trigger}", with("_notify"),
		"{and usage}", usage,
		"{state}", stateSQL,
		"{kind}", "($1::text[] is null or array[case when o.failed_at is not null then 'failed' when o.schedule is null then 'waiting' else 'scheduled' end, "+stateSQL+"] && $1)",
	)}, nil
}

// stateSQL is the state of a row o for a person. What is retried is a row that has failed and is to be tried again later.
const stateSQL = `case when o.failed_at is not null then 'failed' when o.leased_until > now() then 'running' when o.run_at <= now() then 'due'
	when o.attempts > 0 and o.last_error is not null then 'retrying' else 'later' end`

// sql puts the names into a statement.
func (t table) sql(query string) string { return t.replacer.Replace(query) }

// Schema returns the SQL that makes a table, given as in OUTBOX_TABLE; "" is outbox. Rows of the swept channels are inserted
// without a NOTIFY.
func Schema(name string, swept ...string) (string, error) {
	t, err := parseTable(cmp.Or(name, "outbox"))
	if err != nil {
		return "", fmt.Errorf("OUTBOX_TABLE: %w", err)
	}
	var literals []string
	for i, channel := range swept {
		if len(channel) < 1 || len(channel) > 63 {
			return "", fmt.Errorf("operand %d of -outbox-schema is no name of a channel: those have 1 to 63 bytes", i+1)
		}
		literals = append(literals, pq.QuoteLiteral(channel))
	}
	return strings.ReplaceAll(t.sql(schemaSQL), "{swept}", strings.Join(literals, ", ")), nil
}

// SQLName returns a table, given as in OUTBOX_TABLE, as SQL writes it.
func SQLName(name string) (string, error) {
	t, err := parseTable(name)
	if err != nil {
		return "", fmt.Errorf("OUTBOX_TABLE: %w", err)
	}
	return t.sql("{table}"), nil
}

// hint says how to mend what the server objects to.
func (s store) hint(err error) string {
	name := s.table.name
	if strings.ContainsFunc(name, func(r rune) bool {
		return !strings.ContainsRune("._", r) && !unicode.IsLetter(r) && !unicode.IsDigit(r)
	}) {
		name = "'" + strings.ReplaceAll(name, "'", `'\''`) + "'" // for the shell
	}
	script := `OUTBOX_TABLE=` + name + ` pglistener -outbox-schema | psql "$DATABASE_URL"`
	switch {
	case pq.As(err, pqerror.InsufficientPrivilege) != nil:
		return s.table.sql("as its owner: grant " + cmp.Or(s.rights, "select, insert, update, delete") + " on {table} to the user in DATABASE_URL{and usage}")
	case pq.As(err, pqerror.UndefinedTable, pqerror.UndefinedColumn, pqerror.InvalidSchemaName, pqerror.WrongObjectType, pqerror.FeatureNotSupported) == nil:
		return pgconn.Advice(err)
	}
	var kind string
	if e := s.db.QueryRow("select relkind from pg_class where oid = to_regclass($1)", s.table.sql("{table}")).Scan(&kind); e != nil {
		return "make it: " + script
	}
	switch kind {
	case "r", "p":
		return "it is older than this program, or another table: bring it up to date: " + script
	}
	return "OUTBOX_TABLE must be a table, and " + s.table.name + " is " + map[string]string{
		"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence"}[kind] + "; name the table itself"
}

// explain is an error and what to do about it.
func (s store) explain(err error) error { return withHint(err, s.hint(err)) }

func withHint(err error, hint string) error {
	if hint == "" {
		return err
	}
	return fmt.Errorf("%w: %s", err, hint)
}
