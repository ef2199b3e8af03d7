package outbox

import (
	"cmp"
	"database/sql"
	"errors"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/lib/pq"
)

// store is the SQL of the outbox. All times are the server's. There is no context: each statement is short, and the connection
// bounds it by PING_TIMEOUT; one that were cancelled while the server commits it would leave rows claimed by nobody.
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
	rights  string        // that the hint about a lack of rights names; "" is all
}

// place is a place in the order of rows, by the server's clock. The zero place is before all rows.
type place struct {
	runAt time.Time
	id    int64
}

// args are the parameters of after.
func (p place) args() (runAt any, id int64) {
	if p.runAt.IsZero() {
		return "-infinity", math.MinInt64
	}
	return p.runAt, p.id
}

// after is the condition that a row comes after a place. What has become due just now is always read, because transactions that
// are short commit out of order.
func after(runAt, id string) string {
	return `(run_at, id) > (least(` + runAt + `::timestamptz, now() - interval '100 milliseconds'), ` + id + `::bigint)`
}

// claimSQL takes due rows: one statement, which adds one to attempts and sets the lease. No transaction stays open.
var claimSQL = `
	with due as materialized (
		select ctid as place, octet_length(payload) as size from {table}
		where channel = $1 and failed_at is null and run_at <= now() and (leased_until is null or leased_until <= now())
			and ` + after("$5", "$6") + `
		order by run_at, id limit $2
		for update skip locked),
	summed as (select place, sum(size) over (rows unbounded preceding) - size as before from due)
	update {table} o set attempts = attempts + 1, lease = $4, leased_until = now() + $3 * interval '1 second'
	from summed where o.ctid = summed.place and summed.before < $7
	returning o.id, coalesce(o.event_id::text, o.id::text), o.payload, o.attempts, coalesce(o.schedule, ''), o.key is not null,
		o.xmin::text, o.leased_until::text, extract(epoch from o.run_at)::float8, extract(epoch from coalesce(o.due_at, o.run_at))::float8,
		extract(epoch from o.created_at)::float8`

// claim takes up to n due rows after a place, but no more once their payloads have s.bytes.
func (s store) claim(n int, from place) ([]job, error) {
	began := time.Now()
	runAt, id := from.args()
	rows, err := s.db.Query(s.table.sql(claimSQL), s.channel, n, s.lease.Seconds(), s.owner, runAt, id, s.bytes)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	jobs := make([]job, 0, min(n, 100))
	for rows.Next() {
		j := job{claimed: began}
		var runAt, due, created float64
		if err := rows.Scan(&j.id, &j.event, &j.payload, &j.attempts, &j.schedule, &j.keyed, &j.xmin, &j.until, &runAt, &due, &created); err != nil {
			return nil, err
		}
		j.runAt, j.due, j.created = fromEpoch(runAt), fromEpoch(due), fromEpoch(created)
		jobs = append(jobs, j)
	}
	// UPDATE returns rows as it comes upon them.
	slices.SortFunc(jobs, func(a, b job) int { return cmp.Or(a.runAt.Compare(b.runAt), cmp.Compare(a.id, b.id)) })
	return jobs, rows.Err()
}

// nextDue is how long it is until the next row after a place is due or its lease ends, which may be past; an hour if there is
// none. now is the server's time when it began to look, and took how long that took.
func (s store) nextDue(from place) (wait time.Duration, now time.Time, took time.Duration, err error) {
	runAt, id := from.args()
	var next sql.NullFloat64
	var seconds float64
	err = s.db.QueryRow(s.table.sql(`
		select extract(epoch from next - clock_timestamp())::float8, now(), extract(epoch from clock_timestamp() - now())::float8
		from (select least(
			(select min(run_at) from {table} where channel = $1 and failed_at is null and run_at > now()),
			(select min(coalesce(leased_until, run_at)) from {table} where channel = $1 and failed_at is null and run_at <= now()
				and `+after("$2", "$3")+`)) as next offset 0) looked`), s.channel, runAt, id).Scan(&next, &now, &seconds)
	took = time.Duration(seconds * float64(time.Second))
	if err != nil || !next.Valid {
		return time.Hour, now, took, err
	}
	return time.Duration(max(-1, min(next.Float64, 3600)) * float64(time.Second)), now, took, nil
}

