-- What to do about the relation $1, which does not fit: $2 is what a person calls it, and $3 makes the table.
select case
	when relkind in ('r', 'p') then 'it is older than this program, or another table: bring it up to date: ' || $3::text
	else format('OUTBOX_TABLE must be a table, and %s is %s; name the table itself', $2::text, case relkind when 'v' then 'a view'
		when 'm' then 'a materialized view' when 'f' then 'a foreign table' when 'S' then 'a sequence' else 'none' end) end
from pg_class where oid = to_regclass($1)
