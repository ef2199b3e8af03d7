-- The rows of a kind: $1 are groups (failed, waiting, scheduled) or states, or null; those with the ids $2, or else of channel $3, or
-- of all if both are null; at most $4 of each channel. It reads little more than it returns, however large the table is.
with recursive failing (channel) as (
	(select channel from {table} where failed_at is not null order by channel limit 1)
	union all
	select (select o.channel from {table} o where o.failed_at is not null and o.channel > c.channel order by o.channel limit 1)
	from failing c where c.channel is not null),
others (channel) as (
	(select channel from {table} where failed_at is null order by channel limit 1)
	union all
	select (select o.channel from {table} o where o.failed_at is null and o.channel > c.channel order by o.channel limit 1)
	from others c where c.channel is not null),
found as (
	select o.* from failing c cross join lateral (
		select * from {table} o where o.channel = c.channel and o.failed_at is not null order by o.failed_at desc, o.id desc limit $4) o
	where $2::bigint[] is null and c.channel = coalesce($3, c.channel) and ($1::text[] is null or 'failed' = any($1))
	union all
	select o.* from others c cross join lateral (
		select * from {table} o where o.channel = c.channel and o.failed_at is null and {kind} and ('retrying' = any($1) is not true or o.run_at > now())
		order by o.run_at, o.id limit $4) o
	where $2 is null and c.channel = coalesce($3, c.channel) and $1 is distinct from array['failed']
	union all
	select o.* from {table} o where o.id = any($2) and {kind})
