-- Fails when the table cannot be used, and changes nothing.
with fits as (select ctid, id::bigint, event_id::uuid, channel::text, payload::text, attempts::int, run_at::timestamptz, last_error::text,
	created_at::timestamptz, failed_at::timestamptz, key::text, schedule::text, due_at::timestamptz, lease::uuid, leased_until::timestamptz
	from {table} where false),
claims as (update {table} set attempts = attempts, run_at = run_at, last_error = last_error, failed_at = failed_at where false returning 1),
completes as (delete from {table} where false returning 1)
select 1 from fits, claims, completes
