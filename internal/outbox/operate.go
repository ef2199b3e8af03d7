package outbox

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/pglistener/pglistener/internal/pgconn"
)

// Operator is a person at the command line.
type Operator struct {
	DSN, Table     string
	Timeout        time.Duration // of every answer of the server
	Operands       []string
	Stdout, Stderr io.Writer
	Fail           func(err error, code int) int // prints err and returns code
}

// Command is what a person can do with rows.
type Command struct {
	rights string   // that it needs
	query  string   // that does it, to rows that are in one of the states; "" only shows them
	states []string // nil is any
	verb   string   // what it has done
}

var (
	// Retry makes rows due that have failed or are in backoff, and rings for them.
	Retry = Command{"select, update", statement("retry"), []string{"failed", "retrying"}, "due now: "}
	// Purge deletes rows that have failed.
	Purge = Command{"select, update, delete", statement("purge"), []string{"failed"}, "deleted: "}
	// List shows rows without their payloads, which may be secret.
	List = Command{rights: "select"}
)

// errPartly ends a command of which everything has been said.
var errPartly = errors.New("not all was done")

// Run does a command and prints what it does. It returns the exit code: 0 when all is done, 1 when something is not, 2 when the
// operands make no sense.
func (p Operator) Run(ctx context.Context, c Command) int {
	what, err := parseSelection(p.Operands, c.query == "")
	t, wrong := parseTable(p.Table)
	if err = cmp.Or(err, wrong); err != nil {
		return p.Fail(err, 2)
	}
	db, err := pgconn.OpenDB(p.DSN, p.Timeout)
	if err != nil {
		return p.Fail(fmt.Errorf("DATABASE_URL: %w", err), 2)
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	s := store{db: db, table: t, rights: c.rights, timeout: limit(p.Timeout)}
	if c.query == "" {
		err = p.list(s, what)
	} else {
		err = p.change(ctx, s, what, c)
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errPartly):
		return 1
	case pq.As(err, pqerror.LockNotAvailable) != nil:
		err = errors.New("an open transaction has locked the table; try again later")
	case pgconn.IsTimeout(err):
		err = fmt.Errorf("%w: the server did not answer within PING_TIMEOUT, which is %v; PING_TIMEOUT=1m waits longer", err, p.Timeout)
	default:
		err = s.explain(err)
	}
	return p.Fail(errors.New(printable(strings.ReplaceAll(err.Error(), "\n", "; "))), 1)
}

// selection is what operands ask for: the rows ids, or else those of a channel, or of all.
type selection struct {
	states  []string // nil is any
	ids     []int64  // the newest first
	channel *string  // nil: all
	dry     bool     // only show
}

// args are the arguments of select.sql.
func (w selection) args(limit any) []any {
	return []any{pq.StringArray(w.states), pq.Int64Array(w.ids), w.channel, limit}
}

// parseSelection reads [STATE] ID...|CHANNEL|all, of which only a list may have a state and may leave out the rest. Digits are an
// id, and what follows channel= is always a channel. No error shows an operand: it may be a connection string.
func parseSelection(operands []string, list bool) (what selection, err error) {
	rest := slices.Clone(operands)
	if list && len(rest) > 0 && slices.Contains([]string{"failed", "waiting", "scheduled"}, rest[0]) {
		what.states, rest = rest[:1], rest[1:]
	} else if !list {
		rest = slices.DeleteFunc(rest, func(o string) bool { return o == "-n" })
		what.dry = len(rest) < len(operands)
	}
	if list && len(rest) == 0 || len(rest) == 1 && rest[0] == "all" {
		return what, nil
	}
	if len(rest) == 0 {
		return what, errors.New("say which rows: ID..., CHANNEL or all; -outbox-list shows them")
	}
	for i, operand := range rest {
		name, named := strings.CutPrefix(operand, "channel=")
		id, bad := strconv.ParseInt(operand, 10, 64)
		switch {
		case operand != "" && strings.Trim(operand, "0123456789") == "":
			if bad != nil {
				return what, fmt.Errorf("operand %d is too large for an id", i+1)
			}
			what.ids = append(what.ids, id)
		case !named && (strings.HasPrefix(operand, "-") || strings.ContainsAny(operand, "=:@")):
			return what, fmt.Errorf("operand %d is neither an id nor a simple name: write channel=NAME for a channel; the database is that of DATABASE_URL", i+1)
		case list && what.states == nil && len(rest) == 2:
			return what, errors.New("operand 1 is no state: those are failed, waiting and scheduled")
		case len(rest) > 1:
			return what, fmt.Errorf("operand %d is not the number of a row: several operands must all be, and a CHANNEL or all stands alone", i+1)
		case name == "" || len(name) > pgconn.MaxIdentifier:
			return what, fmt.Errorf("operand %d is no channel: a name has 1 to %d bytes", i+1, pgconn.MaxIdentifier)
		default:
			what.channel = &name
		}
	}
	slices.SortFunc(what.ids, func(a, b int64) int { return cmp.Compare(b, a) })
	what.ids = slices.Compact(what.ids)
	return what, nil
}

