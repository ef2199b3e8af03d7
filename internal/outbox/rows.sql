-- Rows of the kind {which}, an index a channel: those of channel $1, or of all if it is null; at most $2. It reads what it
-- returns, however large the table is.
with recursive c (channel) as (
	(select o.channel from {table} o where {which} order by o.channel limit 1)
	union all
	select (select o.channel from {table} o where {which} and o.channel > c.channel order by o.channel limit 1)
	from c where c.channel is not null)
select {fields}
from c cross join lateral (
	select * from {table} o where o.channel = c.channel and {which} and {filter} order by {order} limit $2) o
where $1::text is null or c.channel = $1
order by {order} limit $2
