// feature: outbox

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic" // feature: schedule
	"syscall"     // feature: schedule
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The commands of a person about rows of the outbox, by the built program.

// operator runs commands with just DATABASE_URL and OUTBOX_TABLE.
type operator struct {
	vars vars
	tab  string
}

func newOperator(t *testing.T) operator {
	t.Helper()
	tab := outboxTable(t, testkit.DB(t))
	return operator{vars{"DATABASE_URL": testkit.DSN(t), "OUTBOX_TABLE": tab, "CONCURRENCY": "wrong"}, tab}
}

// run returns what a command prints, after it has ended with code.
func (o operator) run(t *testing.T, code int, args ...string) (stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*testkit.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(t), args...)
	for name, value := range o.vars {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("%q: exit code %d, want %d\n%s%s", args, got, code, &out, &problems)
	}
	return out.String(), problems.String()
}

// says runs a command and compares everything that it prints.
func (o operator) says(t *testing.T, code int, want string, args ...string) {
	t.Helper()
	out, problems := o.run(t, code, args...)
	if out+problems != want {
		t.Errorf("%q:\n%s%swant\n%s", args, out, problems, want)
	}
}

// list is what -outbox-list shows of a table, in its order.
func (o operator) list(t *testing.T, args ...string) (all []map[string]any) {
	t.Helper()
	out, _ := o.run(t, cli.OK, append([]string{"-outbox-list"}, args...)...)
	for line := range strings.Lines(out) {
		var row map[string]any
		if err := json.Unmarshal([]byte(line), &row); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		all = append(all, row)
	}
	return all
}

// add inserts a row with more columns than its channel and its payload, and returns its id.
func (o operator) add(t *testing.T, channel, more string) (id string) {
	t.Helper()
	columns, values, _ := strings.Cut(more, "=>")
	if more != "" {
		columns, values = ", "+columns, ", "+values
	}
	if err := testkit.DB(t).QueryRow(`insert into "`+o.tab+`" (channel, payload`+columns+`) values ($1, 'secret payload'`+values+`) returning id`, channel).Scan(&id); err != nil {
		t.Fatal(err)
	}
	return id
}

// What each state of a row is made of.
const (
	failedRow   = `attempts, last_error, failed_at, run_at => 110, 'status 500', now() - interval '3 hours', now() - interval '4 days'`
	retryingRow = `attempts, last_error, due_at, run_at => 7, 'status 503', now() - interval '2 hours', now() + interval '30 minutes'`
	runningRow  = `attempts, lease, leased_until => 1, gen_random_uuid(), now() + interval '50 seconds'`
	laterRow    = `run_at => now() + interval '1 day'`
	plannedRow  = `schedule, attempts, key, run_at => '0 3 * * *', 0, 'nightly', now() + interval '5 hours'`
)

// snapshot is all that the table holds.
func (o operator) snapshot(t *testing.T) (text string) {
	t.Helper()
	if err := testkit.DB(t).QueryRow(`select coalesce(string_agg(o::text || o.xmin::text, e'\n' order by id), '') from "` + o.tab + `" o`).Scan(&text); err != nil {
		t.Fatal(err)
	}
	return text
}

func TestOperatorSeesRowsOfEachState(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	due, failed, retrying := o.add(t, "a", ""), o.add(t, "a", failedRow), o.add(t, "a", retryingRow)
	running, later, planned := o.add(t, "b", runningRow), o.add(t, "b", laterRow), o.add(t, "b", "run_at => now()")
	testkit.Exec(t, testkit.DB(t), `delete from "`+o.tab+`" where id = `+planned)
	planned = o.add(t, "b", plannedRow)
	testkit.Exec(t, testkit.DB(t), `update "`+o.tab+`" set attempts = 0, run_at = now() + interval '5 hours' where schedule is not null`)
	newest := o.add(t, "b", strings.Replace(failedRow, "3 hours", "1 hour", 1))
	before := o.snapshot(t)
	ids := func(args ...string) (all []string) {
		for _, row := range o.list(t, args...) {
			all = append(all, fmt.Sprint(row["id"]))
		}
		return all
	}
	for args, want := range map[string][]string{
		"":                 {newest, failed, due, running, retrying, planned, later},
		"all":              {newest, failed, due, running, retrying, planned, later},
		"failed":           {newest, failed},
		"failed a":         {failed},
		"waiting":          {due, running, retrying, later},
		"waiting all":      {due, running, retrying, later},
		"scheduled":        {planned},
		"a":                {failed, due, retrying},
		"channel=b":        {newest, running, planned, later},
		failed:             {failed},
		due + " " + failed: {failed, due},
	} {
		if got := ids(strings.Fields(args)...); !slices.Equal(got, want) {
			t.Errorf("%q lists %v, want %v", args, got, want)
		}
	}
	states := map[string]string{due: "due", failed: "failed", retrying: "retrying", running: "running", later: "later", planned: "later"}
	for _, row := range o.list(t) {
		if want := states[fmt.Sprint(row["id"])]; want != "" && row["state"] != want {
			t.Errorf("%v, want %s", row, want)
		}
	}
	row := o.list(t, failed)[0]
	for name, want := range map[string]any{"channel": "a", "attempts": 110.0, "last_error": "status 500", "key": nil, "schedule": nil, "payload": nil} {
		if row[name] != want {
			t.Errorf("%s: %v, want %v", name, row[name], want)
		}
	}
	if at, err := time.Parse(time.RFC3339, row["failed_at"].(string)); err != nil || time.Since(at).Round(time.Minute) != 3*time.Hour {
		t.Errorf("failed_at: %v %v", row["failed_at"], err)
	}
	o.says(t, cli.Failed, "not found: 1 row, id 4711\n", "-outbox-list", "4711")
	o.says(t, cli.OK, "no rows; the states are failed, waiting and scheduled, and anything else but digits is a channel\n", "-outbox-list", "faild")
	if o.snapshot(t) != before {
		t.Error("the table has changed")
	}
}

