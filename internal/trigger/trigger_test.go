//go:build unix

package trigger

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/pglistener/pglistener/internal/outbox"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

// world is a business schema with its owner, a role that writes to its tables, and an outbox in a schema where the
// role has no right at all and the owner may only insert.
type world struct {
	t                *testing.T
	schema, box      string // the business schema, and OUTBOX_TABLE
	ownerRole, role  string
	admin, owner, db *sql.DB // the superuser's; the owner's; the writer's, which is one session
}

func newWorld(t *testing.T) *world {
	t.Helper()
	base := testkit.ChannelName(t)
	w := &world{t: t, schema: base, box: base + "_box.outbox", ownerRole: base + "_owner", role: base + "_writer", admin: testkit.DB(t)}
	script, err := outbox.Schema(w.box)
	if err != nil {
		t.Fatal(err)
	}
	testkit.Exec(t, w.admin, strings.NewReplacer("BASE", base, "BOX", script).Replace(`
		create role BASE_owner login password 'x';
		create role BASE_writer login password 'x';
		create schema BASE authorization BASE_owner;
		grant usage on schema BASE to BASE_writer;
		alter role BASE_owner set search_path = BASE;
		alter role BASE_writer set search_path = BASE;
		create schema BASE_box;
		BOX
		grant usage on schema BASE_box to BASE_owner;
		grant insert on BASE_box.outbox to BASE_owner;`))
	w.owner = testkit.Open(t, testkit.WithUser(testkit.DSN(t), w.ownerRole, "x"))
	w.db = testkit.Open(t, testkit.WithUser(testkit.DSN(t), w.role, "x"))
	w.db.SetMaxOpenConns(1)
	t.Cleanup(func() {
		w.owner.Close()
		w.db.Close()
		for _, q := range []string{"drop schema BASE, BASE_box cascade", "drop owned by BASE_owner, BASE_writer", "drop role BASE_owner, BASE_writer"} {
			if _, err := w.admin.Exec(strings.ReplaceAll(q, "BASE", base)); err != nil {
				t.Error(err)
			}
		}
	})
	return w
}

// make makes tables as their owner, and lets the writer write to them.
func (w *world) make(statements ...string) {
	w.t.Helper()
	for _, s := range statements {
		testkit.Exec(w.t, w.owner, s)
	}
	testkit.Exec(w.t, w.owner, "grant all on all tables in schema "+w.schema+" to "+w.role)
}

// options are for a table of the schema, as its owner would ask.
func (w *world) options(table string) request {
	return request{dsn: testkit.WithUser(testkit.DSN(w.t), w.ownerRole, "x"),
		outbox: `"` + strings.Replace(w.box, ".", `"."`, 1) + `"`, Options: Options{Table: table}}
}

// request is what Print is asked.
type request struct {
	Options
	dsn, outbox string
}

func (r request) print(out io.Writer) error {
	return Print(r.dsn, testkit.Patience, r.outbox, r.Options, out)
}

func (w *world) print(o request) string {
	w.t.Helper()
	var out strings.Builder
	if err := o.print(&out); err != nil {
		w.t.Fatal(err)
	}
	return out.String()
}

// install runs what is printed, as the owner: as a person does, if there is a psql, then in a transaction, as a migration does, and
// then once more.
func (w *world) install(o request) string {
	w.t.Helper()
	script := w.print(o)
	if psql, err := exec.LookPath("psql"); err == nil {
		cmd := exec.CommandContext(w.t.Context(), psql, testkit.WithUser(testkit.DSN(w.t), w.ownerRole, "x"), "-X", "-q")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			w.t.Fatalf("psql: %v %s\n%s", err, out, script)
		}
	}
	tx, err := w.owner.Begin()
	if err != nil {
		w.t.Fatal(err)
	}
	defer tx.Rollback()
	const settings = "select current_setting('search_path') || ' ' || current_setting('lock_timeout')"
	var before, after string
	if err := tx.QueryRow(settings).Scan(&before); err != nil {
		w.t.Fatal(err)
	}
	if _, err := tx.Exec(script); err != nil {
		w.t.Fatalf("%v\n%s", err, script)
	}
	if err := tx.QueryRow(settings).Scan(&after); err != nil || after != before {
		w.t.Errorf("the migration goes on with %s in place of %s (%v)", after, before, err)
	}
	if err := tx.Commit(); err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.owner.Exec(script); err != nil {
		w.t.Error(err)
	}
	return script
}

// write runs statements of the business.
func (w *world) write(statements ...string) {
	w.t.Helper()
	for _, s := range statements {
		testkit.Exec(w.t, w.db, s)
	}
}

// raw returns the payloads that came since it was called last.
func (w *world) raw(channel string) (payloads pq.StringArray) {
	w.t.Helper()
	err := w.admin.QueryRow("with gone as (delete from "+w.box+" where channel = $1 returning id, payload) "+
		"select array_agg(payload order by id) from gone", channel).Scan(&payloads)
	if err != nil {
		w.t.Fatal(err)
	}
	return payloads
}

// told compares the payloads that came on a channel since the last time. TABLE in what is wanted is the schema's.
func (w *world) told(channel string, want ...string) {
	w.t.Helper()
	got := w.raw(channel)
	for i := range max(len(got), len(want)) {
		switch {
		case i >= len(got):
			w.t.Errorf("not told: %s", want[i])
		case i >= len(want):
			w.t.Errorf("told: %s", got[i])
		default:
			same(w.t, got[i], strings.ReplaceAll(want[i], "SCHEMA", w.schema))
		}
	}
}

