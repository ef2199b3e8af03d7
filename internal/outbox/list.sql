json_strip_nulls(json_build_object(
	'id', o.id, 'event', coalesce(o.event_id::text, o.id::text), 'channel', o.channel, 'state', {state}, 'attempts', greatest(o.attempts, 0),
	'failed_at', o.failed_at, 'run_at', o.run_at, 'leased_until', case when o.leased_until > now() then o.leased_until end,
	'last_error', o.last_error, 'key', o.key, 'schedule', o.schedule, 'created_at', o.created_at))::text,
extract(epoch from now())::float8 - extract(epoch from coalesce(o.failed_at, case when o.leased_until > now() then o.leased_until end, o.run_at))::float8,
extract(epoch from now())::float8 - extract(epoch from o.created_at)::float8