// onTerminal runs a command on a terminal and returns what reaches it.
func (o operator) onTerminal(t *testing.T, args ...string) string {
	t.Helper()
	script, err := exec.LookPath("script")
	if err != nil {
		testkit.Skip(t, "needs the program script")
	}
	cmd := exec.CommandContext(t.Context(), script, "-qec", program(t)+" "+strings.Join(args, " "), "/dev/null")
	cmd.Env = append(cmd.Env, "PATH="+os.Getenv("PATH"))
	for name, value := range o.vars {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return strings.ReplaceAll(string(out), "\r\n", "\n")
}

func TestOperatorSeesColumnsOnATerminal(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	o.add(t, "orders", failedRow)
	o.add(t, "orders", retryingRow)
	lines := strings.Split(o.onTerminal(t, "-outbox-list"), "\n")
	if len(lines) != 4 || !slices.Equal(strings.Fields(lines[0]), []string{"ID", "CHANNEL", "STATE", "WHEN", "ATTEMPTS", "CREATED", "KEY", "SCHEDULE", "LAST", "ERROR"}) ||
		!regexp.MustCompile(`orders   failed    03:00:\d\d ago  110`).MatchString(lines[1]) || !strings.HasSuffix(lines[1], "status 500") ||
		!strings.Contains(lines[2], "orders   retrying  in 00:29:") {
		t.Errorf("%s", strings.Join(lines, "\n"))
	}
	testkit.Exec(t, testkit.DB(t), `insert into "`+o.tab+`" (channel, run_at) select 'many', 'infinity' from generate_series(1, 150)`)
	out := o.onTerminal(t, "-outbox-list")
	if strings.Count(out, "\n") != 102 || !strings.Contains(out, "\n52 more rows are not shown; name a state, a channel or an id\n") || !strings.Contains(out, "later     never         ") {
		t.Errorf("%s", out)
	}
	testkit.Exec(t, testkit.DB(t), `insert into "`+o.tab+`" (channel) select 'many' from generate_series(1, 11000)`)
	if out := o.onTerminal(t, "-outbox-list", "waiting"); !strings.Contains(out, "\nat least 1001 more rows are not shown") || strings.Contains(out, "failed") {
		t.Errorf("%s", out)
	}
	out, problems := o.run(t, cli.OK, "-outbox-list")
	if strings.Count(out, "\n") != 1000 || problems != "at least 1002 more rows are not shown; name a state, a channel or an id\n" {
		t.Errorf("%d lines, %s", strings.Count(out, "\n"), problems)
	}
}

// What rows hold is written by others, and must not command the terminal.
func TestNothingOfARowCommandsATerminal(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	const evil = "\x1b]0;owned\x07\x1b[2J\r\n\t\u009b31m\u202e\x7f x"
	_, err := testkit.DB(t).Exec(`insert into "`+o.tab+`" (channel, key, last_error, failed_at) values ($1, $1, $1, now())`, evil)
	if err != nil {
		t.Fatal(err)
	}
	out, _ := o.run(t, cli.OK, "-outbox-list")
	for name, text := range map[string]string{"columns": o.onTerminal(t, "-outbox-list"), "JSON": out} {
		if strings.ContainsAny(text, "\x1b\x07\r\t\u009b\u202e\x7f") || strings.Count(text, "\n") != map[string]int{"columns": 2, "JSON": 1}[name] {
			t.Errorf("%s: %q", name, text)
		}
	}
	if row := o.list(t)[0]; row["last_error"] != evil || row["key"] != evil || row["channel"] != evil {
		t.Errorf("%q", row)
	}
	testkit.Exec(t, testkit.DB(t), `update "`+o.tab+`" set channel = 'x'`)
	if out := o.onTerminal(t, "-outbox-list", "failed"); !strings.Contains(out, `\u001b]0;owned`) {
		t.Errorf("%q", out)
	}
}

func TestOperatorRetries(t *testing.T) {
	t.Parallel()
	channel, other := testkit.ChannelName(t), testkit.ChannelName(t)+"_other"
	o := newOperator(t)
	failed, retrying, running := o.add(t, channel, failedRow), o.add(t, channel, retryingRow), o.add(t, channel, runningRow)
	due, later, elsewhere := o.add(t, channel, ""), o.add(t, channel, laterRow), o.add(t, other, failedRow)
	before := o.snapshot(t)
	o.says(t, cli.OK, "would be due now: 2 rows, ids "+failed+" "+retrying+"\n", "-outbox-retry", "-n", channel)
	o.says(t, cli.OK, "would be due now: 3 rows, ids "+failed+" "+retrying+" "+elsewhere+"\n", "-outbox-retry", "all", "-n")
	o.says(t, cli.Failed, "would be due now: 1 row, id "+failed+"\nleft alone, its handler is running: 1 row, id "+running+
		"\nleft alone, it waits and has not failed: 2 rows, ids "+due+" "+later+"\nthere is no such row: 1 row, id 4711\n",
		"-outbox-retry", "-n", "4711", failed, running, due, later, failed)
	if o.snapshot(t) != before {
		t.Error("-n has changed the table")
	}

	var mu = make(chan struct{}, 1)
	var list []notify.Notification
	handled := func() (ids []string) {
		mu <- struct{}{}
		defer func() { <-mu }()
		for _, n := range list {
			ids = append(ids, fmt.Sprintf("%s attempt %d", n.ID(), n.Attempt))
		}
		return ids
	}
	event := func(id string) (event string) {
		if err := testkit.DB(t).QueryRow(`select event_id from "` + o.tab + `" where id = ` + id).Scan(&event); err != nil {
			t.Fatal(err)
		}
		return event
	}
	want := []string{event(failed) + " attempt 1", event(retrying) + " attempt 8"}
	testkit.Exec(t, testkit.DB(t), `delete from "`+o.tab+`" where id = `+due)
	r := start(t, fast(testkit.DSN(t), channel+"=outbox:seen", sending(o.tab)), with("seen", notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		mu <- struct{}{}
		defer func() { <-mu }()
		list = append(list, n)
		return nil
	})))
	r.ready(t)
	o.says(t, cli.OK, "due now: 2 rows, ids "+failed+" "+retrying+"\n", "-outbox-retry", channel)
	began := time.Now() // that the command starts may take long on a loaded machine
	testkit.Eventually(t, "what is retried is not handled", func() bool { return len(handled()) == 2 })
	if took := time.Since(began); took > time.Second {
		t.Errorf("handled after %v: nobody has rung", took)
	}
	if got := handled(); !slices.Equal(got, want) && !slices.Equal(got, []string{want[1], want[0]}) {
		t.Errorf("handled %v, want %v", got, want)
	}
	const nothing = "no row of a channel of that name is failed or retrying; -outbox-list shows what there is, and several ids are separated by blanks\n"
	o.says(t, cli.OK, "due now: 0 rows\n"+nothing, "-outbox-retry", channel)
	o.says(t, cli.OK, "due now: 1 row, id "+elsewhere+"\n", "-outbox-retry", "all")
	if row := o.list(t, elsewhere)[0]; row["state"] != "due" || row["attempts"] != 0.0 || row["failed_at"] != nil {
		t.Errorf("%v", row)
	}
	if rows := o.list(t, channel); len(rows) != 2 || fmt.Sprint(rows[0]["id"]) != running || fmt.Sprint(rows[1]["id"]) != later {
		t.Errorf("others were touched: %v", rows)
	}
}

