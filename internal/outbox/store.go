package outbox

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// store is the SQL of the outbox. All times are the server's. There is no context: each statement is short, and one that were cancelled
// while the server commits it would leave rows claimed by nobody.
//
// A row is ours while lease, attempts and leased_until are what they were when it was claimed: every claim changes one of them, and an
// upsert none. leased_until is needed where attempts may have begun again. Whether an upsert has changed it since is seen by its xmin.
type store struct {
	db      *sql.DB
	table   table
	channel string
	owner   string        // what stands in lease: of this process and channel
	lease   time.Duration // how long a claim lasts
	bytes   int64         // of payloads that one claim takes
	timeout time.Duration // of the server's answer; the connection itself gives up after PING_TIMEOUT
	rights  string        // that the hint about a lack of rights names; "" is all
}

// limit is the timeout of a store. A server does not notice that a connection has ended while a statement waits for a lock, so what has
// locked the table would collect sessions of ours until none were left: such a statement is cancelled just before its connection ends.
func limit(pingTimeout time.Duration) time.Duration { return pingTimeout * 9 / 10 }

//go:embed *.sql
var files embed.FS

// statement returns the SQL in a file beside this one.
func statement(name string) string {
	text, err := files.ReadFile(name + ".sql")
	if err != nil {
		panic(err) // it was there when this was built, or not
	}
	return string(text)
}

// place is a place in the order of rows, by the server's clock. The zero place is before all rows.
type place struct {
	runAt time.Time
	id    int64
}

// args are the place as parameters.
func (p place) args() (runAt any, id int64) {
	if p.runAt.IsZero() || p.runAt.Unix() <= -1<<40 { // which epoch makes of minus infinity
		return "-infinity", cmp.Or(p.id, math.MinInt64)
	}
	return p.runAt, p.id
}

// claim takes up to n due rows after a place, but no more once their payloads have s.bytes: it says whether they have. It lasts longer by
// slack, as if it had been made so much later.
func (s store) claim(n int, from place, slack time.Duration) (jobs []job, cut bool, err error) {
	began, size := time.Now().Add(slack), int64(0)
	runAt, id := from.args()
	err = s.after(from, statement("claim"), []any{s.channel, n, (s.lease + slack).Seconds(), s.owner, runAt, id, s.bytes}, func(rows *sql.Rows) error {
		j := job{claimed: began}
		err := rows.Scan(&j.id, &j.event, &j.payload, &j.attempts, &j.schedule, &j.keyed, &j.xmin, &j.lost, &j.until,
			(*epoch)(&j.runAt), (*epoch)(&j.due), (*epoch)(&j.created))
		jobs, size = append(jobs, j), size+int64(len(j.payload))
		return err
	})
	// UPDATE returns rows as it comes upon them.
	slices.SortFunc(jobs, func(a, b job) int { return cmp.Or(a.runAt.Compare(b.runAt), cmp.Compare(a.id, b.id)) })
	return jobs, size >= s.bytes, err
}

// nextDue is how long it is until the next row after a place is due or its lease ends, which may be past; an hour if there is
// none. now is the server's time when it began to look, and took how long that took.
func (s store) nextDue(from place) (wait time.Duration, now time.Time, took time.Duration, err error) {
	runAt, id := from.args()
	var seconds, looked float64
	err = s.after(from, statement("next"), []any{s.channel, runAt, id}, func(rows *sql.Rows) error { return rows.Scan(&seconds, &now, &looked) })
	return time.Duration(seconds * float64(time.Second)), now, time.Duration(looked * float64(time.Second)), err
}

// steer keeps the planner to the index of due rows, which has their order. A table of which dead rows cannot be removed looks empty
// to it once autovacuum has analyzed it, and then to read another index from end to end and sort seems as good.
const steer = "set local enable_sort = off; set local enable_seqscan = off; set local enable_bitmapscan = off"

// after runs a query about rows after a place, and steers it unless that is the beginning.
func (s store) after(from place, query string, args []any, each func(*sql.Rows) error) error {
	if !from.runAt.IsZero() {
		return s.transact(false, fmt.Sprint(steer, "; set local lock_timeout = ", s.timeout.Milliseconds()), query, args, each)
	}
	return s.query(query, each, args...)
}

// query runs a statement and calls each for its rows.
func (s store) query(query string, each func(*sql.Rows) error, args ...any) error {
	c, err := s.db.Conn(context.Background()) // other channels use it, each for so long at most
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	timer := time.AfterFunc(s.timeout, cancel)
	rows, err := c.QueryContext(ctx, s.table.sql(query), args...)
	timer.Stop() // the first row is here: no lock is waited for, and the others may take long on a slow link
	if err = forEach(rows, err, each); err != nil && ctx.Err() != nil {
		return fmt.Errorf("no answer within %v, as when somebody has locked the table: %w", s.timeout, context.DeadlineExceeded)
	}
	return err
}

// transact runs a query in a transaction with settings of its own, for behind a pooler no session is ours, and calls each for its rows.
func (s store) transact(readOnly bool, settings, query string, args []any, each func(*sql.Rows) error) error {
	tx, err := s.db.BeginTx(context.Background(), &sql.TxOptions{ReadOnly: readOnly})
	if pq.As(err, pqerror.FeatureNotSupported) != nil {
		return errors.New("the server is a standby, where rows can only be listed; DATABASE_URL must name the primary")
	} else if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // of what is not committed
	// A server that is not told of our end would hold the rows for hours.
	if _, err = tx.Exec(fmt.Sprint(settings, "; set local idle_in_transaction_session_timeout = ", 2*s.timeout.Milliseconds())); err != nil {
		return err
	}
	rows, err := tx.Query(s.table.sql(query), args...)
	if err = forEach(rows, err, each); err == nil {
		err = tx.Commit()
	}
	return err
}

