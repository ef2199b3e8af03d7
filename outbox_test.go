// feature: outbox

package main

import (
	"context"
	"database/sql"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"bytes"
	"strings"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/outbox"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The outbox with the listener around it; what it does by itself is tested in internal/outbox.

// outboxTable makes a table of this test's own and returns its name.
func outboxTable(t *testing.T, db *sql.DB) string {
	t.Helper()
	name := testkit.ChannelName(t)
	if len(name) > 50 {
		name = name[:50]
	}
	makeOutbox(t, db, name)
	dropLater(t, db, name)
	return name
}

// dropLater drops a table when the test ends, for a test may run several times.
func dropLater(t *testing.T, db *sql.DB, name string) {
	t.Cleanup(func() { _, _ = db.Exec(`drop table if exists "` + name + `"`) })
}

func makeOutbox(t *testing.T, db *sql.DB, name string) {
	t.Helper()
	sql, err := outbox.Schema(name)
	if err != nil {
		t.Fatal(err)
	}
	testkit.Exec(t, db, sql)
}

func sending(table string, more ...vars) vars {
	v := vars{"OUTBOX_TABLE": table, "CATCH_UP_INTERVAL": "0"}
	for _, m := range more {
		for name, value := range m {
			v[name] = value
		}
	}
	return v
}

func rowCount(t *testing.T, db *sql.DB, table string) int {
	t.Helper()
	var n int
	if err := db.QueryRowContext(t.Context(), `select count(*) from "`+table+`"`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// emptied waits until the outbox is.
func emptied(t *testing.T, db *sql.DB, table string) {
	t.Helper()
	testkit.Eventually(t, "the outbox is not emptied", func() bool { return rowCount(t, db, table) == 0 })
}

func insert(t *testing.T, db *sql.DB, table, channel, payload string) (event string) {
	t.Helper()
	err := db.QueryRowContext(t.Context(), `insert into "`+table+`" (channel, payload) values ($1, $2) returning event_id`, channel, payload).Scan(&event)
	if err != nil {
		t.Fatal(err)
	}
	return event
}

// seen is a handler that records what it is given.
type seen struct {
	mu   sync.Mutex
	list []notify.Notification
}

func (s *seen) Handle(_ context.Context, n notify.Notification) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, n)
	return nil
}

func (s *seen) payloads() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for _, n := range s.list {
		out = append(out, n.Payload)
	}
	return out
}

func TestIdleOutboxCostsNoQueries(t *testing.T) {
	t.Parallel()
	s := testkit.OwnServer(t)
	db := testkit.Open(t, s.DSN())
	makeOutbox(t, db, "outbox")
	channel := testkit.ChannelName(t)
	start(t, fast(s.DSN(), channel+"=outbox:seen", vars{"PROBE_INTERVAL": "0"}), with("seen", &seen{})).listening(t)
	insert(t, db, "outbox", channel, "x")
	emptied(t, db, "outbox")
	statements := func() (n int) {
		t.Helper()
		testkit.Exec(t, db, "select pg_stat_clear_snapshot()")
		// Each statement is a transaction; this one, and autovacuum's in other databases, aside.
		if err := db.QueryRow("select xact_commit from pg_stat_database where datname = 'postgres'").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	time.Sleep(1500 * time.Millisecond) // what was done before is counted by then
	before := statements()
	time.Sleep(3 * time.Second) // that nothing happens is the point
	// Ours: two and two; pings every second count too.
	if n := statements() - before; n > 10 {
		t.Errorf("%d transactions in 3 s of idleness", n)
	}
}

func TestOutboxBehindTransactionPooler(t *testing.T) {
	t.Parallel()
	tab, channel, s := outboxTable(t, testkit.DB(t)), testkit.ChannelName(t), &seen{}
	r := start(t, probing(testkit.Bouncer(t, testkit.LocalServer(t), "transaction"), channel+"=outbox:seen", sending(tab, vars{"CONCURRENCY": "4"})), with("seen", s))
	r.Wait(t, "notifications do not arrive", 2)
	for i := range 500 {
		insert(t, testkit.DB(t), tab, channel, strconv.Itoa(i))
	}
	emptied(t, testkit.DB(t), tab) // at the pace of the probes
	if n := len(s.payloads()); n != 500 {
		t.Errorf("%d handled", n)
	}
}

// TestSweptChannelDoesNotNotify: a channel named to -outbox-schema is found by sweeping, and its writers take no part in NOTIFY.
func TestSweptChannelDoesNotNotify(t *testing.T) {
	t.Parallel()
	db, tab := testkit.DB(t), outboxTable(t, testkit.DB(t))
	swept, rung := tab+"_s", tab+"_r"
	schema := func(channels ...string) {
		t.Helper()
		text, err := outbox.Schema(tab, channels...)
		if err != nil {
			t.Fatal(err)
		}
		testkit.Exec(t, db, text)
	}
	schema(`it's a \ {table}`, swept)
	ears := start(t, fast(testkit.DSN(t), swept+"=test,"+rung+"=test"), nil).listening(t)
	hears := func(channels ...string) {
		t.Helper()
		testkit.Exec(t, db, "select pg_notify($1, 'end'), pg_notify($2, 'end')", rung, swept) // what was to come has come before it
		var got []string
		for ends := 0; ends < 2; {
			select {
			case n := <-ears.heard:
				if n.Payload == "end" {
					ends++
				} else {
					got = append(got, n.Channel)
				}
			case <-time.After(testkit.Patience):
				t.Fatal("the end was not heard")
			}
		}
		if slices.Sort(got); !slices.Equal(got, channels) {
			t.Errorf("heard %v, not %v", got, channels)
		}
	}
	both := `insert into "` + tab + `" (channel, key, payload) values ($1, $4, $3), ($2, $4, $3)
		on conflict (channel, key) where failed_at is null do update set payload = excluded.payload`
	testkit.Exec(t, db, both, swept, rung, "inserted", "k")
	hears(rung)
	testkit.Exec(t, db, both, swept, rung, "updated", "k")
	hears(rung)
	schema()
	testkit.Exec(t, db, both, swept, rung, "updated again", "k")
	hears(rung, swept)
	testkit.Exec(t, db, `delete from "`+tab+`"`)
	testkit.Exec(t, db, both, swept, rung, "again", "k")
	hears(rung, swept)
	schema(swept)

	begun := make(chan string, 100)
	start(t, fast(testkit.DSN(t), swept+"=outbox:note", vars{"OUTBOX_TABLE": tab, strings.ToUpper(swept) + "_CATCH_UP_INTERVAL": "20ms"}), with("note",
		notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
			begun <- n.Payload
			return nil
		}))).listening(t)
	for _, payload := range []string{"again", "a", "b", "c", "d", "e"} {
		if payload != "again" {
			insert(t, db, tab, swept, payload)
		}
		select {
		case got := <-begun:
			if got != payload {
				t.Errorf("%s, not %s", got, payload)
			}
		case <-time.After(testkit.Patience): // 40 ms on a calm machine: make bench says so
			t.Fatalf("%s was not begun", payload)
		}
	}
	hears()
}

