-- Who has the oldest snapshot, which keeps vacuum from removing dead rows, and his name with that of the snapshot; '' if nobody has
-- one. Every role may see this of all sessions.
select coalesce(who, ''), coalesce(who || ' ' || xmin::text, '')
from (select) always left join (
	select format('session %s of %s', pid, usename) || coalesce(', ' || nullif(application_name, ''), ''), backend_xmin
	from pg_stat_activity where backend_xmin is not null and pid <> pg_backend_pid()
	union all select format('prepared transaction %L of %s', gid, owner), transaction from pg_prepared_xacts
	union all select format('replication slot %s', slot_name), xmin from pg_replication_slots where xmin is not null
) held (who, xmin) on true
order by age(xmin) desc limit 1
