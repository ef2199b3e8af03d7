package outbox

import (
	"database/sql"
	"fmt"
	"io"
	"maps"
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
const (
	screenRows  = 100
	programRows = 1000
	moreRows    = 1000
)

// list shows the rows of what: columns on a terminal, otherwise lines of JSON.
func (p Operator) list(s store, what selection) error {
	limit, columns := programRows, false
	if f, ok := p.Stdout.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			limit, columns = screenRows, true
		}
	}
	missing := map[int64]bool{}
	for _, id := range what.ids {
		missing[id] = true
	}
	shown, total, out := 0, 0, tabwriter.NewWriter(p.Stdout, 0, 0, 2, ' ', 0)
	err := p.query(s, selectSQL+listSQL, true, append(what.args(limit+moreRows), limit), func(r *sql.Rows) error {
		var id int64
		var text string
		var cells pq.StringArray
		if err := r.Scan(&id, &text, &cells, &total); err != nil {
			return err
		}
		delete(missing, id)
		if shown++; !columns {
			_, err := fmt.Fprintln(p.Stdout, printable(text))
			return err
		}
		if shown == 1 {
			fmt.Fprintln(out, "ID\tCHANNEL\tSTATE\tWHEN\tATTEMPTS\tCREATED\tKEY\tSCHEDULE\tLAST ERROR")
		}
		for i := range cells {
			cells[i] = printable(cells[i])
		}
		_, err := io.WriteString(out, strings.Join(cells, "\t")+"\n")
		return err
	})
	if err == nil {
		err = out.Flush()
	}
	switch {
	case err != nil:
	case total >= limit+moreRows:
		fmt.Fprintf(p.Stderr, "at least %d more rows are not shown; name a state, a channel or an id\n", total-shown)
	case total > shown:
		fmt.Fprintf(p.Stderr, "%d more rows are not shown; name a state, a channel or an id\n", total-shown)
	case len(missing) > 0:
		fmt.Fprintln(p.Stderr, "not found: "+count(slices.Collect(maps.Keys(missing))))
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
