-- Who keeps vacuum from removing dead rows here, by the oldest snapshot or transaction, and his name with that of the snapshot; '' if
-- nobody does. Every role may see this of all sessions. A vacuum keeps nothing, nor does a session of another database that only reads;
-- the transaction of one that writes there is in every snapshot that is taken here.
select coalesce(who, ''), coalesce(who || ' ' || xmin::text, '')
from (select) always left join (
	select format('session %s of %s', pid, usename) || coalesce(', ' || nullif(application_name, ''), ''),
		case when backend_xmin is null or age(backend_xid) > age(backend_xmin) then backend_xid else backend_xmin end
	from pg_stat_activity where pid <> pg_backend_pid() and pid not in (select pid from pg_stat_progress_vacuum)
		and (backend_xid is not null or backend_xmin is not null and (datid is null or datname = current_database()))
	union all select format('prepared transaction %L of %s', gid, owner), transaction from pg_prepared_xacts
	union all select format('replication slot %s', slot_name), xmin from pg_replication_slots where xmin is not null
) held (who, xmin) on true
order by age(xmin) desc limit 1
