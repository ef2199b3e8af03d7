-- Writes what became of the rows $1, leased to $5 until $4 at the attempts $2, which had the xmin $3 when they were claimed: to be
-- tried again in $6 seconds, next due at $7 (0 or less: has no schedule), failed or not ($8), and why ($9, '' if it is done). It
-- returns the fate of each by its id, as JSON. Rows that an open transaction has locked are left alone.
with r as materialized (
	select * from unnest($1::bigint[], $2::int[], $3::text[], $4::timestamptz[], $6::float8[], $7::float8[], $8::bool[], $9::text[])
		as r (id, attempts, was, until, wait, next, failed, text)),
held as materialized (
	select o.ctid as place, o.tableoid as part, o.id, o.xmin::text <> r.was as changed,
		coalesce(o.lease = $5 and o.leased_until = r.until, false) and (o.attempts = r.attempts or o.attempts = -1) as ours
	from {table} o join r on o.id = r.id
	for update of o skip locked),
{copied}
updated as (
	update {table} o set
		lease = null, leased_until = null,
		attempts = case when held.changed and r.attempts = 0 and o.schedule is not null then -1 -- its first time is still to be found
			when held.changed then least(o.attempts, 0) when r.next > 0 then 0 else o.attempts end,
		run_at = case when held.changed then o.run_at when r.next > 0 then to_timestamp(r.next) when r.failed then o.run_at
			else now() + r.wait * interval '1 second' end,
		due_at = case when held.changed or r.next > 0 then null else coalesce(o.due_at, o.run_at) end,
		event_id = case when not held.changed and r.next > 0 then gen_random_uuid() else o.event_id end,
		last_error = case when held.changed then o.last_error else nullif(r.text, '') end,
		failed_at = case when not held.changed and r.failed and r.next <= 0 then now() end
	from held join r on r.id = held.id
	where o.ctid = held.place and o.tableoid = held.part and held.ours and (held.changed or r.next > 0 or r.text <> '')
	returning o.id),
deleted as (
	delete from {table} o using held join r on r.id = held.id
	where o.ctid = held.place and o.tableoid = held.part and held.ours and not held.changed and r.next <= 0 and r.text = ''
	returning o.id)
select coalesce(json_object_agg(r.id, case
	when held.id is null then case when exists (select from {table} o where o.id = r.id) then 'locked' else 'lost' end
	when not held.ours then 'lost'
	when written.id is null then 'locked' -- it was changed just before it was locked here
	when held.changed then 'changed' else 'ended' end), '{}')
from r left join held on held.id = r.id
left join (select id from updated union all select id from deleted) written on written.id = r.id
