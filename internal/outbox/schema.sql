-- The outbox of pglistener. It can be run again at any time, and brings an older table up to date.
--
-- Producers, in the transaction of the business change:
--   insert into {table} (channel, payload) values ('orders', '{"id": 1}');
-- and for later, run_at: insert into {table} (channel, payload, run_at) values (..., now() + interval '1 hour');
--
-- The least that each needs:
--   grant insert on {table} to producer;
--   grant select, update, delete on {table} to listener; and insert, if rows have a schedule
-- and usage on the schema, if it is not public. A producer that upserts by key also needs select and update.
--
-- The way back to the version before: the old program works with this table as it is.

set lock_timeout = '10s';
set client_min_messages = warning; -- not what is there already

create table if not exists {table} (
	id           bigint generated always as identity primary key,
	event_id     uuid default gen_random_uuid(), -- the idempotency key
	channel      text not null check (octet_length(channel) between 1 and 63),
	payload      text not null default '',
	attempts     integer not null default 0, -- -1: of its schedule the first time is yet to be found
	run_at       timestamptz not null default now(), -- due then
	last_error   text,
	created_at   timestamptz not null default now(),
	failed_at    timestamptz, -- given up; the row stays for a person
	key          text,        -- there is at most one row of a channel and key that has not failed
	schedule     text,        -- such as '0 3 * * *': after each run it moves to its next time
	due_at       timestamptz, -- what run_at was before it was moved by a failure
	lease        uuid,        -- whose it is while a handler runs, and
	leased_until timestamptz  -- until when; in no index, so that claiming touches none
);
-- Half of each page is left free: claiming a row then writes its new version beside it, and no index.
alter table {table} set (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

-- Of a table from before these columns; its rows keep their number for a key. A default comes after its
-- column: one statement for both would write every row.
alter table {table}
	add column if not exists event_id uuid,
	add column if not exists key text,
	add column if not exists schedule text,
	add column if not exists due_at timestamptz,
	add column if not exists lease uuid,
	add column if not exists leased_until timestamptz;
alter table {table} alter column event_id set default gen_random_uuid();

-- For claiming: what is given up does not weigh on it.
create index if not exists {due} on {table} (channel, run_at, id) where failed_at is null;
create index if not exists {failed} on {table} (channel, failed_at) where failed_at is not null;
create unique index if not exists {key} on {table} (channel, key) where failed_at is null;

-- "if not exists" passes over whatever has the name already.
do $pglistener$
declare
	missing text;
begin
	select string_agg(name, ', ') into missing from unnest(array[{indexes}]) name
	where not exists (select from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid
		where i.indrelid = {name}::regclass and '"' || replace(c.relname, '"', '""') || '"' = name);
	if missing is not null then
		raise exception 'the index % was not made, for something else has its name', missing
			using hint = 'Rename what has it, and run this again: without the index the outbox is slow, or a key is not unique.';
	end if;
end $pglistener$;

-- NOTIFY has no payload, because the row is the truth. It is sent once for each statement and channel. If some channels are swept, it
-- is sent for each row of the others instead: a condition on rows is cheaper than keeping what a statement has inserted.
create or replace function {notify}() returns trigger language plpgsql as $$
begin
	if tg_level = 'ROW' then
		perform pg_notify(new.channel, '');
	else
		perform pg_notify(channel, '') from (select distinct channel from inserted) channels;
	end if;
	return null;
end $$;

create or replace trigger {trigger} after insert on {table}
	{inserted} execute function {notify}();

-- A changed payload or schedule is a new event, and an upsert that updates has no inserted rows to
-- ring for. Neither claims nor results fire it.
create or replace function {change}() returns trigger language plpgsql as $$
begin
	if tg_op = 'INSERT' then
		new.attempts := -1;
		return new;
	end if;
	new.event_id := gen_random_uuid();
	if new.leased_until <= now() then -- the outcome that was never written was that of another event
		new.lease := null;
	end if;
	if new.schedule is distinct from old.schedule and new.schedule is not null and new.failed_at is null then
		new.attempts := -1;
		new.run_at := least(new.run_at, now());
	end if;
	if new.failed_at is null and new.channel <> all (coalesce(tg_argv, '{}')) then
		perform pg_notify(new.channel, '');
	end if;
	return new;
end $$;

create or replace trigger {schedule} before insert on {table}
	for each row when (new.schedule is not null) execute function {change}();
create or replace trigger {touch} before update of payload, schedule on {table}
	for each row execute function {change}({swept});

reset client_min_messages;
reset lock_timeout;
