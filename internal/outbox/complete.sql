-- Deletes the rows $1, leased to $3 at the attempts $2, and returns how many there were. It waits for the lock of a row for a tenth of
-- a second only, and then fails: to lock first what can be locked, as end does, would cost every row a lock more.
with bound as materialized (select set_config('lock_timeout', '100', true)),
done as (delete from {table} using bound where id = any($1) and attempts = $2 and lease = $3 returning 1)
select count(*) from done
