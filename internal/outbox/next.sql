-- When the next row of channel $1 after the place ($2, $3) is due, or its lease ends: in how many seconds, from -1 to an hour; the
-- server's time when it began to look, and how long it took. The order is for the planner: see steer in store.go.
select extract(epoch from next - clock_timestamp())::float8, now(), extract(epoch from clock_timestamp() - now())::float8
from (select greatest(now() - interval '1 second', least(now() + interval '1 hour',
	(select run_at from {table} where channel = $1 and failed_at is null and run_at > now() order by run_at, id limit 1),
	(select min(at) from (
		select coalesce(leased_until, run_at) as at from {table} where channel = $1 and failed_at is null and run_at <= now()
			and (run_at, id) > (least($2::timestamptz, now() - interval '100 milliseconds'), $3::bigint)
		order by run_at, id offset 0) due))) as next offset 0) looked