// complete deletes rows that have neither key nor schedule, if they are still ours, and returns how many were. Of these rows attempts
// never begin again.
func (s store) complete(ids []int64, attempts int) (int, error) {
	return s.exec(`delete from {table} where id = any($1) and attempts = $2 and lease = $3`, pq.Int64Array(ids), attempts, s.owner)
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
	var ids, attempts pq.Int64Array
	var waits, nexts pq.Float64Array
	var failed pq.BoolArray
	var texts, xmins, untils pq.StringArray
	for _, r := range rows {
		ids, attempts, xmins, untils = append(ids, r.id), append(attempts, int64(r.attempts)), append(xmins, r.xmin), append(untils, r.until)
		waits, failed, texts = append(waits, r.wait.Seconds()), append(failed, r.failed), append(texts, r.text)
		next := 0.0
		if !r.runAt.IsZero() {
			next = float64(r.runAt.UnixMicro()) / 1e6
		}
		nexts = append(nexts, next)
	}
	// Only whoever copies needs the right to insert.
	copied := `copied as (
			insert into {table} (event_id, channel, payload, attempts, run_at, last_error, created_at, failed_at, key, due_at)
			select o.event_id, o.channel, o.payload, o.attempts, o.run_at, r.text, o.created_at, now(), o.key, o.due_at
			from held join {table} o on o.ctid = held.place join r on r.id = held.id
			where held.ours and not held.changed and r.failed and r.next > 0),`
	if !slices.ContainsFunc(rows, func(r ending) bool { return r.failed && !r.runAt.IsZero() }) {
		copied = ""
	}
	found, err := s.db.Query(s.table.sql(`
		with r as materialized (
			select * from unnest($1::bigint[], $2::int[], $3::text[], $4::float8[], $5::float8[], $6::bool[], $7::text[], $9::timestamptz[])
				as r (id, attempts, was, wait, next, failed, text, until)),
		held as materialized (
			select o.ctid as place, o.id, o.xmin::text <> r.was as changed,
				o.lease = $8 and o.leased_until = r.until and (o.attempts = r.attempts or o.attempts = -1) as ours
			from {table} o join r on o.id = r.id
			for update of o skip locked),
		`+copied+`
		updated as (
			update {table} o set
				lease = null, leased_until = null,
				attempts = case when held.changed then least(o.attempts, 0) when r.next > 0 then 0 else o.attempts end,
				run_at = case when held.changed then o.run_at when r.next > 0 then to_timestamp(r.next) when r.failed then o.run_at
					else now() + r.wait * interval '1 second' end,
				due_at = case when held.changed or r.next > 0 then null else coalesce(o.due_at, o.run_at) end,
				event_id = case when not held.changed and r.next > 0 then gen_random_uuid() else o.event_id end,
				last_error = case when held.changed then o.last_error else nullif(r.text, '') end,
				failed_at = case when not held.changed and r.failed and r.next = 0 then now() end
			from held join r on r.id = held.id
			where o.ctid = held.place and held.ours and (held.changed or r.next > 0 or r.text <> '')
			returning o.id),
		deleted as (
			delete from {table} o using held join r on r.id = held.id
			where o.ctid = held.place and held.ours and not held.changed and r.next = 0 and r.text = ''
			returning o.id)
		select r.id, case
			when held.id is null then case when exists (select from {table} o where o.id = r.id) then 'locked' else 'lost' end
			when not held.ours then 'lost'
			when written.id is null then 'locked' -- it was changed just before it was locked here
			when held.changed then 'changed' else 'ended' end
		from r left join held on held.id = r.id
		left join (select id from updated union all select id from deleted) written on written.id = r.id`),
		ids, attempts, xmins, waits, nexts, failed, texts, s.owner, untils)
	if err != nil {
		return nil, err
	}
	return byKey[int64, fate](found)
}

// byKey reads rows of a key and a value.
func byKey[K comparable, V any](rows *sql.Rows) (map[K]V, error) {
	defer rows.Close()
	all := map[K]V{}
	for rows.Next() {
		var key K
		var value V
		if err := rows.Scan(&key, &value); err != nil {
			return nil, err
		}
		all[key] = value
	}
	return all, rows.Err()
}

// giveBack undoes the claim of rows, and rings for whoever else listens. A row that was a try goes behind all that are due, so
// that the next try is another.
func (s store) giveBack(jobs []job) error {
	var ids, attempts pq.Int64Array
	var tries pq.BoolArray
	var untils pq.StringArray
	ring := false
	for _, j := range jobs {
		ids, attempts, tries, untils = append(ids, j.id), append(attempts, int64(j.attempts)), append(tries, j.try), append(untils, j.until)
		ring = ring || !j.try
	}
	_, err := s.exec(`
		with held as materialized (
			select o.ctid as place, r.try
			from {table} o join unnest($1::bigint[], $2::int[], $3::bool[], $7::timestamptz[]) as r (id, attempts, try, until) on o.id = r.id
			where o.lease = $4 and o.attempts = r.attempts and o.leased_until = r.until
			for update of o skip locked),
		back as (
			update {table} o set lease = null, leased_until = null, attempts = o.attempts - 1,
				run_at = case when held.try then now() else o.run_at end,
				due_at = case when held.try then coalesce(o.due_at, o.run_at) else o.due_at end
			from held where o.ctid = held.place
			returning 1)
		select pg_notify($5, '') from (select 1 from back limit 1) one where $6`, ids, attempts, tries, s.owner, s.channel, ring, untils)
	return err
}

