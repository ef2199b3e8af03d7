package outbox

import (
	"cmp"
	"database/sql"
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"

	"github.com/pglistener/pglistener/internal/notify"
)

// listed is a row as a person sees it, without its payload.
type listed struct {
	ID, Attempts         int64
	Channel, State       string
	Key, Schedule        string
	LastError            string  `json:"last_error"`
	text                 string  // all of it, in JSON
	since, sinceCreation float64 // how many seconds ago it failed or came due; negative is yet to come
}

//go:embed list.sql
var listSQL string

// How many rows are listed: what a person may look through, or what a program may want. Up to moreRows are counted besides.
const (
	screenRows  = 100
	programRows = 10_000
	moreRows    = 10_000
)

// list shows first the rows that have failed, the last to fail first, then the others, the first due first.
func (p Operator) list(s store, what selection) error {
	columns, limit := isTerminal(p.Stdout), programRows
	if columns {
		limit = screenRows
	}
	// read reads up to n rows.
	read := func(fields string, n int, each func(*sql.Rows) error) error {
		for _, failed := range []bool{true, false} {
			filter, order := cmp.Or(groups[what.state], "true"), "o.run_at, o.id"
			if failed {
				order = "o.failed_at desc, o.id desc"
			}
			if what.state != "" && failed != (what.state == "failed") || n == 0 {
				continue
			}
			if err := p.scan(s, what, failed, filter, order, fields, n, func(r *sql.Rows) error {
				n--
				return each(r)
			}); err != nil {
				return err
			}
		}
		return nil
	}
	var all []listed
	missing := map[int64]bool{}
	for _, id := range what.ids {
		missing[id] = true
	}
	err := read(listSQL, limit, func(r *sql.Rows) error {
		l := listed{}
		if err := r.Scan(&l.text, &l.since, &l.sinceCreation); err != nil {
			return err
		}
		all = append(all, l)
		err := json.Unmarshal([]byte(l.text), &all[len(all)-1])
		delete(missing, all[len(all)-1].ID)
		return err
	})
	if err != nil {
		return err
	}
	more := -len(all)
	if len(all) == limit {
		if err := read("null", limit+moreRows, func(*sql.Rows) error { more++; return nil }); err != nil {
			return err
		}
	}
	if columns {
		err = printColumns(p.Stdout, all)
	}
	for _, l := range all {
		if err == nil && !columns {
			_, err = fmt.Fprintln(p.Stdout, printable(l.text))
		}
	}
	switch {
	case err != nil:
	case more > 0:
		fmt.Fprintf(p.Stderr, "%s%d more rows are not shown; name a state, a channel or an id\n", map[bool]string{true: "at least "}[more == moreRows], more)
	case len(missing) > 0:
		fmt.Fprintln(p.Stderr, "not found: "+count(slices.Collect(maps.Keys(missing))))
		return errPartly
	case len(all) == 0:
		fmt.Fprintln(p.Stderr, "no rows; the states are failed, waiting and scheduled, and anything else but digits is a channel")
	}
	return err
}

// printColumns prints rows for a terminal. A column that is empty is left out.
func printColumns(w io.Writer, all []listed) error {
	table := [][]string{{"ID", "CHANNEL", "STATE", "WHEN", "ATTEMPTS", "CREATED", "KEY", "SCHEDULE", "LAST ERROR"}}
	used := make([]bool, len(table[0]))
	for _, l := range all {
		line := []string{strconv.FormatInt(l.ID, 10), l.Channel, l.State, ago(l.since), strconv.FormatInt(l.Attempts, 10), ago(l.sinceCreation), l.Key, l.Schedule, l.LastError}
		for i, cell := range line {
			short := notify.Cut(cell, 100)
			if short != cell {
				short += "..."
			}
			line[i], used[i] = printable(short), used[i] || cell != ""
		}
		table = append(table, line)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, line := range table {
		var shown []string
		for i, cell := range line {
			if used[i] {
				shown = append(shown, cell)
			}
		}
		if len(shown) > 0 {
			fmt.Fprintln(tw, strings.Join(shown, "\t"))
		}
	}
	return tw.Flush()
}

// ago is a time as a person says it, by how many seconds ago it was.
func ago(seconds float64) string {
	d, format := time.Duration(min(math.Abs(seconds), 1e9))*time.Second, "%s ago"
	if seconds < 0 {
		format = "in %s"
	}
	text := d.String()
	switch {
	case seconds > 1e9:
		return "long ago"
	case seconds < -1e9:
		return "never"
	case d >= 48*time.Hour:
		text = fmt.Sprintf("%dd", d/(24*time.Hour))
	case d >= time.Minute:
		text = strings.TrimSuffix(d.Truncate(time.Minute).String(), "0s")
	}
	return fmt.Sprintf(format, text)
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

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