// same compares JSON, to the digit.
func same(t *testing.T, got, want string) {
	t.Helper()
	var values [2]any
	for i, s := range []string{got, want} {
		d := json.NewDecoder(strings.NewReader(s))
		d.UseNumber()
		if err := d.Decode(&values[i]); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	if !reflect.DeepEqual(values[0], values[1]) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// version is the server's, such as 180004.
func version(t *testing.T) (n int) {
	t.Helper()
	if err := testkit.DB(t).QueryRow("select current_setting('server_version_num')::int").Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestEveryChange(t *testing.T) {
	w := newWorld(t)
	w.make("create table orders (id int primary key, total numeric, note json)")
	script := w.install(w.options("orders"))
	if _, err := w.db.Exec("insert into " + w.box + " (channel) values ('orders')"); err == nil {
		t.Fatal("the writer has a right on the outbox")
	}

	w.write(`insert into orders values (1, 1.50, '{"a":"\u0000"}'), (2, 2, null)`)
	w.told("orders",
		`{"op":"insert","table":"SCHEMA.orders","key":{"id":1},"new":{"id":1,"total":1.50,"note":{"a":"\u0000"}}}`,
		`{"op":"insert","table":"SCHEMA.orders","key":{"id":2},"new":{"id":2,"total":2,"note":null}}`)
	w.write("update orders set total = 3 where id = 2")
	w.told("orders", `{"op":"update","table":"SCHEMA.orders","key":{"id":2},"new":{"id":2,"total":3,"note":null},"old":{"id":2,"total":2,"note":null}}`)
	w.write("update orders set id = id, total = total")
	w.told("orders")
	w.write("update orders set id = 3 where id = 2")
	w.told("orders", `{"op":"update","table":"SCHEMA.orders","key":{"id":3},"old_key":{"id":2},"new":{"id":3,"total":3,"note":null},"old":{"id":2,"total":3,"note":null}}`)
	w.write("insert into orders values (3, 4), (4, 4) on conflict (id) do update set total = excluded.total")
	w.told("orders",
		`{"op":"update","table":"SCHEMA.orders","key":{"id":3},"new":{"id":3,"total":4,"note":null},"old":{"id":3,"total":3,"note":null}}`,
		`{"op":"insert","table":"SCHEMA.orders","key":{"id":4},"new":{"id":4,"total":4,"note":null}}`)
	w.write("delete from orders where id = 1")
	w.told("orders", `{"op":"delete","table":"SCHEMA.orders","key":{"id":1},"old":{"id":1,"total":1.50,"note":{"a":"\u0000"}}}`)
	if version(t) >= 150000 {
		w.write(`merge into orders o using (values (3), (4), (5)) v (id) on o.id = v.id
			when matched and o.id = 3 then delete when matched then update set total = 5 when not matched then insert values (v.id, 6)`)
		w.told("orders",
			`{"op":"delete","table":"SCHEMA.orders","key":{"id":3},"old":{"id":3,"total":4,"note":null}}`,
			`{"op":"update","table":"SCHEMA.orders","key":{"id":4},"new":{"id":4,"total":5,"note":null},"old":{"id":4,"total":4,"note":null}}`,
			`{"op":"insert","table":"SCHEMA.orders","key":{"id":5},"new":{"id":5,"total":6,"note":null}}`)
	}
	w.copyIn("orders", "7", "8")
	w.told("orders",
		`{"op":"insert","table":"SCHEMA.orders","key":{"id":7},"new":{"id":7,"total":null,"note":null}}`,
		`{"op":"insert","table":"SCHEMA.orders","key":{"id":8},"new":{"id":8,"total":null,"note":null}}`)
	w.write("truncate orders")
	w.told("orders", `{"op":"truncate","table":"SCHEMA.orders"}`)

	// In the transaction of the change, and not from what is replayed.
	w.write("begin", "insert into orders values (9)", "rollback")
	testkit.Exec(t, w.admin, "set session_replication_role = replica; insert into "+w.schema+".orders values (10); reset session_replication_role")
	w.told("orders")

	w.remove(script)
	w.write("insert into orders values (11)")
	w.told("orders")
}

// copyIn copies ids into a table.
func (w *world) copyIn(table string, ids ...string) {
	w.t.Helper()
	tx, err := w.db.Begin()
	if err != nil {
		w.t.Fatal(err)
	}
	defer tx.Rollback()
	in, err := tx.Prepare("copy " + table + " (id) from stdin")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, id := range append(ids, "") {
		args := []any{id}
		if id == "" {
			args = nil // the end
		}
		if _, err := in.Exec(args...); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := tx.Commit(); err != nil {
		w.t.Fatal(err)
	}
}

// drop runs the statements of the script that remove what it makes.
func (w *world) drop(script string) (statements int) {
	w.t.Helper()
	for line := range strings.Lines(script) {
		if s, ok := strings.CutPrefix(line, "--   drop "); ok {
			testkit.Exec(w.t, w.owner, "drop "+s)
			statements++
		}
	}
	return statements
}

// remove runs the statements that the script has for it, and looks for what they left.
func (w *world) remove(script string) {
	w.t.Helper()
	statements := w.drop(script)
	var left int
	err := w.admin.QueryRow(`select (select count(*) from pg_proc where pronamespace = $1::regnamespace)
		+ (select count(*) from pg_trigger t join pg_class c on c.oid = tgrelid where relnamespace = $1::regnamespace)`, w.schema).Scan(&left)
	if err != nil || left > 0 || statements != 4 {
		w.t.Errorf("%d statements leave %d objects (%v)\n%s", statements, left, err, script)
	}
}

// TestOddTables: one row is inserted into each table, and told.
func TestOddTables(t *testing.T) {
	long := strings.Repeat("x", 63)
	umlaut := strings.Repeat("ü", 31)
	tests := []struct {
		name, create  string
		table         string   // as asked for
		channel       string   // where it is told
		then          []string // what happens
		want          []string
		unlike, noted string // what must not and what must be in the script
	}{
		{
			name: "quotes", create: `create table "a""b'c" ("i""d'" int, "$pglistener$" text, primary key ("i""d'", "$pglistener$"))`,
			table: `"a""b'c"`, channel: `a"b'c`,
			then: []string{`insert into "a""b'c" values (1, 'x')`},
			want: []string{`{"op":"insert","table":"SCHEMA.\"a\"\"b'c\"","key":{"i\"d'":1,"$pglistener$":"x"},"new":{"i\"d'":1,"$pglistener$":"x"}}`},
		}, {
			name: "percent and comma", create: `create table "100%s %I" ("%L,%s" int primary key)`, table: `100%s %I`, channel: `100%s %I`,
			then: []string{`insert into "100%s %I" values (1)`},
			want: []string{`{"op":"insert","table":"SCHEMA.100%s %I","key":{"%L,%s":1},"new":{"%L,%s":1}}`},
		}, {
			name: "backslash and placeholder", create: `create table "a\'{table}" ("b\" int primary key)`,
			table: `a\'{table}`, channel: `a\'{table}`,
			then: []string{`set standard_conforming_strings = off`, `insert into "a\'{table}" values (1)`, `reset standard_conforming_strings`},
			want: []string{`{"op":"insert","table":"SCHEMA.a\\'{table}","key":{"b\\":1},"new":{"b\\":1}}`},
		}, {
			name: "dot", create: `create table "a.b" (id int primary key)`, table: `SCHEMA."a.b"`, channel: "a.b",
			then: []string{`insert into "a.b" values (1)`},
			want: []string{`{"op":"insert","table":"SCHEMA.\"a.b\"","key":{"id":1},"new":{"id":1}}`},
		}, {
			name: "capitals", create: `create table "Orders" ("Id" int primary key)`, table: `Orders`, channel: "Orders",
			then: []string{`insert into "Orders" values (1)`},
			want: []string{`{"op":"insert","table":"SCHEMA.Orders","key":{"Id":1},"new":{"Id":1}}`},
		}, {
			name: "blank", create: `create table "order lines" ("the id" int primary key)`, table: `order lines`, channel: "order lines",
			then: []string{`insert into "order lines" values (1)`},
			want: []string{`{"op":"insert","table":"SCHEMA.order lines","key":{"the id":1},"new":{"the id":1}}`},
		}, {
			name: "long", create: `create table ` + long + ` (` + long + ` int primary key)`, table: long, channel: long,
			then: []string{`insert into ` + long + ` values (1)`},
			want: []string{`{"op":"insert","table":"SCHEMA.` + long + `","key":{"` + long + `":1},"new":{"` + long + `":1}}`},
		}, {
			name: "unicode", create: `create table "` + umlaut + `" ("ключ" int primary key)`, table: umlaut, channel: umlaut,
			then: []string{`insert into "` + umlaut + `" values (1)`},
			want: []string{`{"op":"insert","table":"SCHEMA.` + umlaut + `","key":{"ключ":1},"new":{"ключ":1}}`},
		}, {
			name: "reserved words", create: `create table "order" ("user" int, "select" int, primary key ("select", "user"))`, table: `order`, channel: "order",
			then: []string{`insert into "order" values (1, 2)`},
			want: []string{`{"op":"insert","table":"SCHEMA.order","key":{"select":2,"user":1},"new":{"user":1,"select":2}}`},
		}, {
			name:   "the function's own words",
			create: `create table new ("new" int primary key, old int, payload int, tg_op text, key int, value int, channel text, record int)`, table: `new`, channel: "new",
			then: []string{`insert into new values (1, 2, 3, '4', 5, 6, '7', 8)`, `update new set old = 3`},
			want: []string{
				`{"op":"insert","table":"SCHEMA.new","key":{"new":1},"new":{"new":1,"old":2,"payload":3,"tg_op":"4","key":5,"value":6,"channel":"7","record":8}}`,
				`{"op":"update","table":"SCHEMA.new","key":{"new":1},"new":{"new":1,"old":3,"payload":3,"tg_op":"4","key":5,"value":6,"channel":"7","record":8},
					"old":{"new":1,"old":2,"payload":3,"tg_op":"4","key":5,"value":6,"channel":"7","record":8}}`},
		}, {
			name: "no key", create: `create table loose (a int, b int unique)`, table: `loose`, channel: "loose", noted: `There is no "key"`,
			then: []string{`insert into loose values (null, null), (1, 1)`, `update loose set a = 2`, `delete from loose`},
			want: []string{
				`{"op":"insert","table":"SCHEMA.loose","new":{"a":null,"b":null}}`, `{"op":"insert","table":"SCHEMA.loose","new":{"a":1,"b":1}}`,
				`{"op":"update","table":"SCHEMA.loose","new":{"a":2,"b":null},"old":{"a":null,"b":null}}`, `{"op":"update","table":"SCHEMA.loose","new":{"a":2,"b":1},"old":{"a":1,"b":1}}`,
				`{"op":"delete","table":"SCHEMA.loose","old":{"a":2,"b":null}}`, `{"op":"delete","table":"SCHEMA.loose","old":{"a":2,"b":1}}`},
		}, {
			name: "a unique index for key",
			create: `create table keyed (a int not null, b int not null, c int, d text not null); create unique index on keyed (c);
				create unique index on keyed (a) where b > 0; create unique index on keyed (lower(d)); create index on keyed (d); create unique index on keyed (b, a) include (c)`,
			table: `keyed`, channel: "keyed", noted: "The key is b, a.",
			then: []string{`insert into keyed values (1, 2, 3, 'x')`},
			want: []string{`{"op":"insert","table":"SCHEMA.keyed","key":{"b":2,"a":1},"new":{"a":1,"b":2,"c":3,"d":"x"}}`},
		}, {
			name: "replica identity for key",
			create: `create table ident (a int not null unique, b int not null, c int not null);
				create unique index ident_bc on ident (b, c);
				alter table ident replica identity using index ident_bc`,
			table: `ident`, channel: "ident",
			then: []string{`insert into ident values (1, 2, 3)`},
			want: []string{`{"op":"insert","table":"SCHEMA.ident","key":{"b":2,"c":3},"new":{"a":1,"b":2,"c":3}}`},
		}, {
			name: "primary key for key", create: `create table prim (a int not null unique, b int, c int, primary key (b, c))`, table: `prim`, channel: "prim",
			then: []string{`insert into prim values (1, 2, 3)`},
			want: []string{`{"op":"insert","table":"SCHEMA.prim","key":{"b":2,"c":3},"new":{"a":1,"b":2,"c":3}}`},
		}, {
			name: "an index that is not valid", noted: `There is no "key"`, table: `inv`, channel: "inv",
			create: `create table inv (id int not null) partition by list (id); create table inv_all partition of inv default; create unique index on only inv (id)`,
			then:   []string{`insert into inv values (1)`},
			want:   []string{`{"op":"insert","table":"SCHEMA.inv","new":{"id":1}}`},
		}, {
			name: "generated and dropped columns", create: `create table gen (gone int, id int primary key, twice int generated always as (id * 2) stored); alter table gen drop gone`,
			table: `gen`, channel: "gen",
			then: []string{`insert into gen values (2)`, `update gen set id = 3`},
			want: []string{`{"op":"insert","table":"SCHEMA.gen","key":{"id":2},"new":{"id":2,"twice":4}}`,
				`{"op":"update","table":"SCHEMA.gen","key":{"id":3},"old_key":{"id":2},"new":{"id":3,"twice":6},"old":{"id":2,"twice":4}}`},
		}, {
			name: "types",
			create: `create domain money_ as numeric check (value > 0); create type pair as (a int, b text); create type mood as enum ('ok', 'sad');
				create table types (id int primary key, b bytea, n numeric, f float8, z timestamptz, i timestamptz, m money_, p pair, e mood, r daterange,
					x xml, pt point, d interval, a int[], j jsonb)`,
			table: `types`, channel: "types",
			then: []string{`set bytea_output = escape`, `set extra_float_digits = -10`, `set datestyle = 'SQL, DMY'`, `set timezone = 'Asia/Tokyo'`, `set intervalstyle = 'sql_standard'`,
				`insert into types values (1, '\x00ff', 'NaN', 0.1 + 0.2::float8, '2024-03-04 05:06:07+00', 'infinity', 12345678901234567890.1234567890, (1, 'x'), 'sad',
					'[2024-01-02,2024-03-04)', null, '(1,2)', '1 day 2 hours', '{1,null}', '{"a": 1.10}')`,
				`update types set pt = '(1,3)'`, `update types set j = j`,
				`reset all`},
			want: []string{
				`{"op":"insert","table":"SCHEMA.types","key":{"id":1},"new":{"id":1,"b":"\\x00ff","n":"NaN","f":0.30000000000000004,"z":"2024-03-04T05:06:07+00:00","i":"infinity",
					"m":12345678901234567890.1234567890,"p":{"a":1,"b":"x"},"e":"sad","r":"[2024-01-02,2024-03-04)","x":null,"pt":"(1,2)","d":"1 day 02:00:00","a":[1,null],"j":{"a":1.10}}}`,
				`{"op":"update","table":"SCHEMA.types","key":{"id":1},"new":{"id":1,"b":"\\x00ff","n":"NaN","f":0.30000000000000004,"z":"2024-03-04T05:06:07+00:00","i":"infinity",
					"m":12345678901234567890.1234567890,"p":{"a":1,"b":"x"},"e":"sad","r":"[2024-01-02,2024-03-04)","x":null,"pt":"(1,3)","d":"1 day 02:00:00","a":[1,null],"j":{"a":1.10}},
				"old":{"id":1,"b":"\\x00ff","n":"NaN","f":0.30000000000000004,"z":"2024-03-04T05:06:07+00:00","i":"infinity",
					"m":12345678901234567890.1234567890,"p":{"a":1,"b":"x"},"e":"sad","r":"[2024-01-02,2024-03-04)","x":null,"pt":"(1,2)","d":"1 day 02:00:00","a":[1,null],"j":{"a":1.10}}}`,
			},
		}, {
			name: "children", create: `create table mother (id int primary key); create table child () inherits (mother)`, table: `mother`, channel: "mother", noted: "child",
			then: []string{`insert into child values (1)`, `insert into mother values (2)`},
			want: []string{`{"op":"insert","table":"SCHEMA.mother","key":{"id":2},"new":{"id":2}}`},
		},
	}
	w := newWorld(t)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := *w
			w.t = t
			w.make(test.create)
			script := w.install(w.options(strings.ReplaceAll(test.table, "SCHEMA", w.schema)))
			if !strings.Contains(script, test.noted) {
				t.Errorf("%q is not said:\n%s", test.noted, script)
			}
			w.write(test.then...)
			w.told(test.channel, test.want...)
			w.remove(script)
		})
	}
}

func TestColumnsOfLaterDays(t *testing.T) {
	w := newWorld(t)
	w.make("create table t (id int primary key)", "create table narrow (id int primary key, a int)")
	w.install(w.options("t"))
	o := w.options("narrow")
	o.Columns = "a"
	w.install(o)
	w.write("insert into t values (1)", "insert into narrow values (1, 1)")
	w.raw("t")
	w.raw("narrow")
	w.make("alter table t add later int default 7, alter id type bigint", "alter table narrow add later int default 7")
	w.write("update t set later = 8", "update narrow set later = 8", "update narrow set a = 2")
	w.told("t", `{"op":"update","table":"SCHEMA.t","key":{"id":1},"new":{"id":1,"later":8},"old":{"id":1,"later":7}}`)
	w.told("narrow", `{"op":"update","table":"SCHEMA.narrow","key":{"id":1},"new":{"a":2},"old":{"a":1}}`)

	// A column that is listed cannot go unnoticed.
	if _, err := w.owner.Exec("alter table narrow drop a"); err == nil {
		t.Error("a column that the trigger carries could be dropped")
	}
}

// TestTheTableChanges: what docs/trigger.md says of it.
func TestTheTableChanges(t *testing.T) {
	w := newWorld(t)
	w.make("create table t (id int primary key, a int, b int)", "create table narrow (id int primary key, a int, b int)")
	script := w.install(w.options("t"))
	o := w.options("narrow")
	o.Columns = "a"
	narrow := w.install(o)
	fails := func(db *sql.DB, statement, want string) {
		t.Helper()
		if _, err := db.Exec(statement); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", statement, err)
		}
	}
	w.write("insert into t values (1, 1, 1)", "insert into narrow values (1, 1, 1)")
	w.raw("t")
	w.raw("narrow")

	// Columns that are neither in the key nor listed may be renamed and dropped.
	w.make("alter table t rename a to c", "alter table narrow rename b to c")
	w.write("update t set c = 2", "update narrow set a = 2")
	w.told("t", `{"op":"update","table":"SCHEMA.t","key":{"id":1},"new":{"id":1,"c":2,"b":1},"old":{"id":1,"c":1,"b":1}}`)
	w.told("narrow", `{"op":"update","table":"SCHEMA.narrow","key":{"id":1},"new":{"a":2},"old":{"a":1}}`)
	w.make("alter table t drop c", "alter table narrow drop c")
	w.write("update t set b = 2", "update narrow set a = 3")
	w.told("t", `{"op":"update","table":"SCHEMA.t","key":{"id":1},"new":{"id":1,"b":2},"old":{"id":1,"b":1}}`)
	w.told("narrow", `{"op":"update","table":"SCHEMA.narrow","key":{"id":1},"new":{"a":3},"old":{"a":2}}`)

	// Of others writes fail, until it is printed and run again.
	w.make("alter table t rename id to key", "alter table narrow rename a to z")
	fails(w.db, "update t set b = 3", `has no field "id"`)
	fails(w.db, "update narrow set z = 4", `has no field "a"`)
	w.install(w.options("t"))
	fails(w.owner, "alter table narrow drop z", "depend on it")
	fails(w.owner, "alter table narrow alter z type bigint", "trigger definition")
	w.drop(narrow)
	o.Columns = "z"
	w.install(o)
	w.write("update t set b = 4", "update narrow set z = 5")
	w.told("t", `{"op":"update","table":"SCHEMA.t","key":{"key":1},"new":{"key":1,"b":4},"old":{"key":1,"b":2}}`)
	w.told("narrow", `{"op":"update","table":"SCHEMA.narrow","key":{"id":1},"new":{"z":5},"old":{"z":3}}`)
	w.make("alter table t drop key")
	fails(w.db, "update t set b = 5", `has no field "key"`)
	w.install(w.options("t"))
	w.write("update t set b = 6")
	w.told("t", `{"op":"update","table":"SCHEMA.t","new":{"b":6},"old":{"b":4}}`)

	// A renamed table keeps its channel and its name of old.
	w.make("alter table t rename to renamed")
	w.write("update renamed set b = 7")
	w.told("t", `{"op":"update","table":"SCHEMA.t","new":{"b":7},"old":{"b":6}}`)
	w.make("drop table narrow", "drop function pglistener_narrow()")
	w.remove(strings.ReplaceAll(script, " on "+w.schema+".t;", " on "+w.schema+".renamed;"))

	// Without the outbox, or the right to insert, there is no write either.
	w.install(w.options("renamed"))
	testkit.Exec(t, w.admin, "revoke insert on "+w.box+" from "+w.ownerRole)
	fails(w.db, "update renamed set b = 8", "permission denied for table outbox")
	testkit.Exec(t, w.admin, "drop table "+w.box)
	fails(w.db, "update renamed set b = 8", "does not exist")
}

