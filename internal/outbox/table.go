package outbox

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
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

// tableName is a name, perhaps after that of a schema. Either may stand in double quotes.
var tableName = regexp.MustCompile(`^(?:("[^"\x00]+"|[^".\x00]+)\.)?("[^"\x00]+"|[^".\x00]+)$`)

// parseTable reads OUTBOX_TABLE: NAME or SCHEMA.NAME. A part that contains a dot is written in double quotes; upper and lower
// case are kept.
func parseTable(s string) (table, error) {
	var parts [3]string // all, the schema, the name
	copy(parts[:], tableName.FindStringSubmatch(s))
	name, schema, usage := strings.Trim(parts[2], `"`), strings.Trim(parts[1], `"`), ""
	if name == "" || max(len(name), len(schema)) > pgconn.MaxIdentifier || !utf8.ValidString(s) {
		return table{}, fmt.Errorf("OUTBOX_TABLE: %q is not a table name: NAME or SCHEMA.NAME, of 1 to %d bytes each", s, pgconn.MaxIdentifier)
	}
	if schema != "" {
		usage = ", and usage on schema " + pq.QuoteIdentifier(schema)
		schema = pq.QuoteIdentifier(schema) + "."
	}
	// PostgreSQL would cut a name that is too long, perhaps to one that is taken.
	with := func(suffix string) string {
		return pq.QuoteIdentifier(notify.Cut(name, pgconn.MaxIdentifier-len(suffix)) + suffix)
	}
	return table{name: s, replacer: strings.NewReplacer(
		"{table}", schema+pq.QuoteIdentifier(name),
		"{due}", with("_due"), "{failed}", with("_failed"), "{key}", with("_key"), // indexes
		"{schedule}", with("_schedule"), "{touch}", with("_touch"), "{trigger}", with("_notify"), // triggers
		"{indexes}", pq.QuoteLiteral(with("_due"))+", "+pq.QuoteLiteral(with("_failed"))+", "+pq.QuoteLiteral(with("_key")), "{name}", pq.QuoteLiteral(schema+pq.QuoteIdentifier(name)),
		"{change}", schema+with("_change"), "{notify}", schema+with("_notify"), // functions
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
		return "", err
	}
	var literals []string
	for i, channel := range swept {
		if len(channel) < 1 || len(channel) > 63 {
			return "", fmt.Errorf("operand %d of -outbox-schema is no name of a channel: those have 1 to 63 bytes", i+1)
		}
		literals = append(literals, pq.QuoteLiteral(channel))
	}
	names, inserted := strings.Join(literals, ", "), "referencing new table as inserted for each statement"
	if names != "" {
		inserted = "for each row when (new.channel not in (" + names + "))"
	}
	return strings.NewReplacer("{swept}", names, "{inserted}", inserted).Replace(t.sql(statement("schema"))), nil
}

// SQLName returns a table, given as in OUTBOX_TABLE, as SQL writes it.
func SQLName(name string) (string, error) {
	t, err := parseTable(name)
	if err != nil {
		return "", err
	}
	return t.sql("{table}"), nil
}

// hint says how to mend what the server objects to.
func (s store) hint(err error) string {
	name := s.table.name
	if regexp.MustCompile(`[^\pL\pN._]`).MatchString(name) {
		name = "'" + strings.ReplaceAll(name, "'", `'\''`) + "'" // for the shell
	}
	script := `OUTBOX_TABLE=` + name + ` pglistener -outbox-schema | psql "$DATABASE_URL"`
	switch {
	case pq.As(err, pqerror.InsufficientPrivilege) != nil:
		return s.table.sql("as its owner: grant " + cmp.Or(s.rights, "select, insert, update, delete") + " on {table} to the user in DATABASE_URL{and usage}")
	case pq.As(err, pqerror.UndefinedTable, pqerror.UndefinedColumn, pqerror.InvalidSchemaName, pqerror.WrongObjectType, pqerror.FeatureNotSupported) == nil:
		return pgconn.Advice(err)
	}
	var hint string
	if s.db.QueryRow(statement("hint"), s.table.sql("{table}"), s.table.name, script).Scan(&hint) != nil {
		return "if OUTBOX_TABLE and the database in DATABASE_URL are those you mean, make it: " + script
	}
	return hint
}

// explain is an error and what to do about it.
func (s store) explain(err error) error { return withHint(err, s.hint(err)) }

func withHint(err error, hint string) error {
	if hint == "" {
		return err
	}
	return fmt.Errorf("%w: %s", err, hint)
}
