-- Takes up to $2 due rows of channel $1 after the place ($5, $6), but no more once their payloads have $7 bytes: it adds one to
-- attempts, and leases them to $4 for $3 seconds. No transaction stays open. What has become due just now is always read, because
-- transactions that are short commit out of order. A ctid is unique within one physical table: partitions and children repeat it.
with due as materialized (
	select ctid as place, tableoid as part, octet_length(payload) as size, lease is not null as lost from {table}
	where channel = $1 and failed_at is null and run_at <= now() and (leased_until is null or leased_until <= now())
		and (run_at, id) > (least($5::timestamptz, now() - interval '100 milliseconds'), $6::bigint)
	order by run_at, id limit $2
	for update skip locked),
summed as (select place, part, lost, sum(size) over (rows unbounded preceding) - size as before from due)
update {table} o set lease = $4, leased_until = now() + $3 * interval '1 second',
	attempts = attempts + case when schedule is not null and attempts = 0 and lease is not null then 0 else 1 end -- its first time is yet to be found
from summed where o.ctid = summed.place and o.tableoid = summed.part and summed.before < $7
returning o.id, coalesce(o.event_id::text, o.id::text), o.payload, o.attempts, coalesce(o.schedule, ''), o.key is not null,
	o.xmin::text, summed.lost, (select (now() + $3 * interval '1 second')::text), -- leased_until, which is dear to write, once for all rows
	date_part('epoch', o.run_at), date_part('epoch', coalesce(o.due_at, o.run_at)), date_part('epoch', o.created_at) -- extract is a numeric