func TestPartitions(t *testing.T) {
	w := newWorld(t)
	w.make("create table parts (gone int, id int, region text, n int, primary key (id, region)) partition by list (region)",
		"alter table parts drop gone",
		"create table parts_a partition of parts for values in ('a')")
	script := w.install(w.options("parts"))
	if strings.Contains(script, "inherit") {
		t.Errorf("partitions are not children:\n%s", script)
	}
	// The columns of a partition may lie in another order.
	w.make("create table parts_b (n int, x int, region text not null, id int not null)", "alter table parts_b drop x",
		"alter table parts attach partition parts_b for values in ('b')")
	w.install(w.options("parts"))

	w.write("insert into parts values (1, 'a', 1), (2, 'b', 2)", "update parts set n = 3 where id = 2", "update parts_b set n = n",
		"update parts set region = 'b' where id = 1", "delete from parts_b where id = 1", "insert into parts_a values (4, 'a')", "truncate parts")
	w.told("parts",
		`{"op":"insert","table":"SCHEMA.parts","key":{"id":1,"region":"a"},"new":{"id":1,"region":"a","n":1}}`,
		`{"op":"insert","table":"SCHEMA.parts","key":{"id":2,"region":"b"},"new":{"id":2,"region":"b","n":2}}`,
		`{"op":"update","table":"SCHEMA.parts","key":{"id":2,"region":"b"},"new":{"id":2,"region":"b","n":3},"old":{"id":2,"region":"b","n":2}}`,
		`{"op":"delete","table":"SCHEMA.parts","key":{"id":1,"region":"a"},"old":{"id":1,"region":"a","n":1}}`,
		`{"op":"insert","table":"SCHEMA.parts","key":{"id":1,"region":"b"},"new":{"id":1,"region":"b","n":1}}`,
		`{"op":"delete","table":"SCHEMA.parts","key":{"id":1,"region":"b"},"old":{"id":1,"region":"b","n":1}}`,
		`{"op":"insert","table":"SCHEMA.parts","key":{"id":4,"region":"a"},"new":{"id":4,"region":"a","n":null}}`,
		`{"op":"truncate","table":"SCHEMA.parts"}`)

	o := w.options("parts")
	o.Columns = "n"
	w.install(o)
	w.write("insert into parts values (1, 'b', 1)", "update parts set n = n", "update parts set n = 2")
	w.told("parts",
		`{"op":"insert","table":"SCHEMA.parts","key":{"id":1,"region":"b"},"new":{"n":1}}`,
		`{"op":"update","table":"SCHEMA.parts","key":{"id":1,"region":"b"},"new":{"n":2},"old":{"n":1}}`)
	w.remove(script)
}

