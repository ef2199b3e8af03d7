package outbox

import (
	"database/sql"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf16"

	"github.com/lib/pq"
)

// How many rows are listed: what a person may look through, or what a program may want. Up to moreRows of a channel are counted
// besides.
const screenRows, programRows, moreRows = 100, 1000, 1000

// list shows the rows of what: columns on a terminal, otherwise lines of JSON.
func (p Operator) list(s store, what selection) error {
	limit, columns, out := programRows, tabwriter.NewWriter(p.Stdout, 0, 0, 2, ' ', 0), p.Stdout
	if f, ok := p.Stdout.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			limit, out = screenRows, columns
			fmt.Fprintln(out, "ID\tCHANNEL\tSTATE\tWHEN\tATTEMPTS\tCREATED\tKEY\tSCHEDULE\tLAST ERROR")
		}
	}
	shown, total, missing := 0, 0, slices.Clone(what.ids)
	err := p.query(s, statement("select")+statement("list"), true, append(what.args(limit+moreRows), limit, out == columns), func(r *sql.Rows) error {
		var id int64
		var cells pq.StringArray
		if err := r.Scan(&id, &cells, &total); err != nil {
			return err
		}
		for i := range cells {
			cells[i] = printable(cells[i])
		}
		shown++
		missing = slices.DeleteFunc(missing, func(m int64) bool { return m == id })
		_, err := fmt.Fprintln(out, strings.Join(cells, "\t"))
		return err
	})
	if err == nil && shown > 0 {
		err = columns.Flush()
	}
	switch more := fmt.Sprintf("%d more rows are not shown; name a state, a channel or an id", total-shown); {
	case err != nil:
	case total >= limit+moreRows:
		fmt.Fprintln(p.Stderr, "at least", more)
	case total > shown:
		fmt.Fprintln(p.Stderr, more)
	case len(missing) > 0:
		fmt.Fprintln(p.Stderr, "not found: "+count(missing))
		return errPartly
	case shown == 0:
		fmt.Fprintln(p.Stderr, "no rows; the states are failed, waiting and scheduled, and anything else but digits is a channel")
	}
	return err
}

// printable is a text without what could command a terminal: each such character is written as in JSON.
func printable(text string) string {
	var b strings.Builder
	for _, r := range text {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return b.String()
}