// A row whose handler runs is left to it, whatever the command.
func TestOperatorLeavesRunningRowsAlone(t *testing.T) {
	t.Parallel()
	o, channel := newOperator(t), testkit.ChannelName(t)
	gate, begun := make(chan struct{}), make(chan notify.Notification, 10)
	start(t, fast(testkit.DSN(t), channel+"=outbox:held", sending(o.tab, vars{"CONCURRENCY": "4"})), with("held", notify.HandlerFunc(func(_ context.Context, n notify.Notification) error {
		begun <- n
		<-gate
		return nil
	}))).ready(t)
	id := o.add(t, channel, `attempts, last_error => 3, 'as before'`)
	<-begun
	before := o.snapshot(t)
	for _, command := range []string{"-outbox-retry", "-outbox-purge"} {
		for _, what := range []string{channel, "all"} {
			out, problems := o.run(t, cli.OK, command, what)
			if !strings.HasSuffix(out, ": 0 rows\n") || problems != "" && !strings.HasPrefix(problems, "no row of a channel of that name is ") {
				t.Errorf("%s %s: %s%s", command, what, out, problems)
			}
		}
		if _, problems := o.run(t, cli.Failed, command, id); problems != "left alone, its handler is running: 1 row, id "+id+"\n" {
			t.Errorf("%s: %s", command, problems)
		}
	}
	if o.snapshot(t) != before {
		t.Error("the row has changed")
	}
	close(gate)
	emptied(t, testkit.DB(t), o.tab)
	if len(begun) != 0 {
		t.Error("it was handled twice")
	}
}

