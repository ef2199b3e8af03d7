-- The channels but $1, with how many rows of each have been due for minutes, up to a thousand. It reads one index entry a channel.
with recursive c (channel) as (
	(select channel from {table} where failed_at is null order by channel limit 1)
	union all
	select (select o.channel from {table} o where o.failed_at is null and o.channel > c.channel order by o.channel limit 1)
	from c where c.channel is not null)
select channel, (select count(*) from (select from {table} o
	where o.channel = c.channel and o.failed_at is null and o.run_at < now() - interval '2 minutes' limit 1000) due)
from c where channel <> all($1) limit 100