// now is the time of the server.
func (s store) now() (now time.Time, err error) {
	err = s.db.QueryRow("select clock_timestamp()").Scan(&now)
	return now, err
}

// keepSchedule makes sure that the channel has one row of this key with a schedule, or that it has none when the schedule is "".
func (s store) keepSchedule(key, schedule string) error {
	if schedule == "" {
		_, err := s.exec(`delete from {table} where channel = $1 and key = $2 and failed_at is null`, s.channel, key)
		return err
	}
	_, err := s.exec(`insert into {table} as o (channel, key, schedule) values ($1, $2, $3)
		on conflict (channel, key) where failed_at is null
		do update set schedule = excluded.schedule where o.schedule is distinct from excluded.schedule`, s.channel, key, schedule)
	return err
}

// rowCounts are this channel's rows.
type rowCounts struct {
	due, delayed, failed int       // due: waiting, or being handled; delayed: for later, or to be tried again
	oldest               time.Time // since when the oldest of those that are due has been; zero without any
}

func (s store) count() (c rowCounts, err error) {
	var oldest sql.NullFloat64
	err = s.db.QueryRow(s.table.sql(`
		select count(*) filter (where run_at <= now()), count(*) filter (where run_at > now()),
			extract(epoch from min(run_at) filter (where run_at <= now()))::float8,
			(select count(*) from {table} where channel = $1 and failed_at is not null)
		from {table} where channel = $1 and failed_at is null`), s.channel).Scan(&c.due, &c.delayed, &oldest, &c.failed)
	if oldest.Valid {
		c.oldest = fromEpoch(oldest.Float64)
	}
	return c, err
}

// fromEpoch is a time of the server, which may be minus infinity.
func fromEpoch(seconds float64) time.Time {
	const bound = 1 << 40
	return time.UnixMicro(int64(math.Round(max(-bound, min(seconds, bound)) * 1e6)))
}

// alive returns which of some rows are still to be handled.
func (s store) alive(ids []int64) ([]int64, error) {
	var alive pq.Int64Array
	err := s.db.QueryRow(s.table.sql("select array_agg(id) from {table} where id = any($1) and failed_at is null"), pq.Int64Array(ids)).Scan(&alive)
	return alive, err
}

// strangers returns channels whose rows have been due for minutes although none of handled, which are those of this listener, is
// their channel; with how many rows each has, up to a thousand. It reads one index entry a channel.
func (s store) strangers(handled []string) (map[string]int, error) {
	rows, err := s.db.Query(s.table.sql(`
		with recursive c (channel) as (
			(select channel from {table} where failed_at is null order by channel limit 1)
			union all
			select (select o.channel from {table} o where o.failed_at is null and o.channel > c.channel order by o.channel limit 1)
			from c where c.channel is not null)
		select channel, (select count(*) from (select from {table} o
			where o.channel = c.channel and o.failed_at is null and o.run_at < now() - interval '2 minutes' limit 1000) due)
		from c where channel <> all($1) limit 100`), pq.StringArray(handled))
	if err != nil {
		return nil, err
	}
	found, err := byKey[string, int](rows)
	maps.DeleteFunc(found, func(_ string, n int) bool { return n == 0 })
	return found, err
}

// holder returns who has the oldest snapshot, which keeps vacuum from removing dead rows, and which snapshot; "" if nobody has one.
// Every role may see this of all sessions.
func (s store) holder() (who, snapshot string, err error) {
	err = s.db.QueryRow(`
		select who, xmin::text
		from (
			select format('session %s of %s', pid, usename) || coalesce(', ' || nullif(application_name, ''), ''), backend_xmin
			from pg_stat_activity where backend_xmin is not null and pid <> pg_backend_pid()
			union all select format('prepared transaction %L of %s', gid, owner), transaction from pg_prepared_xacts
			union all select format('replication slot %s', slot_name), xmin from pg_replication_slots where xmin is not null
		) held (who, xmin)
		order by age(xmin) desc limit 1`).Scan(&who, &snapshot)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return who, snapshot, err
}

// verify is a statement that fails when the table cannot be used.
const verify = `
	with fits as (select ctid, id::bigint, event_id::uuid, channel::text, payload::text, attempts::int, run_at::timestamptz, last_error::text,
		created_at::timestamptz, failed_at::timestamptz, key::text, schedule::text, due_at::timestamptz, lease::uuid, leased_until::timestamptz
		from {table} where false),
	claims as (update {table} set attempts = attempts, run_at = run_at, last_error = last_error, failed_at = failed_at where false returning 1),
	completes as (delete from {table} where false returning 1)
	select 1 from fits, claims, completes`

// fit returns why the table cannot be used.
func (s store) fit() error {
	_, err := s.exec(verify)
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