func TestHugeRow(t *testing.T) {
	w := newWorld(t)
	w.make("create table huge (id int primary key, a text, n int)")
	w.install(w.options("huge"))
	w.write("insert into huge values (1, repeat('ab\"', 1000000))", "update huge set n = 1")
	got := w.raw("huge")
	if len(got) != 2 || len(got[0]) < 4_000_000 || len(got[1]) < 8_000_000 || !json.Valid([]byte(got[1])) {
		t.Errorf("%d payloads", len(got))
	}
}

// TestOrder: a trigger that changes the row again comes after ours, so that the last event has the last state.
func TestOrder(t *testing.T) {
	w := newWorld(t)
	w.make("create table orders (id int primary key, n int)",
		"create function again() returns trigger language plpgsql as $$ begin update orders set n = new.n + 1 where id = new.id and n < 3; return null; end $$",
		"create trigger a_again after insert or update on orders for each row execute function again()")
	w.install(w.options("orders"))
	w.write("insert into orders values (1, 1)")
	w.told("orders",
		`{"op":"insert","table":"SCHEMA.orders","key":{"id":1},"new":{"id":1,"n":1}}`,
		`{"op":"update","table":"SCHEMA.orders","key":{"id":1},"new":{"id":1,"n":2},"old":{"id":1,"n":1}}`,
		`{"op":"update","table":"SCHEMA.orders","key":{"id":1},"new":{"id":1,"n":3},"old":{"id":1,"n":2}}`)
}

