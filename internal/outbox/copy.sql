-- Leaves a copy of a row that is given up and has a schedule, for a person. It is part of end.sql.
copied as (
	insert into {table} (event_id, channel, payload, attempts, run_at, last_error, created_at, failed_at, key, due_at)
	select o.event_id, o.channel, o.payload, o.attempts, o.run_at, r.text, o.created_at, now(), o.key, o.due_at
	from held join {table} o on o.ctid = held.place and o.tableoid = held.part join r on r.id = held.id
	where held.ours and not held.changed and r.failed and r.next > 0),
