-- How many rows of channel $1 are due and delayed, since when the oldest is due, how many have failed, and which of
-- the rows $2 have not.
select count(*) filter (where run_at <= now()), count(*) filter (where run_at > now()),
	extract(epoch from min(run_at) filter (where run_at <= now()))::float8,
	(select count(*) from {table} where channel = $1 and failed_at is not null),
	(select array_agg(id) from {table} where id = any($2) and failed_at is null)
from {table} where channel = $1 and failed_at is null