func TestOperatorPurges(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	one, two, three := o.add(t, "a", failedRow), o.add(t, "a", failedRow), o.add(t, "b", failedRow)
	others := []string{o.add(t, "a", retryingRow), o.add(t, "a", runningRow), o.add(t, "a", ""), o.add(t, "a", laterRow)}
	before := o.snapshot(t)
	o.says(t, cli.OK, "would be deleted: 2 rows, ids "+one+" "+two+"\n", "-outbox-purge", "-n", "a")
	if o.snapshot(t) != before {
		t.Error("-n has changed the table")
	}
	o.says(t, cli.Failed, "deleted: 1 row, id "+one+"\nleft alone, it waits and has not failed: 1 row, id "+others[0]+"\nthere is no such row: 1 row, id 99\n",
		"-outbox-purge", one, others[0], "99")
	o.says(t, cli.OK, "deleted: 1 row, id "+two+"\n", "-outbox-purge", "a")
	o.says(t, cli.OK, "deleted: 1 row, id "+three+"\n", "-outbox-purge", "all")
	if n := rowCount(t, testkit.DB(t), o.tab); n != len(others) {
		t.Errorf("%d rows are left", n)
	}
}

func TestOperatorKeepsToKeys(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	key := func(k string) string { return strings.Replace(failedRow, " =>", ", key =>", 1) + ", '" + k + "'" }
	lives, old, newer, alone := o.add(t, "a", key("lives")), o.add(t, "a", key("twice")), o.add(t, "a", key("twice")), o.add(t, "a", key("alone"))
	o.add(t, "a", `key => 'lives'`)
	elsewhere := o.add(t, "b", key("lives")) // a key is the channel's
	want := "due now: 3 rows, ids " + newer + " " + alone + " " + elsewhere + "\nskipped, another row has its key by now: 2 rows, ids " + lives + " " + old + "\n"
	o.says(t, cli.OK, "would be "+want, "-outbox-retry", "all", "-n")
	o.says(t, cli.OK, want, "-outbox-retry", "all")
	o.says(t, cli.Failed, "due now: 0 rows\nskipped, another row has its key by now: 1 row, id "+lives+"\n", "-outbox-retry", lives)
	o.says(t, cli.OK, "deleted: 2 rows, ids "+lives+" "+old+"\n", "-outbox-purge", "a")
	// More than what is done at once: -n knows that only one of them goes back.
	testkit.Exec(t, testkit.DB(t), `insert into "`+o.tab+`" (channel, key, failed_at) select 'c', 'often', now() from generate_series(1, 299)`)
	last := o.add(t, "c", key("often"))
	for _, args := range [][]string{{"-outbox-retry", "-n", "c"}, {"-outbox-retry", "c"}} {
		if out, problems := o.run(t, cli.OK, args...); !strings.Contains(out, "due now: 1 row, id "+last+"\n") || !strings.Contains(problems, ": 299 rows, ") {
			t.Errorf("%q: %s%s", args, out, problems)
		}
	}
}

