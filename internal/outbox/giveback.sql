-- Undoes the claim of the rows $1, leased to $5 until $4 at the attempts $2, and rings on channel $6. Those that were tries ($3) go
-- behind all that are due, so that the next try is another, and nobody is called for them.
with held as materialized (
	select o.ctid as place, o.tableoid as part, r.try
	from {table} o join unnest($1::bigint[], $2::int[], $3::bool[], $4::timestamptz[]) as r (id, attempts, try, until) on o.id = r.id
	where o.lease = $5 and o.attempts = r.attempts and o.leased_until = r.until
	for update of o skip locked),
back as (
	update {table} o set lease = null, leased_until = null, attempts = o.attempts - 1,
		run_at = case when held.try then now() else o.run_at end,
		due_at = case when held.try then coalesce(o.due_at, o.run_at) else o.due_at end
	from held where o.ctid = held.place and o.tableoid = held.part
	returning held.try)
select pg_notify($6, '') where exists (select from back where not try)