// TestVirtualColumns: PostgreSQL does not compute them for triggers.
func TestVirtualColumns(t *testing.T) {
	if version(t) < 180000 {
		t.Skip("before PostgreSQL 18 there are none")
	}
	w := newWorld(t)
	w.make("create table v (id int primary key, n numeric, \"w'\" int generated always as (id * 2) virtual)")
	if script := w.install(w.options("v")); !strings.Contains(script, "does not see them: w'.") {
		t.Error(script)
	}
	w.write("insert into v values (1, 1.50)", "update v set n = n", "update v set n = 'NaN'")
	w.told("v", `{"op":"insert","table":"SCHEMA.v","key":{"id":1},"new":{"id":1,"n":1.50}}`,
		`{"op":"update","table":"SCHEMA.v","key":{"id":1},"new":{"id":1,"n":"NaN"},"old":{"id":1,"n":1.50}}`)
	o := w.options("v")
	o.Columns = "w'"
	refused(t, o, "virtual column")
	o.Columns = "n"
	if script := w.install(o); strings.Contains(script, "irtual columns") {
		t.Errorf("listed columns are all that is carried:\n%s", script)
	}
	w.write("update v set n = 2")
	w.told("v", `{"op":"update","table":"SCHEMA.v","key":{"id":1},"new":{"n":2},"old":{"n":"NaN"}}`)
}

func TestColumns(t *testing.T) {
	w := newWorld(t)
	w.make(`create table c (gone int, id int primary key, a json, "B c" int, d int, total int generated always as (d + 1) stored)`,
		"alter table c drop gone",
		"create table odd (id int primary key, \"x,y\" int, \"X,\"\"Y\" int, z int)",
		"create function touch() returns trigger language plpgsql as $$ begin if new.d = 5 then new.\"B c\" := 9; end if; return new; end $$",
		"create trigger touch before update on c for each row execute function touch()")
	o := w.options("c")
	o.Columns = ` A,"B c",a`
	script := w.install(o)
	w.write(`insert into c values (1, '{"x":1}', 2, 3)`)
	w.told("c", `{"op":"insert","table":"SCHEMA.c","key":{"id":1},"new":{"a":{"x":1},"B c":2}}`)
	w.write(`update c set d = 4`, `update c set a = a, "B c" = "B c"`)
	w.told("c")
	w.write(`update c set d = 5`) // a trigger changes what the statement does not name
	w.told("c", `{"op":"update","table":"SCHEMA.c","key":{"id":1},"new":{"a":{"x":1},"B c":9},"old":{"a":{"x":1},"B c":2}}`)
	w.write(`update c set a = null`)
	w.told("c", `{"op":"update","table":"SCHEMA.c","key":{"id":1},"new":{"a":null,"B c":9},"old":{"a":{"x":1},"B c":9}}`)
	w.write(`update c set id = 2`) // whoever knows the row by its key has to hear it
	w.told("c", `{"op":"update","table":"SCHEMA.c","key":{"id":2},"old_key":{"id":1},"new":{"a":null,"B c":9},"old":{"a":null,"B c":9}}`)
	w.write(`delete from c`)
	w.told("c", `{"op":"delete","table":"SCHEMA.c","key":{"id":2},"old":{"a":null,"B c":9}}`)
	o.Columns = "total"
	w.install(o)
	w.write(`insert into c values (1, null, 2, 3)`, `update c set a = '1'`, `update c set d = 6`)
	w.told("c", `{"op":"insert","table":"SCHEMA.c","key":{"id":1},"new":{"total":4}}`,
		`{"op":"update","table":"SCHEMA.c","key":{"id":1},"new":{"total":7},"old":{"total":4}}`)
	w.make("drop trigger touch on c", "drop function touch()")
	w.remove(script)

	o.Columns = "a,nope"
	refused(t, o, `has no column "nope"; it has id, a, B c, d, total`)
	o.Columns = ","
	refused(t, o, `has no column ""`)

	o = w.options("odd")
	o.Columns = `"X,""Y" , "x,y"`
	w.install(o)
	w.write("insert into odd values (1, 2, 3, 4)", "update odd set z = 5")
	w.told("odd", `{"op":"insert","table":"SCHEMA.odd","key":{"id":1},"new":{"X,\"Y":3,"x,y":2}}`)

	var defs, names []string
	for i := range 50 + 1 {
		names = append(names, fmt.Sprintf("c%d", i))
		defs = append(defs, names[i]+" int")
	}
	w.make("create table wide (" + strings.Join(defs, ", ") + ")")
	o = w.options("wide")
	o.Columns = strings.Join(names, ",")
	refused(t, o, "51 columns are too many")
	o.Columns = strings.Join(names[:50], ",")
	w.install(o)
	w.write("insert into wide values (1)")
	if got := w.raw("wide"); len(got) != 1 || !strings.Contains(got[0], `"c49"`) {
		t.Errorf("told %s", got)
	}
}