// query runs a statement in a transaction of its own, which waits for no lock for long, and calls each for its rows.
func (p Operator) query(s store, query string, readOnly bool, args []any, each func(*sql.Rows) error) error {
	wait := max(1, min(500, p.Timeout.Milliseconds()/2)) // for what an open transaction holds
	// Nobody may have analyzed a table that is in trouble: the planner is not to guess that reading all of it is cheap.
	return s.transact(readOnly, fmt.Sprintf(`set local lock_timeout = %d; set local timezone = 'UTC'; set local jit = off;
		set local enable_seqscan = off; set local enable_hashjoin = off; set local enable_mergejoin = off`, wait), query, args, each)
}

const batchRows = 5000 // at once, at most

// change does c to the rows of what, the newest first: of failed rows with one key it is the newest that counts.
func (p Operator) change(ctx context.Context, s store, what selection, c Command) error {
	what.states = c.states
	ids := what.ids
	now, err := s.now()
	if err == nil && ids == nil {
		err = p.query(s, statement("select")+"select id from found order by id desc", true, what.args(nil), func(r *sql.Rows) error {
			ids = append(ids, 0)
			return r.Scan(&ids[len(ids)-1])
		})
	}
	if err != nil {
		return err
	}
	became, keys, all, told := map[string][]int64{}, map[string]bool{}, len(ids), time.Now()
	for n, waits, narrowing := 100, 0, false; len(ids) > 0 && err == nil; {
		if ctx.Err() != nil {
			err = errors.New("interrupted; the same command goes on")
			break
		}
		if time.Since(told) > 2*time.Second && len(ids) > n {
			told = time.Now()
			fmt.Fprintf(p.Stderr, "%d of %d\n", all-len(ids), all)
		}
		began, part, fates := time.Now(), ids[:min(n, len(ids))], map[string][]int64{}
		err = p.query(s, c.query, false, []any{pq.Int64Array(part), now, what.dry}, func(r *sql.Rows) error {
			var id int64
			var fate, key string
			err := r.Scan(&id, &fate, &key)
			if what.dry && key != "" && keys[key] {
				fate = "key" // of a row that would have been done before
			}
			keys[key] = true
			fates[fate] = append(fates[fate], id)
			return err
		})
		if pq.As(err, pqerror.LockNotAvailable, pqerror.UniqueViolation) != nil {
			err = nil
			// Somebody has written a key of these and not committed yet, or just so: go around that row.
			if waits++; len(part) > 1 && waits <= 30 {
				n, narrowing = len(part)/2, true
				continue
			}
			fates = map[string][]int64{"locked": part}
		} else if err != nil {
			break
		}
		for fate, done := range fates {
			became[fate] = append(became[fate], done...)
		}
		ids = ids[len(part):]
		// As many at once as the server does in a small part of the time limit; half as many until the row is found that is locked.
		narrowing = narrowing && len(part) > 1
		if n = min(2*n, batchRows); narrowing || time.Since(began) > p.Timeout/20 {
			n = max(len(part)/2, 1)
		}
	}
	return cmp.Or(err, p.tell(c.verb, what, became))
}

// tell says what became of rows.
func (p Operator) tell(verb string, what selection, became map[string][]int64) (err error) {
	named := what.ids != nil
	if what.dry {
		verb = "would be " + verb
	}
	fmt.Fprintln(p.Stdout, verb+count(became["done"]))
	if len(became) == 0 && what.channel != nil {
		fmt.Fprintln(p.Stderr, "no row of a channel of that name is "+strings.Join(what.states, " or ")+"; -outbox-list shows what there is, and several ids are separated by blanks")
	}
	for _, fate := range [][2]string{
		{"locked", "skipped, an open transaction holds the row or its key; try again later"}, {"key", "skipped, another row has its key by now"},
		{"running", "left alone, its handler is running"}, {"waiting", "left alone, it waits and has not failed"}, {"missing", "there is no such row"},
	} {
		if ids := became[fate[0]]; len(ids) > 0 && (named || fate[0] == "locked" || fate[0] == "key") {
			fmt.Fprintln(p.Stderr, fate[1]+": "+count(ids))
			if named || fate[0] == "locked" {
				err = errPartly
			}
		}
	}
	return err
}

// count is how many ids there are, and the first of them.
func count(ids []int64) string {
	slices.Sort(ids)
	first := strings.Trim(fmt.Sprint(ids[:min(len(ids), 20)]), "[]")
	switch {
	case len(ids) == 0:
		return "0 rows"
	case len(ids) == 1:
		return "1 row, id " + first
	case len(ids) > 20:
		first += " ..."
	}
	return fmt.Sprintf("%d rows, ids %s", len(ids), first)
}
