-- Deletes the rows $1 that have failed, unless $3. It returns what became of each; $2 is not used.
with held as materialized (
	select o.id, {state} as state from {table} o where o.id = any($1::bigint[]) for update of o skip locked),
done as (
	delete from {table} o using held h where o.id = h.id and h.state = 'failed' and not $3 returning o.id)
select r.id, case
		when h.id is null then case when exists (select from {table} o where o.id = r.id) then 'locked' else 'missing' end
		when h.state = 'failed' and not $3 and done.id is null then 'locked'
		when h.state = 'failed' then 'done' when h.state = 'running' then 'running' else 'waiting' end,
	''
from unnest($1::bigint[]) r (id) left join held h on h.id = r.id left join done on done.id = r.id
where $2::timestamptz is not null
