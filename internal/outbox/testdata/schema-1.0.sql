-- The outbox of pglistener. It can be run again at any time.
--
-- Producers, in the transaction of the business change:
--   insert into {table} (channel, payload) values ('orders', '{"id": 1}');
-- and for later, run_at: insert into {table} (channel, payload, run_at) values (..., now() + interval '1 hour');
--
-- The least that each needs:
--   grant insert on {table} to producer;
--   grant select, update, delete on {table} to listener;
-- and usage on the schema, if it is not public.

create table if not exists {table} (
	id         bigint generated always as identity primary key, -- the idempotency key
	channel    text not null check (octet_length(channel) between 1 and 63),
	payload    text not null default '',
	attempts   integer not null default 0,
	run_at     timestamptz not null default now(), -- due then; while a handler runs, when its lease ends
	last_error text,
	created_at timestamptz not null default now(),
	failed_at  timestamptz -- given up; the row stays for a person
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

-- For claiming: what is given up does not weigh on it.
create index if not exists {due} on {table} (channel, run_at, id) where failed_at is null;
create index if not exists {failed} on {table} (channel, failed_at) where failed_at is not null;

-- One NOTIFY per statement and channel, because NOTIFY serializes commits; without a
-- payload, because the row is the truth.
create or replace function {notify}() returns trigger language plpgsql as $$
begin
	perform pg_notify(channel, '') from (select distinct channel from inserted) channels;
	return null;
end $$;

drop trigger if exists {trigger} on {table};
create trigger {trigger} after insert on {table}
	referencing new table as inserted
	for each statement execute function {notify}();
