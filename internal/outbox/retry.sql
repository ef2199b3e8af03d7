-- Makes the rows $1 due at $2 that have failed or are to be tried again later, unless $3. It returns what became of each, and the key that it has now.
with held as materialized (
	select o.id, o.channel, o.key, o.schedule, {state} as state from {table} o where o.id = any($1::bigint[]) for update of o skip locked),
judged as materialized (
	select h.*, h.state in ('failed', 'retrying') and (h.key is null or h.state = 'retrying' or
			case when l.id is null then row_number() over (partition by h.channel, h.key, h.state order by h.id desc) = 1
				else l.schedule is not null end) as goes,
		l.id is not null as run -- of a schedule, whose row has the key
	from held h left join lateral (
		select * from {table} l where h.state = 'failed' and l.channel = h.channel and l.key = h.key and l.failed_at is null limit 1) l on true),
done as (
	update {table} o set failed_at = null, lease = null, leased_until = null, run_at = $2,
		attempts = case when j.state = 'retrying' then o.attempts when j.schedule is null then 0 else -1 end,
		due_at = case when j.state = 'retrying' then o.due_at end,
		key = case when j.run then null else o.key end
	from judged j where o.id = j.id and j.goes and not $3
	returning o.id, o.channel)
select r.id, case
		when j.id is null then case when exists (select from {table} o where o.id = r.id) then 'locked' else 'missing' end
		when j.goes and not $3 and done.id is null then 'locked'
		when j.goes then 'done' when j.state = 'failed' then 'key' when j.state = 'running' then 'running' else 'waiting' end,
	case when j.goes and j.state = 'failed' and j.key is not null and not j.run then json_build_array(j.channel, j.key)::text else '' end
from unnest($1::bigint[]) r (id) left join judged j on j.id = r.id left join done on done.id = r.id
where (select count(pg_notify(d.channel, '')) from (select distinct channel from done) d) >= 0