// The row of a schedule always has the key, so that a failed run of it goes back without.
func TestOperatorRetriesRunsOfSchedules(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	planned := o.add(t, "a", plannedRow)
	testkit.Exec(t, testkit.DB(t), `update "`+o.tab+`" set attempts = 0, run_at = now() + interval '5 hours'`)
	run := strings.Replace(failedRow, " =>", ", key =>", 1) + ", 'nightly'"
	one, two := o.add(t, "a", run), o.add(t, "a", run)
	o.says(t, cli.OK, "due now: 2 rows, ids "+one+" "+two+"\n", "-outbox-retry", "a")
	for _, row := range o.list(t, "waiting") {
		if row["state"] != "due" || row["key"] != nil {
			t.Errorf("%v", row)
		}
	}
	if row := o.list(t, planned)[0]; row["state"] != "later" || row["key"] != "nightly" {
		t.Errorf("%v", row)
	}
	// One that could not be read goes on at its next time, and does not run at once.
	unread := o.add(t, "a", strings.Replace(failedRow, " =>", ", schedule =>", 1)+", '0 25 * * *'")
	testkit.Exec(t, testkit.DB(t), `update "`+o.tab+`" set schedule = '0 23 * * *' where id = `+unread)
	o.says(t, cli.OK, "due now: 1 row, id "+unread+"\n", "-outbox-retry", unread)
	var attempts int
	if err := testkit.DB(t).QueryRow(`select attempts from "` + o.tab + `" where id = ` + unread).Scan(&attempts); err != nil || attempts != -1 {
		t.Errorf("attempts %d, %v", attempts, err)
	}
}

// An open transaction holds up nothing but its own row, and its own key.
func TestOperatorGoesAroundLocks(t *testing.T) {
	t.Parallel()
	o, db := newOperator(t), testkit.DB(t)
	locked := o.add(t, "a", failedRow)
	keyed := o.add(t, "a", strings.Replace(failedRow, " =>", ", key =>", 1)+", 'written'")
	var free []string
	for range 5 {
		free = append(free, o.add(t, "a", failedRow))
	}
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	for _, query := range []string{`select 1 from "` + o.tab + `" where id = ` + locked + ` for update`, `insert into "` + o.tab + `" (channel, key) values ('a', 'written')`} {
		if _, err := tx.Exec(query); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	o.says(t, cli.Failed, "due now: 5 rows, ids "+strings.Join(free, " ")+"\nskipped, an open transaction holds the row or its key; try again later: 2 rows, ids "+locked+" "+keyed+"\n",
		"-outbox-retry", "a")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	o.says(t, cli.Failed, "deleted: 1 row, id "+keyed+"\nskipped, an open transaction holds the row or its key; try again later: 1 row, id "+locked+"\n", "-outbox-purge", "all")
	if _, err := tx.Exec(`lock table "` + o.tab + `"`); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-outbox-list"}, {"-outbox-retry", "all"}, {"-outbox-purge", "a"}} {
		o.says(t, cli.Failed, "pglistener: an open transaction has locked the table; try again later\n", args...)
	}
	if _, problems := o.run(t, cli.Failed, "-outbox-retry", locked, free[0], free[1]); !strings.Contains(problems, "try again later: 3 rows") {
		t.Errorf("%s", problems)
	}
}

// A great many rows are done in pieces, each within the time limit of a statement.
func TestOperatorDoesManyRows(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	o.vars["PING_TIMEOUT"] = "30s" // for a loaded machine; nothing takes nearly as long
	many := 4000
	if n, err := strconv.Atoi(os.Getenv("MANY_ROWS")); err == nil {
		many = n
	}
	testkit.Exec(t, testkit.DB(t), `insert into "`+o.tab+`" (channel, attempts, last_error, failed_at) select 'a', 110, 'no', now() from generate_series(1, $1)`, many)
	testkit.Exec(t, testkit.DB(t), `insert into "`+o.tab+`" (channel, attempts, last_error, run_at) select 'b', 1, 'no', now() + interval '1 hour' from generate_series(1, $1)`, many)
	began := time.Now()
	out, problems := o.run(t, cli.OK, "-outbox-retry", "all")
	t.Logf("%d rows: retried in %v%s", 2*many, time.Since(began), problems)
	if want := fmt.Sprintf("due now: %d rows, ids 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 ...\n", 2*many); out != want {
		t.Errorf("%s", out)
	}
	testkit.Exec(t, testkit.DB(t), `update "`+o.tab+`" set failed_at = now()`)
	began = time.Now()
	out, problems = o.run(t, cli.OK, "-outbox-purge", "all")
	t.Logf("purged in %v%s", time.Since(began), problems)
	if !strings.HasPrefix(out, fmt.Sprintf("deleted: %d rows", 2*many)) || rowCount(t, testkit.DB(t), o.tab) != 0 {
		t.Errorf("%s", out)
	}
}