// refused tells whether Print returns an error of one line, and prints nothing.
func refused(t *testing.T, o request, want string) {
	t.Helper()
	var out bytes.Buffer
	err := o.print(&out)
	if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") || out.Len() > 0 {
		t.Errorf("%s: %v (want %s)\n%s", o.Table, err, want, out.String())
	}
}

func TestNotify(t *testing.T) {
	w := newWorld(t)
	w.make("create table cache (id text primary key, a int, b int)", "create table loose (a int)")
	o := w.options("cache")
	o.Notify, o.Channel, o.Columns = true, testkit.ChannelName(t)+`"'\`, "a"
	o.outbox = `"nowhere"` // and needs no outbox
	script := w.install(o)
	if strings.Contains(script, "security definer") {
		t.Errorf("NOTIFY needs no rights:\n%s", script)
	}
	l := pq.NewListener(testkit.DSN(t), time.Second, time.Second, nil)
	defer l.Close()
	if err := l.Listen(o.Channel); err != nil {
		t.Fatal(err)
	}
	heard := func(want string) {
		t.Helper()
		select {
		case n := <-l.Notify:
			same(t, n.Extra, strings.ReplaceAll(want, "SCHEMA", w.schema))
			if len(n.Extra) >= 8000 {
				t.Errorf("%d bytes", len(n.Extra))
			}
		case <-time.After(testkit.Patience):
			t.Fatal("not heard: " + want)
		}
	}
	w.write("insert into cache values ('x', 1)", "update cache set b = 2", "update cache set a = a", "update cache set a = 2", "update cache set id = 'y'")
	heard(`{"op":"insert","table":"SCHEMA.cache","key":{"id":"x"}}`)
	heard(`{"op":"update","table":"SCHEMA.cache","key":{"id":"x"}}`)
	heard(`{"op":"update","table":"SCHEMA.cache","key":{"id":"y"},"old_key":{"id":"x"}}`)

	// Around the limit, in characters of two bytes. A key of 10 kB would not fit an index, but that repeats.
	w.write("delete from cache")
	heard(`{"op":"delete","table":"SCHEMA.cache","key":{"id":"y"}}`)
	rest := len(`{"op" : "insert", "table" : "` + w.schema + `.cache", "key" : {"id" : ""}}`)
	fits := strings.Repeat("ü", (7999-rest)/2) + strings.Repeat("x", (7999-rest)%2)
	w.write("insert into cache values ('"+fits+"')", "insert into cache values ('"+fits+"x')", "insert into cache values (repeat('k', 10240))")
	heard(`{"op":"insert","table":"SCHEMA.cache","key":{"id":"` + fits + `"}}`)
	heard(`{"op":"insert","table":"SCHEMA.cache","truncated":true}`)
	heard(`{"op":"insert","table":"SCHEMA.cache","truncated":true}`)
	w.write("update cache set id = 'z' where id = repeat('k', 10240)", "truncate cache")
	heard(`{"op":"update","table":"SCHEMA.cache","truncated":true}`)
	heard(`{"op":"truncate","table":"SCHEMA.cache"}`)
	w.remove(script)

	o.Table, o.Columns = "loose", ""
	w.install(o)
	w.write("insert into loose values (1)", "update loose set a = a", "update loose set a = 2")
	heard(`{"op":"insert","table":"SCHEMA.loose"}`)
	heard(`{"op":"update","table":"SCHEMA.loose"}`)
	if got := w.raw(o.Channel); got != nil {
		t.Errorf("in the outbox: %s", got)
	}
}

// TestWriterRunsNothingAsDefiner: whatever a writer's session has in its search_path, its temporary schema and its
// settings, the function runs none of it.
func TestWriterRunsNothingAsDefiner(t *testing.T) {
	w := newWorld(t)
	w.make("create table orders (id int primary key, a text)", "create table told (id int primary key)")
	evil := w.schema + "_evil"
	testkit.Exec(t, w.admin, "create schema "+evil+" authorization "+w.role)
	t.Cleanup(func() { testkit.Exec(&noContext{t}, w.admin, "drop schema "+evil+" cascade") })
	w.write("set search_path = "+evil+", pg_catalog, "+w.schema,
		"create table ran (by text, what text)", "grant all on ran to public", "grant usage on schema "+evil+" to public")
	for _, f := range []string{"lower(text) returns text", "to_json(anyelement) returns json", "octet_length(text) returns int",
		"pg_notify(text, text) returns void", "row_to_json(anyelement) returns json", "checks(text) returns bool",
		"json_build_object(text, text, text, text) returns json", "json_build_object(text, integer) returns json",
		"json_build_object(text, text, text, text, text, json, text, anyelement) returns json",
		"json_build_object(text, text, text, text, text, json) returns json",
		// These fit better than what is in pg_catalog, and so run though that is first in the search_path.
		"format(text, name, name) returns text", "quote_ident(name) returns text", "replace(name, text, text) returns text", "same(oid, regprocedure) returns bool",
		"octet_length(name) returns int", "concat(text, text, text, text, text, text, text) returns text"} {
		w.write("create function " + f + " language plpgsql as $$ begin insert into " + evil + ".ran values (current_user, '" + f + "'); return" + map[bool]string{true: " null"}[!strings.Contains(f, "void")] + "; end $$")
	}
	w.write("create operator = (leftarg = oid, rightarg = regprocedure, function = same)",
		"create function eq(text, text) returns bool language plpgsql as $$ begin insert into "+evil+".ran values (current_user, '='); return false; end $$",
		"create operator = (leftarg = text, rightarg = text, function = eq)",
		"create function ne(orders, orders) returns bool language plpgsql as $$ begin insert into "+evil+".ran values (current_user, '*<>'); return true; end $$",
		"create operator *<> (leftarg = orders, rightarg = orders, function = ne)")
	w.write("create temp table outbox (channel text, payload text)", "create temp table pg_class (x int)", "create domain pg_temp.json as pg_catalog.json check ("+evil+".checks(value::text))",
		"create domain pg_temp.text as pg_catalog.text check ("+evil+".checks(value::pg_catalog.text))",
		"set plpgsql.extra_errors = 'all'", "set standard_conforming_strings = off")
	// The installer has it in the search_path too, as with a public schema that everybody may create in.
	testkit.Exec(t, w.admin, "alter role "+w.ownerRole+" set search_path = "+evil+", "+w.schema)
	w.owner = testkit.Open(t, testkit.WithUser(testkit.DSN(t), w.ownerRole, "x"))
	w.install(w.options("orders"))
	o := w.options("told")
	o.Notify = true
	w.install(o)
	w.write("set search_path = "+evil+", pg_temp, pg_catalog, "+w.schema,
		"insert into orders values (1, 'x')", "update orders set a = 'y'", "update orders set id = 2", "delete from orders", "truncate orders",
		"insert into told values (1)", "update told set id = 2", "delete from told")
	var ran string
	if err := w.admin.QueryRow("select coalesce(string_agg(by || ' ran ' || what, '; '), '') from " + evil + ".ran").Scan(&ran); err != nil || ran != "" {
		t.Errorf("%v %s", err, ran)
	}
	w.told("orders",
		`{"op":"insert","table":"SCHEMA.orders","key":{"id":1},"new":{"id":1,"a":"x"}}`,
		`{"op":"update","table":"SCHEMA.orders","key":{"id":1},"new":{"id":1,"a":"y"},"old":{"id":1,"a":"x"}}`,
		`{"op":"update","table":"SCHEMA.orders","key":{"id":2},"old_key":{"id":1},"new":{"id":2,"a":"y"},"old":{"id":1,"a":"y"}}`,
		`{"op":"delete","table":"SCHEMA.orders","key":{"id":2},"old":{"id":2,"a":"y"}}`,
		`{"op":"truncate","table":"SCHEMA.orders"}`)

	// Nor can a writer send events from a table of its own.
	w.write("create table " + evil + ".mine (id int)")
	testkit.Exec(t, w.owner, "grant create on schema "+w.schema+" to "+w.role)
	if _, err := w.db.Exec(`create trigger mine after insert on ` + evil + `.mine for each row execute function ` + w.schema + `.pglistener_orders()`); err == nil ||
		!strings.Contains(err.Error(), "permission denied for function") {
		t.Errorf("the function on another table: %v", err)
	}
	w.write("drop table " + evil + ".mine")
}

// noContext is a test whose context is not yet over when it cleans up.
type noContext struct{ testing.TB }

func (noContext) Context() context.Context { return context.Background() }

// TestInstallsSafelyOrNotAtAll: the script fails where it would break writes, or leave the function to another role.
func TestInstallsSafelyOrNotAtAll(t *testing.T) {
	w := newWorld(t)
	w.make("create table orders (id int primary key)")
	testkit.Exec(t, w.admin, "revoke insert on "+w.box+" from "+w.ownerRole)
	script := w.print(w.options("orders"))
	want := "grant insert on " + w.box + " to " + w.ownerRole
	if _, err := w.owner.Exec(script); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("no right to insert: %v", err)
	}
	testkit.Exec(t, w.admin, want)
	if _, err := w.owner.Exec(script); err != nil {
		t.Error(err)
	}
	w.write("insert into orders values (1)")
	w.told("orders", `{"op":"insert","table":"SCHEMA.orders","key":{"id":1},"new":{"id":1}}`)

	if _, err := w.admin.Exec(script); err == nil || !strings.Contains(err.Error(), `pglistener_orders belongs to another role`) {
		t.Errorf("the function of another role: %v", err)
	}
	w.remove(script)
}

// TestInstallerGivesUp: writers wait behind whoever waits for the table.
func TestInstallerGivesUp(t *testing.T) {
	w := newWorld(t)
	w.make("create table orders (id int primary key)")
	script := w.print(w.options("orders"))
	const patience = "set local lock_timeout = '10s';"
	if !strings.Contains(script, patience) {
		t.Errorf("no %q in it", patience)
	}
	script = strings.Replace(script, patience, "set local lock_timeout = '100ms';", 1) // ten seconds are too long for a test
	tx, err := w.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec("insert into orders values (1)"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	if _, err := w.owner.ExecContext(ctx, script); pq.As(err, pqerror.LockNotAvailable) == nil {
		t.Errorf("somebody writes to the table: %v", err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.owner.Exec(script); err != nil {
		t.Error(err)
	}
}

// TestChannels: a table can feed several, and the names of functions do not collide.
func TestChannels(t *testing.T) {
	w := newWorld(t)
	long := strings.Repeat("x", 63)
	w.make("create table orders (id int primary key)", "create table "+long+" (id int primary key)")
	channels := []string{"", "audit", `au:"'\ $1`, strings.Repeat("é", 31) + "e", strings.Repeat("é", 31) + "f"}
	for _, c := range channels {
		o := w.options("orders")
		o.Channel = c
		w.install(o)
		o.Table = long
		w.install(o)
	}
	w.write("insert into orders values (1)", "insert into "+long+" values (2)")
	for _, c := range channels {
		if c == "" {
			w.told("orders", `{"op":"insert","table":"SCHEMA.orders","key":{"id":1},"new":{"id":1}}`)
			w.told(long, `{"op":"insert","table":"SCHEMA.`+long+`","key":{"id":2},"new":{"id":2}}`)
			continue
		}
		w.told(c, `{"op":"insert","table":"SCHEMA.orders","key":{"id":1},"new":{"id":1}}`,
			`{"op":"insert","table":"SCHEMA.`+long+`","key":{"id":2},"new":{"id":2}}`)
	}

	o := w.options("orders")
	o.Channel = strings.Repeat("é", 32)
	refused(t, o, "CHANNEL has 64 bytes; PostgreSQL allows 63")
	o.Channel = "a\n; drop table orders; --"
	refused(t, o, "control character")
	for _, c := range []string{"a,b", "a=b", " a", "a ", "https://x"} { // CHANNELS cannot say them
		o.Channel = c
		refused(t, o, `no listener can name the channel "`+c+`"`)
	}
}

