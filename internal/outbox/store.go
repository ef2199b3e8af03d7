package outbox

import (
	"cmp"
	"database/sql"
	"slices"
	"time"

	"github.com/lib/pq"
)

// store is the SQL of the outbox. All times are the server's. There is no
// context: each statement is short, and the connection bounds it by PING_TIMEOUT; one that were
// cancelled while the server commits it would leave rows claimed by nobody.
type store struct {
	db      *sql.DB
	table   table
	channel string
	lease   time.Duration
}

// claim takes up to n due rows: one statement, which adds one to attempts and
// sets run_at to the end of the lease. No transaction stays open.
func (s store) claim(n int) ([]job, error) {
	began := time.Now()
	rows, err := s.db.Query(s.table.sql(`
		with due as materialized (
			select ctid as place, run_at as was from {table}
			where channel = $1 and failed_at is null and run_at <= now()
			order by run_at, id limit $2
			for update skip locked)
		update {table} o set attempts = attempts + 1, run_at = now() + $3 * interval '1 second'
		from due where o.ctid = due.place
		returning o.id, o.payload, o.attempts, due.was::text, extract(epoch from due.was)::float8`), s.channel, n, s.lease.Seconds())
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	jobs := make([]job, 0, min(n, 100))
	for rows.Next() {
		j := job{claimed: began}
		if err := rows.Scan(&j.id, &j.payload, &j.attempts, &j.runAt, &j.order); err != nil {
			return nil, err
		}
		jobs = append(jobs, j)
	}
	// UPDATE returns rows as it comes upon them.
	slices.SortFunc(jobs, func(a, b job) int { return cmp.Or(cmp.Compare(a.order, b.order), cmp.Compare(a.id, b.id)) })
	return jobs, rows.Err()
}

// nextDue is how long it is until the next row is due, which may be past; an hour if there is none.
func (s store) nextDue() (time.Duration, error) {
	var seconds sql.NullFloat64
	err := s.db.QueryRow(s.table.sql(`
		select extract(epoch from min(run_at) - clock_timestamp()) from {table}
		where channel = $1 and failed_at is null`), s.channel).Scan(&seconds)
	if err != nil || !seconds.Valid {
		return time.Hour, err
	}
	return min(time.Duration(seconds.Float64*float64(time.Second)), time.Hour), nil
}

// complete deletes rows that are still ours, and returns how many were.
func (s store) complete(ids []int64, attempts int) (int, error) {
	return s.exec(`delete from {table} where id = any($1) and attempts = $2`, pq.Int64Array(ids), attempts)
}

// reschedule writes failures to rows that are still ours, and returns how many were.
func (s store) reschedule(rows []again) (int, error) {
	var ids, attempts pq.Int64Array
	var waits pq.Float64Array
	var failed pq.BoolArray
	var texts pq.StringArray
	for _, r := range rows {
		ids, attempts = append(ids, r.id), append(attempts, int64(r.attempts))
		waits, failed, texts = append(waits, r.wait.Seconds()), append(failed, r.failed), append(texts, r.text)
	}
	return s.exec(`
		update {table} o set
			run_at = now() + r.wait * interval '1 second',
			last_error = r.text,
			failed_at = case when r.failed then now() end
		from unnest($1::bigint[], $2::int[], $3::float8[], $4::bool[], $5::text[]) as r (id, attempts, wait, failed, text)
		where o.id = r.id and o.attempts = r.attempts`, ids, attempts, waits, failed, texts)
}

// giveBack undoes the claim of rows, and rings for whoever else listens.
func (s store) giveBack(jobs []job) error {
	if len(jobs) == 0 {
		return nil
	}
	var ids, attempts pq.Int64Array
	var was pq.StringArray
	for _, j := range jobs {
		ids, attempts, was = append(ids, j.id), append(attempts, int64(j.attempts)), append(was, j.runAt)
	}
	_, err := s.exec(`
		with back as (
			update {table} o set attempts = o.attempts - 1, run_at = r.was
			from unnest($1::bigint[], $2::int[], $3::timestamptz[]) as r (id, attempts, was)
			where o.id = r.id and o.attempts = r.attempts
			returning 1)
		select pg_notify($4, '') from (select 1 from back limit 1) one`, ids, attempts, was, s.channel)
	return err
}

// count counts this channel's rows. delayed are those that are scheduled, to be tried again or being handled.
func (s store) count() (waiting, delayed, dead int, oldest time.Duration, err error) {
	var seconds float64
	err = s.db.QueryRow(s.table.sql(`
		select count(*) filter (where run_at <= now()), count(*) filter (where run_at > now()),
			coalesce(extract(epoch from now() - min(run_at) filter (where run_at <= now())), 0),
			(select count(*) from {table} where channel = $1 and failed_at is not null)
		from {table} where channel = $1 and failed_at is null`), s.channel).Scan(&waiting, &delayed, &seconds, &dead)
	return waiting, delayed, dead, time.Duration(seconds * float64(time.Second)), err
}

// fit returns why the table cannot be used.
func (s store) fit() error {
	_, err := s.exec(`
		with fits as (select id::bigint, channel::text, payload::text, attempts::int, run_at::timestamptz, last_error::text, failed_at::timestamptz from {table} where false),
		claims as (update {table} set attempts = attempts, run_at = run_at, last_error = last_error, failed_at = failed_at where false returning 1),
		completes as (delete from {table} where false returning 1)
		select 1 from fits, claims, completes`)
	return err
}

func (s store) exec(query string, args ...any) (int, error) {
	res, err := s.db.Exec(s.table.sql(query), args...)
	if err != nil {
		return 0, err
	}
	n, err := res.RowsAffected()
	return int(n), err
}