func TestOperatorMistakes(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	primary := testkit.OwnServer(t)
	makeOutbox(t, testkit.Open(t, primary.DSN()), "outbox")
	testkit.Exec(t, testkit.Open(t, primary.DSN()), "insert into outbox (channel, failed_at) values ('a', now())")
	standby := vars{"DATABASE_URL": testkit.StandbyOf(t, primary).DSN(), "OUTBOX_TABLE": "outbox"}
	o.add(t, "a", failedRow)
	before := o.snapshot(t)
	role := "o" + strconv.FormatInt(time.Now().UnixNano(), 36)
	testkit.Exec(t, testkit.DB(t), "create role "+role+" login password 'x'")
	schema := "s" + role
	testkit.Exec(t, testkit.DB(t), "create schema "+schema+`; create materialized view "`+o.tab+`_view" as select * from "`+o.tab+`"`)
	t.Cleanup(func() {
		_, _ = testkit.DB(t).Exec(`drop schema ` + schema + ` cascade; drop materialized view "` + o.tab + `_view"; drop owned by ` + role + `; drop role ` + role)
	})
	stranger := testkit.WithUser(testkit.DSN(t), role, "x")
	grant := func(rights string) string {
		return `grant ` + rights + ` on "` + o.tab + `" to the user in DATABASE_URL`
	}
	nobody := "postgres://u:hunter2@" + testkit.FreshAddress(t) + "/x?sslmode=disable"
	for _, c := range []struct {
		args string
		vars vars
		code int
		want string
	}{
		{"-outbox-retry", nil, cli.Usage, "say which rows: ID..., CHANNEL or all"},
		{"-outbox-purge", nil, cli.Usage, "say which rows"},
		{"-outbox-purge -n", nil, cli.Usage, "say which rows"},
		{"-outbox-retry |", nil, cli.Usage, "operand 1 is no channel"},
		{"-outbox-retry 1 twelve", nil, cli.Usage, "operand 2 is not the number of a row"},
		{"-outbox-retry all 1", nil, cli.Usage, "operand 1 is not the number of a row"},
		{"-outbox-retry 99999999999999999999", nil, cli.Usage, "operand 1 is too large for an id"},
		{"-outbox-retry --dry-run", nil, cli.Usage, "operand 1 is neither an id nor a simple name"},
		{"-outbox-retry postgres://u:hunter2@h/x", nil, cli.Usage, "the database is that of DATABASE_URL"},
		{"-outbox-list -n", nil, cli.Usage, "neither an id nor a simple name"},
		{"-outbox-list broken a", nil, cli.Usage, "operand 1 is no state: those are failed, waiting and scheduled"},
		{"-outbox-list failed a b", nil, cli.Usage, "a CHANNEL or all stands alone"},
		{"-outbox-list", vars{"OUTBOX_TABLE": "a.b.c"}, cli.Usage, `OUTBOX_TABLE: "a.b.c" is not a table name`},
		{"-outbox-list", vars{"PING_TIMEOUT": "soon"}, cli.Usage, `PING_TIMEOUT: "soon" is not a duration`},
		{"-outbox-list", vars{"DATABASE_URL": "postgres://u:hunter2@h:port/x"}, cli.Usage, "DATABASE_URL: not a valid connection string"},
		{"-outbox-list", vars{"DATABASE_URL": ""}, cli.Usage, "DATABASE_URL: not set"},
		{"-outbox-list", vars{"DATABASE_URL": nobody}, cli.Failed, "connection refused: nothing listens there: check host and port in DATABASE_URL"},
		{"-outbox-list", vars{"OUTBOX_TABLE": "no_such"}, cli.Failed, "make it: OUTBOX_TABLE=no_such pglistener -outbox-schema"},
		{"-outbox-retry all", vars{"OUTBOX_TABLE": `app."no.such"`}, cli.Failed, `make it: OUTBOX_TABLE='app."no.such"' pglistener -outbox-schema`},
		{"-outbox-retry all", vars{"OUTBOX_TABLE": o.tab + "_view"}, cli.Failed, "is a materialized view; name the table itself"},
		{"-outbox-retry all", standby, cli.Failed, "the server is a standby, where rows can only be listed"},
		{"-outbox-list", vars{"DATABASE_URL": stranger}, cli.Failed, grant("select")},
		{"-outbox-retry all", vars{"DATABASE_URL": stranger}, cli.Failed, grant("select, update")},
		{"-outbox-purge 1", vars{"DATABASE_URL": stranger}, cli.Failed, grant("select, update, delete")},
		{"-outbox-purge 1", vars{"DATABASE_URL": stranger, "OUTBOX_TABLE": schema + ".x"}, cli.Failed, `, and usage on schema "` + schema + `"`},
	} {
		p := operator{vars{}, o.tab}
		for _, m := range []vars{o.vars, c.vars} {
			for name, value := range m {
				p.vars[name] = value
			}
		}
		out, problems := p.run(t, c.code, strings.Split(strings.ReplaceAll(c.args, " |", " "), " ")...)
		if !strings.HasPrefix(problems, "pglistener: ") || !strings.Contains(problems, c.want) || strings.Count(problems, "\n") != 1 || strings.Contains(problems, "hunter2") {
			t.Errorf("%s: %swant one line with %q", c.args, problems, c.want)
		}
		if out != "" && out != "due now: 0 rows\n" && out != "deleted: 0 rows\n" {
			t.Errorf("%s: %s", c.args, out)
		}
	}
	if o.snapshot(t) != before {
		t.Error("the table has changed")
	}
	(operator{vars: standby}).run(t, cli.OK, "-outbox-list")
	// The rights that the hints name are enough.
	p := operator{vars{"DATABASE_URL": stranger, "OUTBOX_TABLE": o.tab}, o.tab}
	for rights, args := range map[string][]string{"select": {"-outbox-list"}, "select, update": {"-outbox-retry", "a"}, "select, update, delete": {"-outbox-purge", "a"}} {
		testkit.Exec(t, testkit.DB(t), `revoke all on "`+o.tab+`" from `+role+`; grant `+rights+` on "`+o.tab+`" to `+role)
		p.run(t, cli.OK, args...)
	}
	// A server that does not answer.
	dsn, proxy := testkit.Proxied(t, testkit.DSN(t))
	proxy.Mute(true)
	p.vars = vars{"DATABASE_URL": dsn, "OUTBOX_TABLE": o.tab, "PING_TIMEOUT": "300ms"}
	if _, problems := p.run(t, cli.Failed, "-outbox-retry", "all"); !strings.Contains(problems, "did not answer within PING_TIMEOUT, which is 300ms") {
		t.Errorf("%s", problems)
	}
}