func TestParse(t *testing.T) {
	for args, want := range map[string]Options{
		"orders":                                    {Table: "orders"},
		"orders|audit":                              {Table: "orders", Channel: "audit"},
		"-trigger-notify|orders":                    {Table: "orders", Notify: true},
		"--trigger-columns|a,b|orders|audit":        {Table: "orders", Channel: "audit", Columns: "a,b"},
		"orders|-trigger-columns=a|-trigger-notify": {Table: "orders", Columns: "a", Notify: true},
		`"-x"|a=b`:                                  {Table: `"-x"`, Channel: "a=b"},
	} {
		if got, err := Parse(strings.Split(args, "|")); err != nil || got != want {
			t.Errorf("%s: %v %+v", args, err, got)
		}
	}
	for args, want := range map[string]string{
		"-trigger-notify":          "-trigger needs a table",
		"orders|audit|secret":      "a table and a channel, and not more",
		"|audit":                   "is empty",
		"orders| ":                 "is empty",
		"orders|-trigger-columns":  "-trigger-columns needs the names",
		"orders|-trigger-columns=": "-trigger-columns needs the names",
		"-trigger-columns|-trigger-notify|orders":       "-trigger-columns needs the names",
		"orders|-trigger-columns|a|-trigger-columns|b":  "-trigger-columns needs the names",
		"orders|-trigger-notify=secret":                 `"-trigger-notify" cannot follow`,
		"orders|-trigger-colums=secret":                 `"-trigger-colums" cannot follow -trigger: -trigger TABLE`,
		"orders|-":                                      `"-" cannot follow`,
		"postgres://u:secret@h/db":                      "is a connection string, which is not shown",
		"orders|host=h password=secret":                 "is a connection string, which is not shown",
		"orders|-trigger-columns=postgres://u:secret@h": "is a connection string, which is not shown",
		"or\nders": "control character",
		"\xff":     "not UTF-8",
	} {
		if _, err := Parse(strings.Split(args, "|")); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", args, err)
		}
	}
	if _, err := Parse(nil); err == nil {
		t.Error("no operand")
	}
}

