// feature: outbox

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The flag -trigger; what it prints is tested in internal/trigger.

// TestFromATableToAnEvent: the way from a write of a role that has no right on the outbox to a handler's call.
func TestFromATableToAnEvent(t *testing.T) {
	t.Parallel()
	db, channel := testkit.DB(t), testkit.ChannelName(t)
	tab, writer := outboxTable(t, db), channel+"_writer"
	testkit.Exec(t, db, strings.NewReplacer("ORDERS", channel+"_orders", "WRITER", writer).Replace(`
		create table ORDERS (id int primary key, status text);
		create role WRITER login password 'x'; grant insert, update on ORDERS to WRITER`))
	t.Cleanup(func() {
		if _, err := db.Exec(strings.NewReplacer("ORDERS", channel+"_orders", "WRITER", writer).Replace(
			"drop table ORDERS; drop function pglistener_ORDERS; drop role WRITER")); err != nil {
			t.Error(err)
		}
	})
	cmd := exec.Command(program(t), "-trigger", channel+"_orders", "-trigger-columns", "status")
	cmd.Env = []string{"DATABASE_URL=" + testkit.DSN(t), "OUTBOX_TABLE=" + tab, "CONCURRENCY=wrong"} // which it does not read
	script, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("psql"); err == nil {
		psql := exec.Command("psql", "-X", "-q", testkit.DSN(t))
		psql.Stdin = bytes.NewReader(script)
		if out, err := psql.CombinedOutput(); err != nil || len(out) > 0 {
			t.Fatalf("%v %s", err, out)
		}
	} else {
		testkit.Exec(t, db, string(script))
	}

	file := filepath.Join(t.TempDir(), "orders.log")
	p := runProgram(t, fast(testkit.DSN(t), channel+"_orders=outbox:append:"+file, sending(tab)))
	p.Wait(t, "listening", 1)
	business := testkit.Open(t, testkit.WithUser(testkit.DSN(t), writer, "x"))
	if _, err := business.Exec("insert into " + tab + " (channel) values ('x')"); err == nil {
		t.Error("the writer has a right on the outbox")
	}
	testkit.Exec(t, business, "insert into "+channel+"_orders values (1, 'new')")
	handled := func(want string) {
		t.Helper()
		testkit.Eventually(t, "not handled: "+want, func() bool {
			text, _ := os.ReadFile(file)
			text = bytes.ReplaceAll(bytes.ReplaceAll(text, []byte(" "), nil), []byte(`\"`), []byte(`"`))
			return bytes.Contains(text, []byte(strings.ReplaceAll(want, "TABLE", "public."+channel+"_orders")))
		})
	}
	handled(`{"op":"insert","table":"TABLE","key":{"id":1},"new":{"status":"new"}}`)
	testkit.Exec(t, business, "update "+channel+"_orders set status = 'paid'")
	handled(`{"op":"update","table":"TABLE","key":{"id":1},"new":{"status":"paid"},"old":{"status":"new"}}`)
	emptied(t, db, tab)
}

// TestTriggerSaysWhatIsWrong: each mistake has a line that begins with the program's name, and no secret.
func TestTriggerSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	dsn, tab := testkit.DSN(t), outboxTable(t, testkit.DB(t))
	tests := map[string]struct {
		args string // separated by blanks
		vars vars
		code int
		want []string
	}{
		"no table":      {"", vars{"DATABASE_URL": dsn}, cli.Usage, []string{"-trigger needs a table"}},
		"no database":   {"orders", vars{}, cli.Usage, []string{"DATABASE_URL: not set"}},
		"everything":    {"-nope", vars{"OUTBOX_TABLE": "a.b.c", "DATABASE_URL_FILE": "/nowhere"}, cli.Usage, []string{"DATABASE_URL_FILE: ", `"-nope" cannot follow -trigger`, "OUTBOX_TABLE: "}},
		"bad string":    {"orders", vars{"DATABASE_URL": "postgres://u:hunter2@%%/"}, cli.Usage, []string{"DATABASE_URL: not a valid"}},
		"no such table": {"no_such_table", vars{"DATABASE_URL": dsn, "OUTBOX_TABLE": tab}, cli.Failed, []string{`there is no table "no_such_table"`}},
		"itself":        {tab, vars{"DATABASE_URL": dsn, "OUTBOX_TABLE": "'" + tab + "'"}, cli.Failed, []string{"is the outbox itself"}},
		"no server":     {"orders", vars{"DATABASE_URL": "postgres://u:hunter2@" + testkit.FreshAddress(t) + "/x?sslmode=disable"}, cli.Failed, []string{"connection refused: nothing listens there"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var out, errs bytes.Buffer
			code := run(t.Context(), append([]string{"-trigger"}, strings.Fields(test.args)...), cli.Env{Lookup: test.vars.lookup, Stdout: &out, Stderr: &errs})
			lines := strings.Split(strings.TrimSpace(errs.String()), "\n")
			if code != test.code || out.Len() > 0 || len(lines) != len(test.want) || strings.Contains(errs.String(), "hunter2") {
				t.Errorf("exit code %d: %s%s", code, out.String(), errs.String())
			}
			for i, want := range test.want {
				if i < len(lines) && (!strings.HasPrefix(lines[i], "pglistener: ") || !strings.Contains(lines[i], want)) {
					t.Errorf("%s\nwant %s", lines[i], want)
				}
			}
		})
	}
}