// Each variable may be written as everywhere, and a table may have any name.
func TestOperatorOfOddTables(t *testing.T) {
	t.Parallel()
	db := testkit.DB(t)
	schema := "Odd " + strconv.FormatInt(time.Now().UnixNano(), 36)
	testkit.Exec(t, db, "create schema "+pq.QuoteIdentifier(schema))
	t.Cleanup(func() { _, _ = db.Exec("drop schema " + pq.QuoteIdentifier(schema) + " cascade") })
	url, err := url.Parse(testkit.DSN(t))
	if err != nil {
		t.Fatal(err)
	}
	file := t.TempDir() + "/dsn"
	if err := os.WriteFile(file, []byte(testkit.DSN(t)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for value, name := range map[string]string{
		schema + `.Orders`: "Orders", schema + `."my.outbox"`: "my.outbox", `"` + schema + `"."Quoted.Parts"`: "Quoted.Parts", `"` + schema + `.quoted by docker"`: "quoted by docker", "'" + schema + ".it''s'": "it''s",
	} {
		for _, v := range []vars{
			{"DATABASE_URL_FILE": file}, {"DATABASE_URL": "'" + testkit.DSN(t) + "'"},
			{"PGHOST": url.Hostname(), "PGPORT": url.Port(), "PGUSER": url.User.Username(), "PGDATABASE": strings.Trim(url.Path, "/"), "PGSSLMODE": "disable"},
		} {
			v["OUTBOX_TABLE"] = value
			o := operator{vars: v}
			ddl, _ := o.run(t, cli.OK, "-outbox-schema")
			testkit.Exec(t, db, ddl)
			table := pq.QuoteIdentifier(schema) + "." + pq.QuoteIdentifier(name)
			testkit.Exec(t, db, `insert into `+table+` (channel, failed_at) values ('all', now()), ('12', now()), ('failed', now()), ('x', now())`)
			for _, channel := range []string{"all", "12", "failed"} {
				o.says(t, cli.OK, "deleted: 1 row, id "+o.id(t, "channel="+channel)+"\n", "-outbox-purge", "channel="+channel)
			}
			o.says(t, cli.OK, "due now: 1 row, id "+o.id(t, "x")+"\n", "-outbox-retry", "x")
			if rows := o.list(t); len(rows) != 1 || rows[0]["channel"] != "x" {
				t.Errorf("%v", rows)
			}
			testkit.Exec(t, db, "truncate "+table)
		}
	}
}

// id is the id of the only row that args list.
func (o operator) id(t *testing.T, args ...string) string {
	t.Helper()
	rows := o.list(t, args...)
	if len(rows) != 1 {
		t.Fatalf("%q lists %v", args, rows)
	}
	return fmt.Sprint(rows[0]["id"])
}

// begin: schedule

// The row of a doorbell's schedule goes when the variable does, at the next start and not by a check.
func TestScheduleOfADoorbellIsForgotten(t *testing.T) {
	t.Parallel()
	o, channel := newOperator(t), testkit.ChannelName(t)
	name := strings.ToUpper(channel) + "_SCHEDULE"
	v := sending(o.tab, vars{"OUTBOX_TABLE": o.tab, name: "0 3 * * *"})
	rings := fast(testkit.DSN(t), channel+"=doorbell:log", v)
	p := runProgram(t, rings)
	row := func() (n int) {
		if err := testkit.DB(t).QueryRow(`select count(*) from "` + o.tab + `" where key = 'pglistener schedule' and schedule is not null`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	testkit.Eventually(t, "there is no row", func() bool { return row() == 1 })
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	// A second doorbell, whose schedule stays, and rows of a person.
	other := channel + "_2"
	rings["CHANNELS"] = other + "=doorbell:log"
	rings[strings.ToUpper(other)+"_SCHEDULE"] = "0 4 * * *"
	p = runProgram(t, rings)
	testkit.Eventually(t, "there is no second row", func() bool { return row() == 2 })
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	o.add(t, channel, "key, run_at => 'pglistener schedule', now() + interval '1 day'")
	o.add(t, channel+" schedule", "key, run_at => 'mine', now() + interval '1 day'")

	delete(rings, name)
	rings["CHANNELS"] += "," + channel + "=doorbell:log"
	(operator{rings, o.tab}).run(t, cli.OK, "-check") // feature: check
	if row() != 2 {
		t.Error("a check has deleted a row")
	}
	p = runProgram(t, rings)
	testkit.Eventually(t, "the row of the schedule that is gone is still there", func() bool { return row() == 1 })
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	if n := rowCount(t, testkit.DB(t), o.tab); n != 3 {
		t.Errorf("%d rows", n)
	}
	for _, line := range p.All("could not look") {
		t.Error(line)
	}

	// Where it cannot, it says so, and goes on; where there is no table there is nothing to say.
	role := "f" + strconv.FormatInt(time.Now().UnixNano(), 36)
	testkit.Exec(t, testkit.DB(t), "create role "+role+" login password 'x'")
	t.Cleanup(func() { _, _ = testkit.DB(t).Exec("drop role " + role) })
	p = runProgram(t, fast(testkit.WithUser(testkit.DSN(t), role, "x"), channel+"=doorbell:log", vars{"OUTBOX_TABLE": o.tab}))
	if line := p.Wait(t, "could not look for what is left of a schedule", 1); line["level"] != "WARN" || !strings.Contains(line["error"].(string), "grant select, delete on") {
		t.Errorf("%v", line)
	}
	p.Wait(t, "delivery proven", 1)
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	p = runProgram(t, fast(testkit.DSN(t), channel+"=doorbell:log", vars{"OUTBOX_TABLE": "no_such_table"}))
	p.Wait(t, "delivery proven", 1)
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	if lines := p.All("could not look"); len(lines) > 0 {
		t.Error(lines)
	}
}

// TestFiguresOfADoorbellWithARow: the runs that are rung and those of the schedule are both counted, and each once.
func TestFiguresOfADoorbellWithARow(t *testing.T) {
	t.Parallel()
	o, channel := newOperator(t), testkit.ChannelName(t)
	var refuse atomic.Bool
	r := start(t, fast(testkit.DSN(t), channel+"=doorbell:work", vars{
		"OUTBOX_TABLE": o.tab, strings.ToUpper(channel) + "_SCHEDULE": "@every 1s", "OUTBOX_ATTEMPTS": "1",
	}), with("work", notify.HandlerFunc(func(context.Context, notify.Notification) error {
		if refuse.Load() {
			return notify.Permanent(errors.New("no"))
		}
		return nil
	}))).listening(t)
	figure := func(result, by string) (value float64) {
		for _, s := range r.listener.Stats() {
			if s.Name == "pglistener_items_total" && slices.Contains(s.Labels, result) && slices.Contains(s.Labels, "by") == (by != "") {
				value += s.Value
			}
		}
		return value
	}
	testkit.Eventually(t, "the runs of the schedule are not counted", func() bool { return figure("done", "schedule") >= 2 })
	testkit.Send(t, channel, "")
	testkit.Eventually(t, "a run that was rung is not counted", func() bool { return figure("done", "") == 1 })
	refuse.Store(true)
	testkit.Send(t, channel, "")
	testkit.Eventually(t, "a run that was rung and given up is not counted", func() bool { return figure("failed", "") == 1 })
	testkit.Eventually(t, "a run of the schedule that was given up is not counted", func() bool { return figure("failed", "schedule") >= 1 })
	if done, failed := figure("done", ""), figure("failed", ""); done != 1 || failed != 1 {
		t.Errorf("%v done and %v failed that were rung, want one of each", done, failed)
	}
}

// end: schedule