// TestObjectNames: every pair of a table and a channel has a name of its own, and room for what is added to it.
func TestObjectNames(t *testing.T) {
	w := newWorld(t)
	seen := map[string]string{}
	long := strings.Repeat("ü", 31)
	all := []string{"a", "b", "a:b", "b:a", "a:", ":a", long, long + "x", "a_b", strings.Repeat("y", 42), strings.Repeat("y", 43)}
	for _, table := range all {
		w.make(`create table "` + table + `" (id int)`)
	}
	function := regexp.MustCompile(`(?m)^create or replace function [^.]+\.(\S+)\(\)`)
	for _, table := range all {
		for _, channel := range all {
			o := w.options(`"` + table + `"`)
			o.Channel = channel
			got := strings.Trim(function.FindStringSubmatch(w.print(o))[1], `"`)
			if pair := table + " " + channel; seen[got] != "" || len(got) > 63-10 {
				t.Errorf("%q is for %s and %s", got, pair, seen[got])
			} else {
				seen[got] = pair
			}
		}
	}
	for _, name := range []string{"a", strings.Repeat("y", 42)} { // as long as there is room
		if got := seen["pglistener_"+name]; got != name+" "+name {
			t.Errorf("%q %q", name, got)
		}
	}
}

// TestFollowsTheSearchPath: names without a schema mean what they mean in psql.
func TestFollowsTheSearchPath(t *testing.T) {
	w := newWorld(t)
	w.make("create table orders (id int)", `create table "Lines" (id int)`)
	testkit.Exec(t, w.admin, "create table "+w.schema+"_box.orders (id int)")
	for path, want := range map[string]string{w.schema + "," + w.schema + "_box": w.schema, w.schema + "_box," + w.schema: w.schema + "_box"} {
		o := w.options("orders")
		o.dsn, o.outbox = testkit.WithParams(o.dsn, "search_path", path), "outbox"
		if script := w.print(o); !strings.Contains(script, " on "+want+".orders\n") || !strings.Contains(script, "insert into "+w.box+" ") {
			t.Errorf("%s:\n%s", path, script)
		}
		o.Table = "Lines"
		if script := w.print(o); !strings.Contains(script, " on "+w.schema+`."Lines"`+"\n") {
			t.Errorf("%s:\n%s", path, script)
		}
	}
}

func TestRefuses(t *testing.T) {
	w := newWorld(t)
	w.make("create table orders (id int primary key)", `create table "Mixed" (id int)`, "create table mixed (id int)",
		"create view v as select * from orders", "create materialized view m as select * from orders", "create sequence s",
		"create table parts (id int) partition by list (id)", "create table sub partition of parts for values in (1) partition by list (id)",
		"create table leaf partition of sub for values in (1)", `create table "new
line" (id int)`)
	// PostgreSQL would cut a longer name to this one.
	long := strings.Repeat("x", 63)
	w.make("create table " + long + " (id int)")
	testkit.Exec(t, w.admin, "create extension if not exists postgres_fdw; create server "+w.schema+" foreign data wrapper postgres_fdw; create foreign table "+w.schema+".f (id int) server "+w.schema)
	t.Cleanup(func() { testkit.Exec(&noContext{t}, w.admin, "drop server "+w.schema+" cascade") })
	testkit.Exec(t, w.owner, "grant all on orders to public")
	temp, err := testkit.DB(t).Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer temp.Close()
	var tempSchema string
	if _, err := temp.ExecContext(t.Context(), "create temp table if not exists passing (id int)"); err != nil {
		t.Fatal(err)
	}
	if err := temp.QueryRowContext(t.Context(), "select nspname from pg_namespace where oid = pg_my_temp_schema()").Scan(&tempSchema); err != nil {
		t.Fatal(err)
	}
	for table, want := range map[string]string{
		w.box:                   "outbox is the outbox itself",
		"v":                     w.schema + ".v is a view",
		"m":                     "is a materialized view",
		"s":                     "is not a table",
		"orders_pkey":           "is not a table",
		"f":                     "is a foreign table",
		"pg_class":              "belongs to the system",
		tempSchema + ".passing": "is a temporary table",
		"sub":                   w.schema + ".sub is a partition: name the partitioned table, " + w.schema + ".parts",
		"leaf":                  "name the partitioned table, " + w.schema + ".parts",
		"Mixed":                 `may be "` + w.schema + `"."mixed" or "` + w.schema + `"."Mixed"`,
		"ordres":                `there is no table "ordres"; is it `,
		"Order":                 `is it `,
		"no.such.table.at.all":  `there is no table "no.such.table.at.all"`,
		"zzzzzzzzzzz":           `there is no table "zzzzzzzzzzz" (`,
		"":                      `there is no table ""`,
		`a"b`:                   `there is no table "a"b"`,
		"'; drop table orders":  "there is no table",
		long + "x":              "there is no table",
		`"` + long + `x"`:       "there is no table",
		"new\nline":             "control character",
		"no_such_schema.orders": `there is no table "no_such_schema.orders"; is it `,
	} {
		o := w.options(table)
		if strings.HasPrefix(table, "pg_temp") {
			o.dsn = testkit.DSN(t) // others may not even look
		}
		refused(t, o, want)
		o.Notify = true
		refused(t, o, want)
	}
	o := w.options("ordres")
	refused(t, o, w.schema+".orders")

	for asked, sqlName := range map[string]string{`"Mixed"`: `"Mixed"`, "mixed": `mixed`, w.schema + ".ORDERS": `orders`} {
		if script := w.print(w.options(asked)); !strings.Contains(script, " on "+w.schema+"."+sqlName+"\n") {
			t.Errorf("%s: %s", asked, script)
		}
	}

	o = w.options("orders")
	o.outbox = `"nowhere"."outbox"`
	refused(t, o, `there is no outbox "nowhere"."outbox": make it with pglistener -outbox-schema`)
	o.outbox = `"mixed"`
	refused(t, o, "mixed is not an outbox")
	o.dsn = "postgres://u:secret@%%/"
	refused(t, o, "not a valid connection string")
	o.dsn = testkit.WithUser("postgres://"+testkit.FreshAddress(t)+"/postgres?sslmode=disable", "u", "x")
	refused(t, o, "connection refused")
}
