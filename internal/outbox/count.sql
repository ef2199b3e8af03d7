-- How many rows of channel $1 are due and not leased to anybody but $3, how many are delayed, since when the oldest of the due ones is,
-- how many have failed, and which of the rows $2 have not.
select count(*) filter (where due), count(*) filter (where run_at > now()), extract(epoch from min(run_at) filter (where due))::float8,
	(select count(*) from {table} where channel = $1 and failed_at is not null),
	(select array_agg(id) from {table} where id = any($2) and failed_at is null)
from (select run_at, run_at <= now() and (leased_until is null or leased_until <= now() or lease = $3) as due
	from {table} where channel = $1 and failed_at is null) o
