-- Gives up the due rows of a channel that the server cannot convert to UTF-8: each would fail every claim that it is in. A claim takes
-- fewer rows than are looked at here.
do $pglistener$
declare
	r record;
begin
	for r in select ctid as place, tableoid as part, payload || coalesce(schedule, '') as text from {table}
		where channel = {channel} and failed_at is null and run_at <= now() and (leased_until is null or leased_until <= now())
		order by run_at, id limit 5000
		for update skip locked
	loop
		begin
			perform convert_to(r.text, 'UTF8');
		exception when untranslatable_character or character_not_in_repertoire then
			update {table} set failed_at = now(), last_error = 'it cannot be converted to UTF-8: ' || sqlerrm
			where ctid = r.place and tableoid = r.part;
		end;
	end loop;
end $pglistener$
