?outbox -- Puts a row for channel {channelName} into the outbox {outbox} for each row of {tableName} that is
?outbox -- inserted, changed or deleted, and one for a TRUNCATE, in the transaction of the change:
?outbox --   {"op":"insert|update|delete|truncate","table":"{tableName}","key":{..},"new":{..},"old":{..}}
?notify -- Sends a NOTIFY on channel {channelName} for each row of {tableName} that is inserted, changed or deleted,
?notify -- and one for a TRUNCATE, when the transaction commits:
?notify --   {"op":"insert|update|delete|truncate","table":"{tableName}","key":{..}}
-- An update that changes nothing sends nothing.
?keyNames -- The key is {keyNames}. When an update changes it, "key" is the new one and "old_key" the previous one.
?!keyNames -- There is no "key": the table has no primary key and no unique index on columns that are all not null.
?columnNames -- Updates count only if they change the key or one of these columns: {columnNames}.
?columnNames -- To change the type of one, remove the triggers first, and run this again afterwards.
?named -- After one of these columns has been renamed or dropped, writes fail until this is printed and run again.
?virtualNames -- Virtual columns are not carried, because a trigger does not see them: {virtualNames}.
?partitioned -- A row that moves to another partition is a delete and an insert. Truncating a single partition sends
?partitioned -- nothing, nor does attaching, detaching or dropping one.
?childNames -- Rows of the tables that inherit from it do not count: {childNames}.
?notify -- A payload too long for NOTIFY has "truncated":true instead of the key. Equal payloads of one transaction
?notify -- are sent once, and a listener that is away misses them.
--
?outbox -- Run it as the owner of the table. The function works with the rights of the role that runs this, so that
?outbox -- this role must be allowed to insert into the outbox, and those who write to the table need not be.
?notify -- Run it as the owner of the table.
-- It is one statement, which does all or nothing, and can be run again at any time.
-- To remove it:
--   drop trigger if exists {trigger} on {table};
--   drop trigger if exists {update} on {table};
--   drop trigger if exists {truncate} on {table};
--   drop function if exists {function}();

do {do}
declare
	path text := current_setting('search_path');
	wait text := current_setting('lock_timeout');
begin
set local search_path = pg_catalog, pg_temp; -- so that nothing that others have made runs as whoever runs this
set local lock_timeout = '10s'; -- writers wait behind this while it waits

?outbox -- Without this right every write to the table would fail.
?outbox if not (has_column_privilege({outboxText}, 'channel', 'insert') and has_column_privilege({outboxText}, 'payload', 'insert')) then
?outbox 	raise exception using message = {notAllowed} || quote_ident(current_user);
?outbox end if;
?outbox 
-- The search_path keeps out the functions, operators and temporary objects of whoever writes. The other
-- settings make the payload the same for everybody.
create or replace function {function}() returns trigger language plpgsql
?outbox 	security definer
	set search_path = pg_catalog, pg_temp
	set "DateStyle" = 'ISO' set "IntervalStyle" = 'postgres' set "TimeZone" = 'UTC'
	set bytea_output = 'hex' set extra_float_digits = 1
as {body}
declare
	payload json;
begin
	if tg_op = 'TRUNCATE' then
		payload := json_build_object('op', 'truncate', 'table', {tableText});
	elsif tg_op = 'INSERT' then
		payload := json_build_object('op', 'insert', 'table', {tableText}{key}{new});
	elsif tg_op = 'DELETE' then
		payload := json_build_object('op', 'delete', 'table', {tableText}{deletedKey}{old});
?key 	elsif {rekeyed} then
?key 		payload := json_build_object('op', 'update', 'table', {tableText}{key}{oldKey}{new}{old});
	else
		payload := json_build_object('op', 'update', 'table', {tableText}{key}{new}{old});
	end if;
?notify 	if octet_length(payload::text) > 7999 then -- pg_notify would fail, and the write with it
?notify 		payload := json_build_object('op', lower(tg_op), 'table', {tableText}, 'truncated', true);
?notify 	end if;
?notify 	perform pg_notify({channelText}, payload::text);
?outbox 	insert into {outbox} (channel, payload) values ({channelText}, payload);
	return null;
end {body};

-- "create or replace" leaves the function to whoever has made one of that name, and who could change it later.
if exists (select from pg_proc where oid = to_regprocedure({functionText}) and pg_get_userbyid(proowner) <> current_user) then
	raise exception using message = {notOwner};
end if;

-- Nobody else may put the function on a table of their own and so send events.
revoke all on function {function}() from public;

-- Triggers fire in the order of their names. These come early, before others change the row again.
create or replace trigger {trigger} after insert or delete on {table}
	for each row execute function {function}();
create or replace trigger {update} after update on {table}
	for each row when ({changed}) execute function {function}();
create or replace trigger {truncate} after truncate on {table}
	for each statement execute function {function}();

-- For what comes after this in a migration.
perform set_config('search_path', path, true);
perform set_config('lock_timeout', wait, true);
end {do};