// forEach calls each for the rows of a query, until one returns an error.
func forEach(rows *sql.Rows, err error, each func(*sql.Rows) error) error {
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() && err == nil {
		err = each(rows)
	}
	return errors.Join(err, rows.Err())
}

// complete deletes rows that have neither key nor schedule, if they are still ours, and returns how many were. Of these rows attempts
// never begin again. When one of them is locked it fails with pqerror.LockNotAvailable.
func (s store) complete(rows []result, attempts int) (n int, err error) {
	err = s.query(statement("complete"), func(r *sql.Rows) error { return r.Scan(&n) }, column(rows, func(r result) int64 { return r.id }), attempts, s.owner)
	return n, err
}

// ending is what becomes of a row that is not simply deleted.
type ending struct {
	job
	runAt  time.Time     // its next time; zero without a schedule
	wait   time.Duration // until it is tried again
	failed bool          // it is given up
	text   string        // why it has failed; "" if it is done
}

// fate is what end has done with a row.
type fate string

const (
	ended   fate = "ended"   // as it was to be
	changed fate = "changed" // it was changed while its handler ran, and is due again
	locked  fate = "locked"  // an open transaction holds it: try again
	lost    fate = "lost"    // it is no longer ours
)

// end writes what became of rows: done, tried again, failed, or moved to their next time. A row that was changed while its
// handler ran is released instead. One that an open transaction has locked is left alone, so that it holds up none of the others.
// fates are by id.
func (s store) end(rows []ending) (fates map[int64]fate, err error) {
	copied := "" // only whoever copies needs the right to insert
	if slices.ContainsFunc(rows, func(r ending) bool { return r.failed && !r.runAt.IsZero() }) {
		copied = statement("copy")
	}
	return byKey[int64, fate](s, strings.Replace(statement("end"), "{copied}", copied, 1),
		column(rows, func(r ending) int64 { return r.id }), column(rows, func(r ending) int { return r.attempts }),
		column(rows, func(r ending) string { return r.xmin }), column(rows, func(r ending) string { return r.until }), s.owner,
		column(rows, func(r ending) float64 { return r.wait.Seconds() }),
		column(rows, func(r ending) float64 { return float64(r.runAt.UnixMicro()) / 1e6 }), // below 0 for the zero time
		column(rows, func(r ending) bool { return r.failed }), column(rows, func(r ending) string { return r.text }))
}

// column is an array of a statement: what of says of each row.
func column[R, V any](rows []R, of func(R) V) any {
	values := make([]V, len(rows))
	for i, r := range rows {
		values[i] = of(r)
	}
	return pq.Array(values)
}

// byKey runs a statement that returns one JSON object.
func byKey[K comparable, V any](s store, query string, args ...any) (all map[K]V, err error) {
	var object []byte
	if err = s.query(query, func(r *sql.Rows) error { return r.Scan(&object) }, args...); err == nil {
		err = json.Unmarshal(object, &all)
	}
	return all, err
}

// giveBack undoes the claim of rows, and rings for whoever else listens. A row that was a try goes behind all that are due, so
// that the next try is another.
func (s store) giveBack(jobs []job) error {
	return s.exec(statement("giveback"), column(jobs, func(j job) int64 { return j.id }), column(jobs, func(j job) int { return j.attempts }),
		column(jobs, func(j job) bool { return j.try }), column(jobs, func(j job) string { return j.until }), s.owner, s.channel)
}

// now is the time of the server.
func (s store) now() (now time.Time, err error) {
	err = s.query("select clock_timestamp()", func(r *sql.Rows) error { return r.Scan(&now) })
	return now, err
}

// keepSchedule makes sure that the channel has one row of this key with a schedule, or that it has none when the schedule is "".
func (s store) keepSchedule(key, schedule string) error {
	if schedule == "" {
		return s.exec(`delete from {table} where channel = $1 and key = $2 and failed_at is null`, s.channel, key)
	}
	// A conflict alone would wait for whoever has locked the row.
	return s.exec(`insert into {table} as o (channel, key, schedule) select $1, $2, $3 where not exists (select from {table}
		where channel = $1 and key = $2 and schedule = $3 and failed_at is null) on conflict (channel, key) where failed_at is null
		do update set schedule = excluded.schedule where o.schedule is distinct from excluded.schedule`, s.channel, key, schedule)
}

// rowCounts are this channel's rows.
type rowCounts struct {
	due, delayed, failed int       // due: waiting, or being handled; delayed: for later, or to be tried again
	oldest               time.Time // since when the oldest of those that are due has been; zero without any
}

// count also returns which of some rows are still to be handled.
func (s store) count(retrying []int64) (c rowCounts, alive pq.Int64Array, err error) {
	err = s.query(statement("count"), func(r *sql.Rows) error { return r.Scan(&c.due, &c.delayed, (*epoch)(&c.oldest), &c.failed, &alive) },
		s.channel, pq.Int64Array(retrying), s.owner)
	return c, alive, err
}

// epoch is a time of the server, scanned from its seconds since 1970, which may be minus infinity. Null leaves it zero.
type epoch time.Time

func (e *epoch) Scan(seconds any) error {
	if s, ok := seconds.(float64); ok {
		const bound = 1 << 40
		*e = epoch(time.UnixMicro(int64(math.Round(max(-bound, min(s, bound)) * 1e6))))
	}
	return nil
}

func (s store) exec(query string, args ...any) error {
	return s.query(query, func(*sql.Rows) error { return nil }, args...)
}
