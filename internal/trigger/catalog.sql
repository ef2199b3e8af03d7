-- What trigger.sql needs to know of a table: one object of texts, whose names stand in braces there. Where "refusal" is one, there
-- can be no trigger. All quoting is the server's own.
-- $1 the table, $2 the channel, $3 the columns, all as a person writes them, and the last two perhaps empty;
-- $4 the outbox as SQL writes it, and $6 its oid, $5 whether NOTIFY takes its place; $7 where to look for tables, for it runs with a
-- search_path that keeps out what others have made.
with parts as (
	select n, case when part like '"%' then array[replace(substr(part, 2, length(part) - 2), '""', '"')] else array[part, lower(part)] end as spelt
	from unnest(regexp_match($1::text, '^(?:("(?:[^"]|"")+"|[^".]+)\.)?("(?:[^"]|"")+"|[^".]+)$')) with ordinality p (part, n)
	where part is not null
), found as (
	select c.*, n.nspname from parts p
	join pg_class c on p.n = 2 and c.relname = any(p.spelt)
	join pg_namespace n on n.oid = c.relnamespace
	left join parts s on s.n = 1
	where case when s.n is not null then n.nspname = any(s.spelt)
		else array_position($7::name[], n.nspname) = (
			select min(array_position($7::name[], n.nspname)) from pg_class o join pg_namespace n on n.oid = o.relnamespace where o.relname = c.relname)
		end
), this as (
	select f.*, format('%I.%I', nspname, relname) as sql, coalesce(nullif($2::text, ''), relname) as channel,
		-- in payloads and messages: as OUTBOX_TABLE is written, with quotes only where it needs them
		case when nspname ~ '[."]' then quote_ident(nspname) else nspname::text end || '.' ||
		case when relname ~ '[."]' then quote_ident(relname) else relname::text end as shown
	from found f where (select count(*) from found) = 1
), box as (
	select c.oid, format('%I.%I', n.nspname, c.relname) as sql,
		(select count(*) from pg_attribute a where a.attrelid = c.oid and a.attname in ('channel', 'payload') and not a.attisdropped) = 2 as fits
	from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = $6::oid
), best as ( -- the primary key, or the best of the unique indexes that every row is in
	select i.indkey, i.indnkeyatts from pg_index i, this
	where i.indrelid = this.oid and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
	and not exists (
		select from unnest(i.indkey) with ordinality k (attnum, n) join pg_attribute a using (attnum)
		where a.attrelid = this.oid and k.n <= i.indnkeyatts and not a.attnotnull)
	order by i.indisprimary desc, i.indisreplident desc, i.indnkeyatts, i.indexrelid limit 1
), col as (
	select a.attname::text as name, a.attnum, a.attgenerated = 'v' as virtual, k.n
	from this join pg_attribute a on a.attrelid = this.oid and a.attnum > 0 and not a.attisdropped
	left join (
		select k.* from best, unnest(best.indkey) with ordinality k (attnum, n) where k.n <= best.indnkeyatts
	) k using (attnum)
), wanted as ( -- at commas outside quotes
	select written, n, case
		when written like '"%' then replace(substr(written, 2, length(written) - 2), '""', '"')
		when exists (select from col where name = written) then written else lower(written) end as name
	from regexp_split_to_table($3::text, '\s*,\s*(?=(?:[^"]*"[^"]*")*[^"]*$)') with ordinality s (raw, n), trim(raw) written where $3::text <> ''
), chosen as (
	select col.name, col.virtual, min(wanted.n) as n from wanted join col using (name) group by col.name, col.virtual
), key as (
	select string_agg(name, ', ' order by n) as names,
		string_agg(format('%L, new.%I', name, name), ', ' order by n) as new, string_agg(format('%L, old.%I', name, name), ', ' order by n) as old,
		-- as stored: not every type has an =
		format('row(%s)::pg_catalog.record operator(pg_catalog.*<>) row(%s)::pg_catalog.record',
			string_agg(format('old.%I', name), ', ' order by n), string_agg(format('new.%I', name), ', ' order by n)) as differs
	from col where n is not null
), carried as (
	select string_agg(name, ', ' order by n) as names,
		string_agg(format('%L, new.%I', name, name), ', ' order by n) as new, string_agg(format('%L, old.%I', name, name), ', ' order by n) as old,
		(select format('row(%s)::pg_catalog.record operator(pg_catalog.*<>) row(%s)::pg_catalog.record',
			string_agg(format('old.%I', name), ', ' order by name), string_agg(format('new.%I', name), ', ' order by name))
			from (select name from chosen union select name from col where n is not null) c) as differs
	from chosen
), virtual as ( -- they would be null, which a reader of the table does not see there
	select string_agg(name, ', ' order by attnum) as names,
		')) where key not in (' || string_agg(quote_literal(name), ', ') || '))' as without
	from col where virtual and not exists (select from chosen)
), children as (
	select string_agg(inhrelid::regclass::text, ', ' order by inhrelid::regclass::text) as names
	from pg_inherits, this where inhparent = this.oid and relkind = 'r'
), object as ( -- every pair of a table and a channel has another name, so that a table can feed several channels
	select name, format('%I.%I', nspname, name) as function from (
		select nspname, case when octet_length(plain) <= 53 and relname || channel not like '%:%' then plain -- with _ and _truncate it has 63 bytes
			else left(plain, 17) || ':' || left(encode(sha256(convert_to(format('%L %L', relname, channel), 'UTF8')), 'hex'), 16) end as name
		from (select *, 'pglistener_' || relname || case when channel = relname then '' else ':' || channel end as plain from this) t
	) o
), near as ( -- how many letters only one of two names has says how far they are apart
	select string_agg(sql, ', ' order by n, sql) as names from (
		select format('%I.%I', nspname, c.relname) as sql, (
			select count(*) from (
				(select unnest(a) except all select unnest(b)) union all (select unnest(b) except all select unnest(a))) d) as n
		from pg_class c join pg_namespace s on s.oid = c.relnamespace,
			string_to_array(lower(c.relname), null) a, string_to_array(lower(trim(both '" ' from substring($1::text from '[^.]*$'))), null) b
		where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence <> 't' and c.oid >= 16384
		order by n, c.oid limit 5) c
	where n <= 2
), refusal as (
	select case
		when not exists (select from found) then format('there is no table "%s"', $1::text) ||
			coalesce('; is it ' || near.names || '?', ' (NAME, SCHEMA.NAME, or in double quotes as in SQL)')
		when this.oid is null then format('"%s" may be %s: write it in double quotes', $1::text, (select string_agg(format('"%s"."%s"', nspname, relname), ' or ' order by nspname, relname desc) from found))
		when this.oid = box.oid then shown || ' is the outbox itself'
		when this.oid < 16384 or nspname = 'pg_toast' then shown || ' belongs to the system'
		when relkind in ('v', 'm') then shown || case relkind when 'm' then ' is a materialized' else ' is a' end || ' view: name the table under it'
		when relkind = 'f' then shown || ' is a foreign table: put the trigger where its rows are'
		when relkind not in ('r', 'p') then shown || ' is not a table'
		when relpersistence = 't' then shown || ' is a temporary table'
		when relispartition then shown || ' is a partition: name the partitioned table, ' || pg_partition_root(this.oid)::regclass
		when not $5::bool and box.oid is null then format('there is no outbox %s: make it with pglistener -outbox-schema | psql "$DATABASE_URL"', $4::text)
		when not $5::bool and not box.fits then format('OUTBOX_TABLE: %s is not an outbox; it has no columns channel and payload', box.sql)
		when octet_length(channel) > 63 then format('CHANNEL has %s bytes; PostgreSQL allows 63', octet_length(channel))
		when channel ~ '[,=]|://|^\s|\s$' then format('no listener can name the channel "%s" in CHANNELS, because it has a comma, "=", "://" or a blank at an end: name another CHANNEL', channel)
		when exists (select from wanted where name not in (select name from col)) then (
			select format('%s has no column "%s"; it has %s', shown, written, (select string_agg(name, ', ' order by attnum) from col))
			from wanted where name not in (select name from col) order by n limit 1)
		when exists (select from chosen where chosen.virtual) then (
			select format('"%s" is a virtual column, which a trigger does not see: name the columns that it is made of', name) from chosen where chosen.virtual limit 1)
		when (select count(*) from chosen) > 50 then -- json_build_object has at most 100 arguments
			format('%s columns are too many: name 50 at most, or none to carry them all', (select count(*) from chosen))
		-- it would end the comment that it is in
		when concat(shown, channel, key.names, carried.names, virtual.names, children.names, box.sql) ~ '[[:cntrl:]]' then
			'a name has a control character in it, which the SQL cannot show'
		end as text
	from near cross join key cross join carried cross join virtual cross join children left join this on true left join box on true
)
select row_to_json(r) from (
	select refusal.text as refusal,
		this.sql as table, shown as "tableName", quote_literal(shown) as "tableText",
		case when $5::bool then null else box.sql end as outbox, quote_literal(box.sql) as "outboxText", case when $5::bool then 'yes' end as notify,
		channel as "channelName", quote_literal(channel) as "channelText",
		function, quote_literal(function || '()') as "functionText",
		quote_ident('_' || object.name) as trigger, quote_ident('_' || object.name || '_update') as update, quote_ident('_' || object.name || '_truncate') as truncate,
		quote_literal(function || ' belongs to another role: run this as that role, or remove it first') as "notOwner",
		quote_literal('a write to the table would fail for want of a right: grant insert on ' || box.sql || ' to ') as "notAllowed",
		key.names as "keyNames", carried.names as "columnNames", case when not $5::bool then virtual.names end as "virtualNames", children.names as "childNames",
		concat(key.names, carried.names) as named, case when relkind = 'p' then 'yes' end as partitioned,
		', ''key'', json_build_object(' || key.new || ')' as key, ', ''key'', json_build_object(' || key.old || ')' as "deletedKey",
		', ''old_key'', json_build_object(' || key.old || ')' as "oldKey", key.differs as rekeyed,
		case when not $5::bool then ', ''new'', ' || coalesce('json_build_object(' || carried.new || ')', '(select json_object_agg(key, value) from json_each(to_json(new' || virtual.without, 'new') end as new,
		case when not $5::bool then ', ''old'', ' || coalesce('json_build_object(' || carried.old || ')', '(select json_object_agg(key, value) from json_each(to_json(old' || virtual.without, 'old') end as old,
		case when carried.names is null then 'old.* operator(pg_catalog.*<>) new.*' else carried.differs end as changed
	from refusal cross join key cross join carried cross join virtual cross join children
	left join this on true left join box on true left join object on true
) r
