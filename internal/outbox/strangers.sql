-- The channels but $1, which are those of this listener, with how many rows of each have been due for minutes, up to a thousand. It reads one index entry a
-- channel, and returns JSON.
with recursive c (channel) as (
	(select channel from {table} where failed_at is null order by channel limit 1)
	union all
	select (select o.channel from {table} o where o.failed_at is null and o.channel > c.channel order by o.channel limit 1)
	from c where c.channel is not null)
select coalesce(json_object_agg(channel, rows), '{}')
from (select channel from c where channel <> all($1) limit 100) c cross join lateral (
	select count(*) as rows from (select from {table} o
		where o.channel = c.channel and o.failed_at is null and o.run_at < now() - interval '2 minutes' limit 1000) due) counted
where rows > 0