// Each channel may have a table of its own, and the probe asks for each of them.
func TestProbeFindsTheTableThatIsGone(t *testing.T) {
	t.Parallel()
	db, channel, first := testkit.DB(t), testkit.ChannelName(t), outboxTable(t, testkit.DB(t))
	second := first + "_2"
	makeOutbox(t, db, second)
	dropLater(t, db, second)
	r := start(t, probing(testkit.DSN(t), channel+"_a=outbox:test,"+channel+"_b=outbox:test",
		sending(first, vars{strings.ToUpper(channel) + "_B_OUTBOX_TABLE": second})), nil).listening(t)
	r.ready(t)
	testkit.Exec(t, db, `drop table "`+second+`"`)
	testkit.Eventually(t, "ready although a channel's table is gone", func() bool {
		err := r.listener.Ready()
		return err != nil && strings.Contains(err.Error(), `channel "`+channel+`_b"`) && strings.Contains(err.Error(), second)
	})
	makeOutbox(t, db, second)
	r.ready(t)
}

// TestDatabaseURLIsToldOnce: that each outbox channel needs it, too, is no problem of CHANNELS.
func TestDatabaseURLIsToldOnce(t *testing.T) {
	t.Parallel()
	out := problemsOf(t, vars{"DATABASE_URL": "postgres://u:hunter2@h:port/x", "CHANNELS": "a=outbox:log,b=outbox:log,c=unknown"})
	if strings.Count(out, "not a valid connection string") != 1 || !strings.Contains(out, "CHANNELS: channel \"c\"") || strings.Contains(out, "hunter2") {
		t.Errorf("problems: %s", out)
	}
}

func TestOutboxSchemaFlag(t *testing.T) {
	t.Parallel()
	print := func(table string, swept ...string) (code int, stdout, stderr string) {
		var out, err bytes.Buffer
		code = run(t.Context(), append([]string{"-outbox-schema"}, swept...), cli.Env{Lookup: vars{"OUTBOX_TABLE": table, "CONCURRENCY": "wrong"}.lookup, Stdout: &out, Stderr: &err})
		return code, out.String(), err.String()
	}
	want, err := outbox.Schema(`app."my.outbox"`)
	if err != nil {
		t.Fatal(err)
	}
	if code, out, _ := print(`app."my.outbox"`); code != cli.OK || out != want {
		t.Errorf("%d %s", code, out)
	}
	if code, out, err := print("", "clicks", "it's"); code != cli.OK || strings.Count(out, "('clicks', 'it''s')") != 2 {
		t.Errorf("%d %s %s", code, out, err)
	}
	if code, out, err := print("", "clicks", strings.Repeat("long ", 13)); code != cli.Usage || out != "" || !strings.Contains(err, "operand 2 of -outbox-schema") || strings.Contains(err, "long") {
		t.Errorf("%d %s %s", code, out, err)
	}
	if code, out, err := print("a.b.c"); code != cli.Usage || out != "" || !strings.Contains(err, `OUTBOX_TABLE: "a.b.c" is not a table name`) {
		t.Errorf("%d %s %s", code, out, err)
	}
	if code, out, _ := print(""); code != cli.OK || !strings.Contains(out, `create table if not exists "outbox"`) {
		t.Errorf("%d %s", code, out)
	}
}
