// Package trigger prints the SQL of triggers that tell a channel of every changed row of a table. It reads the catalog and changes
// nothing.
package trigger

import (
	"cmp"
	"context"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/pglistener/pglistener/internal/pgconn"
)

// Operands are what may follow the flag -trigger, for -h.
const Operands = "TABLE [CHANNEL] [-trigger-columns A,B] [-trigger-notify]"

// Options are what to print.
type Options struct {
	Table   string // NAME or SCHEMA.NAME as SQL writes it; the double quotes may be left out
	Channel string // "" is the table's name
	Columns string // comma-separated: whose changes count, and which are carried; "" is all
	Notify  bool   // NOTIFY with the key, instead of a row in the outbox with what has changed
}

// Parse reads what follows the flag -trigger, in any order.
func Parse(operands []string) (o Options, err error) {
	var names []string
	for i := 0; i < len(operands); i++ {
		flag, value, hasValue := strings.Cut(operands[i], "=")
		switch _, readable := strings.CutPrefix(flag, "-"); {
		case strings.Contains(operands[i], "://"), strings.Contains(operands[i], "password="):
			return o, errors.New("an argument is a connection string, which is not shown: set DATABASE_URL to it")
		case !utf8.ValidString(operands[i]), strings.ContainsFunc(operands[i], unicode.IsControl), strings.TrimSpace(operands[i]) == "":
			return o, errors.New("an argument is empty, has a control character in it, or is not UTF-8")
		case !readable:
			names = append(names, operands[i])
		case strings.TrimLeft(flag, "-") == "trigger-notify" && !hasValue:
			o.Notify = true
		case strings.TrimLeft(flag, "-") == "trigger-columns":
			if !hasValue && i+1 < len(operands) {
				i++
				value = operands[i]
			}
			if value == "" || strings.HasPrefix(value, "-") || o.Columns != "" {
				return o, errors.New("-trigger-columns needs the names of columns, all in one: -trigger-columns status,total")
			}
			o.Columns = value
		default:
			return o, fmt.Errorf("%q cannot follow -trigger: -trigger %s", flag, Operands)
		}
	}
	switch len(names) {
	case 0:
		return o, errors.New("-trigger needs a table: -trigger " + Operands)
	case 1, 2:
		o.Table, o.Channel = names[0], append(names, "")[1]
		return o, nil
	}
	return o, errors.New("-trigger takes a table and a channel, and not more; a name with blanks needs quotes")
}

//go:embed catalog.sql
var catalog string

//go:embed trigger.sql
var script string

// Print writes the SQL to out. outbox is OUTBOX_TABLE as SQL writes it. It asks the server for the table, its columns and its key,
// and so may block for timeout. An error is one line, ready to be shown; nothing has been written then, unless it is the error of
// out.
func Print(dsn string, timeout time.Duration, outbox string, o Options, out io.Writer) error {
	var found []byte
	values := map[string]string{}
	err := pgconn.Once(dsn, timeout, func(ctx context.Context, db *sql.DB) error {
		tx, err := db.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
		if err != nil {
			return err
		}
		defer func() { _ = tx.Rollback() }()
		var path string
		var box sql.NullString
		// A function in a schema that others may write to, such as public before PostgreSQL 15, must not run as whoever prints.
		const before, safe = "select pg_catalog.current_schemas(true), pg_catalog.to_regclass($1)::pg_catalog.oid", "set local search_path = pg_catalog, pg_temp"
		if err = tx.QueryRowContext(ctx, before, outbox).Scan(&path, &box); err == nil {
			_, err = tx.ExecContext(ctx, safe)
		}
		if err != nil {
			return err
		}
		return cmp.Or(tx.QueryRowContext(ctx, catalog, o.Table, o.Channel, o.Columns, outbox, o.Notify, box, path).Scan(&found), json.Unmarshal(found, &values))
	})
	switch {
	case err != nil:
		return errors.New(pgconn.Explain(err))
	case values["refusal"] != "":
		return errors.New(values["refusal"])
	}
	_, err = io.WriteString(out, fill(values))
	return err
}

// fill puts values into the script. A line that begins with ?NAME is only for those that have that value, one with ?!NAME for others.
func fill(values map[string]string) string {
	var b strings.Builder
	for line := range strings.Lines(script) {
		if name, rest, ok := strings.Cut(line, " "); ok && strings.HasPrefix(name, "?") {
			name, without := strings.CutPrefix(name[1:], "!")
			if (values[name] == "") != without {
				continue
			}
			line = rest
		}
		b.WriteString(line)
	}
	tag := "pglistener$"
	for strings.Contains(strings.Join(slices.Collect(maps.Values(values)), " "), tag) { // a name would end the body
		tag = "_" + tag
	}
	pairs := []string{"{do}", "$" + tag, "{body}", "$function_" + tag}
	for name, value := range values {
		pairs = append(pairs, "{"+name+"}", value)
	}
	return strings.NewReplacer(pairs...).Replace(b.String())
}
