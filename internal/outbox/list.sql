-- What a person sees of the $5 most urgent rows, in columns if $6, otherwise as JSON: the latest that have failed, then the first that
-- are due. It counts all.
select o.id, case when not $6 then array[json_strip_nulls(json_build_object(
		'id', o.id, 'event', coalesce(o.event_id::text, o.id::text), 'channel', o.channel, 'state', {state}, 'attempts', greatest(o.attempts, 0),
		'failed_at', o.failed_at, 'run_at', o.run_at, 'leased_until', case when o.leased_until > now() then o.leased_until end,
		'last_error', o.last_error, 'key', o.key, 'schedule', o.schedule, 'created_at', o.created_at))::text]
	else array[o.id::text, o.channel, {state}, case when not isfinite(at) then 'never' when at > now() then 'in ' || date_trunc('second', at - now())
			else date_trunc('second', now() - at) || ' ago' end,
		greatest(o.attempts, 0)::text, coalesce(to_char(o.created_at, 'YYYY-MM-DD HH24:MI:SS'), ''), coalesce(left(o.key, 60), ''), coalesce(o.schedule, ''),
		coalesce(left(o.last_error, 120) || case when length(o.last_error) > 120 then '...' else '' end, '')] end,
	total
from (select *, count(*) over () as total, coalesce(failed_at, case when leased_until > now() then leased_until end, run_at) as at
	from found order by failed_at is null, failed_at desc, run_at, id limit $5) o
order by failed_at is null, failed_at desc, run_at, id
