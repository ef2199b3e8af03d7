// feature: outbox health page execcmd webhook check

package main

import (
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The tests of docs/runbook.md. Each causes the trouble of a section with the real program, compares the page, /readyz and the log
// with what the section quotes, and types what stands there.

const runbook = "docs/runbook.md"

// night is a section, and the listener that is in its trouble.
type night struct {
	*process
	t        *testing.T
	vars     vars
	dir      string // where the program runs; its variables, and what stands in for an editor and for systemd, are there too
	owner    string // how the owner of the database reaches it
	db       *sql.DB
	first    string   // the commands that stand before all sections
	commands []string // of the section
	rows     map[string][]string
	page     *statusPage
	used     map[string]bool // rows and commands
}

var (
	shellBlock = regexp.MustCompile("(?s)```shell\n(.*?)```")
	quoted     = regexp.MustCompile("`([^`]+)`")
	rowOf      = regexp.MustCompile(`(?m)^\| ([^|]+) \| (.*) \|$`)
)

// nightOf reads the section that names this test. The database at dsn is the test's own, so that the names of channels and tables
// are those of the runbook.
func nightOf(t *testing.T, dsn string) *night {
	t.Helper()
	n := &night{t: t, dir: t.TempDir(), owner: dsn, db: testkit.Open(t, dsn), rows: map[string][]string{}, used: map[string]bool{}}
	sections := strings.Split(testkit.ReadFile(t, runbook), "\n## ")
	i := slices.IndexFunc(sections, func(s string) bool { return strings.Contains(s, "`"+t.Name()+"`") })
	if i < 1 {
		t.Fatalf("no section of %s names this test", runbook)
	}
	n.first = shellBlock.FindStringSubmatch(sections[0])[1]
	for _, m := range shellBlock.FindAllStringSubmatch(sections[i], -1) {
		n.commands = append(n.commands, m[1])
	}
	for _, m := range rowOf.FindAllStringSubmatch(sections[i], -1) {
		if quoted.MatchString(m[2]) {
			n.rows[m[1]] = append(n.rows[m[1]], m[2])
		}
	}
	n.script("systemctl", `test "$*" = "restart pglistener" && touch "`+n.dir+`/restart"`)
	n.script("editor", `mv "`+n.dir+`/edited" "$1"`)
	return n
}

// ownDatabase makes a database on the shared server.
func ownDatabase(t *testing.T) (dsn string) {
	t.Helper()
	name := testkit.ChannelName(t)
	drop := func() { _, _ = testkit.DB(t).Exec("drop database if exists " + name + " with (force)") }
	drop()
	testkit.Exec(t, testkit.DB(t), "create database "+name)
	t.Cleanup(drop)
	return strings.Replace(testkit.DSN(t), "/postgres?", "/"+name+"?", 1)
}

func (n *night) script(name, text string) (path string) {
	n.t.Helper()
	path = filepath.Join(n.dir, name)
	if err := testkit.WriteProgram(path, "#!/bin/sh\n"+text+"\n"); err != nil {
		n.t.Fatal(err)
	}
	return path
}

// begin starts the listener.
func (n *night) begin(dsn, channels string, more ...vars) *night {
	n.t.Helper()
	n.vars = probing(dsn, channels, append([]vars{{"HTTP_ADDR": testkit.FreshAddress(n.t)}}, more...)...)
	n.write("pglistener.env")
	n.run()
	return n
}

func (n *night) run() {
	n.t.Helper()
	n.process = runProgramIn(n.t, n.dir, n.vars)
	n.Wait(n.t, "serving health", 1)
	n.page = &statusPage{"http://" + n.vars["HTTP_ADDR"], map[bool]int{}}
}

// write writes the variables to a file as a shell and systemd read it.
func (n *night) write(file string) {
	n.t.Helper()
	var text strings.Builder
	for name, value := range n.vars {
		fmt.Fprintf(&text, "%s='%s'\n", name, value)
	}
	if err := os.WriteFile(filepath.Join(n.dir, file), []byte(text.String()), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// edit is what a person will do to a variable in the editor.
func (n *night) edit(name, value string) {
	n.vars = maps.Clone(n.vars)
	n.vars[name] = value
	n.write("edited")
}

// until waits three times as long as other tests: some figures are counted only every 5 s.
func (n *night) until(what string, ok func() bool) {
	n.t.Helper()
	for deadline := time.Now().Add(3 * testkit.Patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatal(what)
		}
	}
}

// says waits until the page, /readyz and the log say what the section quotes. which are the rows: those of "page", "`/readyz`" and
// "log" if it is "", otherwise those with it behind the name.
func (n *night) says(which string) {
	n.t.Helper()
	found := 0
	for name, texts := range n.rows {
		where, ok := strings.CutSuffix(name, which)
		for _, text := range texts {
			var ask func() string
			switch where {
			case "page":
				ask = func() string { return n.page.words(n.t) }
			case "`/readyz`":
				ask = func() string {
					code, body := get(n.t, n.page.address+"/readyz")
					return strconv.Itoa(code) + " " + body
				}
				text = "`" + text[:3] + "` " + text[3:] // the code
			case "log":
				level, _, _ := strings.Cut(text, " ")
				text = "`level:" + level + " ` " + text
				ask = func() string { return "" }
			}
			if !ok || ask == nil {
				continue
			}
			n.used[name] = true
			found++
			var words []string
			for _, m := range quoted.FindAllStringSubmatch(text, -1) {
				words = append(words, m[1])
			}
			in := func(said string) bool {
				return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(said, w) })
			}
			said := ""
			n.t.Cleanup(func() {
				if n.t.Failed() {
					n.t.Logf("%s said last: %s", name, said)
				}
			})
			n.until(fmt.Sprintf("%s does not say %q", name, words), func() bool {
				if said = ask(); where != "log" {
					return in(said)
				}
				return slices.ContainsFunc(n.All(""), func(line testkit.Line) bool { return in(fmt.Sprint(map[string]any(line))) })
			})
		}
	}
	if found == 0 {
		n.t.Fatalf("%s does not say what to expect (%q)", runbook, which)
	}
}

// types types the ith commands of the section, counted from 1, of which the last ends with code. more are the variables that the
// section tells a person to set. It returns what is printed. A restart is done at the end.
func (n *night) types(i, code int, more ...string) string {
	n.t.Helper()
	if i > len(n.commands) {
		n.t.Fatalf("%s has only %d blocks of commands", runbook, len(n.commands))
	}
	n.used[n.commands[i-1]] = true
	cmd := exec.CommandContext(n.t.Context(), "sh", "-c", n.first+n.commands[i-1])
	cmd.Dir = n.dir
	cmd.Env = append([]string{"PATH=" + n.dir + ":" + filepath.Dir(program(n.t)) + ":" + os.Getenv("PATH"), "EDITOR=editor", "TERM=dumb",
		"FILE=" + filepath.Join(n.dir, "pglistener.env"), "OWNER_URL=" + n.owner}, more...)
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		n.t.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		n.t.Fatalf("exit code %d, want %d, of\n%s%s", got, code, n.commands[i-1], out)
	}
	if os.Remove(filepath.Join(n.dir, "restart")) == nil {
		n.signal(n.t, syscall.SIGTERM)
		n.exit(n.t, cli.OK, stopBound+testkit.Patience)
		n.run()
	}
	return string(out)
}

// mended waits until all is well, and checks that nothing in the section was left out.
func (n *night) mended() {
	n.t.Helper()
	n.until("never ready", func() bool { code, _ := get(n.t, n.page.address+"/readyz"); return code == http.StatusOK })
	n.until("the page is not calm", func() bool { return strings.Contains(n.page.words(n.t), "It hears, and the work is done.") })
	n.complete()
}

func (n *night) complete() {
	n.t.Helper()
	for _, c := range n.commands {
		if !n.used[c] {
			n.t.Errorf("nobody typed\n%s", c)
		}
	}
	for name := range n.rows {
		if !n.used[name] {
			n.t.Errorf("nobody compared %q", name)
		}
	}
}

// handles waits until the listener has handled a row that is inserted now, and all others.
func (n *night) handles() {
	n.t.Helper()
	insert(n.t, n.db, "outbox", "orders", "after")
	emptied(n.t, n.db, "outbox")
}

// hears waits until the file of the handler append has a payload that is sent now.
func (n *night) hears() {
	n.t.Helper()
	n.until("it does not hear", func() bool {
		testkit.SendOn(n.t, n.db, "orders", "after")
		data, _ := os.ReadFile(filepath.Join(n.dir, "orders.log"))
		return strings.Contains(string(data), "after")
	})
}

func TestRunbookReceiverIsAway(t *testing.T) {
	t.Parallel()
	n := nightOf(t, ownDatabase(t))
	makeOutbox(t, n.db, "outbox")
	addr := testkit.FreshAddress(t)
	n.begin(n.owner, "orders=outbox:http://"+addr+"/hook")
	for range 4 {
		insert(t, n.db, "outbox", "orders", "x")
	}
	n.says("")
	if out := n.types(1, cli.Failed); !strings.Contains(out, "FAIL  handler    orders: ") || !strings.Contains(out, "connection refused") {
		t.Errorf("%s", out)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	receiver := &http.Server{Handler: http.HandlerFunc(testkit.Accept)}
	go func() { _ = receiver.Serve(l) }()
	t.Cleanup(func() { receiver.Close() })
	n.types(1, cli.OK)
	n.says(", when it is back")
	n.handles()
	n.mended()
}

func TestRunbookRowsHaveFailed(t *testing.T) {
	t.Parallel()
	n := nightOf(t, ownDatabase(t))
	makeOutbox(t, n.db, "outbox")
	mended := make(chan struct{})
	var receiver *testkit.Receiver
	receiver = testkit.NewReceiver(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-mended:
			if _, body := receiver.Last(); body != "bad" {
				testkit.Accept(w, r)
				return
			}
		default:
		}
		w.WriteHeader(http.StatusGone)
	})
	n.begin(n.owner, "orders=outbox:"+receiver.URL)
	for _, payload := range []string{"bad", "good", "good"} {
		insert(t, n.db, "outbox", "orders", payload)
	}
	failed := func(want int) func() bool {
		return func() bool {
			var got int
			if err := n.db.QueryRow("select count(*) from outbox where failed_at is not null").Scan(&got); err != nil {
				t.Fatal(err)
			}
			return got == want && rowCount(t, n.db, "outbox") == want
		}
	}
	n.until("not all failed", failed(3))
	n.says("")
	if out := n.types(1, cli.OK); strings.Count(out, "\n") != 3 || strings.Count(out, "status 410") != 3 {
		t.Errorf("%s", out)
	}
	ids := regexp.MustCompile(`pglistener -outbox-retry (\d+)`).FindAllStringSubmatch(n.page.words(t), -1)
	close(mended)
	if out := n.types(2, cli.OK, "ID="+ids[0][1]); out != "due now: 1 row, id "+ids[0][1]+"\n" { // the newest, which is good
		t.Errorf("%s", out)
	}
	n.until("the row was not done", failed(2))
	n.types(3, cli.OK)
	n.until("only the bad row is left", failed(1))
	n.types(4, cli.OK)
	n.until("the bad row is still there", failed(0))
	n.mended()
}

func TestRunbookTableDoesNotFit(t *testing.T) {
	t.Parallel()
	n := nightOf(t, ownDatabase(t))
	n.begin(n.owner, "orders=outbox:append:orders.log")
	n.says(", no table")
	n.types(1, cli.OK)
	n.handles()
	testkit.Exec(t, n.db, "alter table outbox drop column lease, drop column leased_until")
	n.says(", older table")
	n.types(1, cli.OK)
	n.handles()
	n.mended()
}

func TestRunbookRightIsMissing(t *testing.T) {
	t.Parallel()
	dsn := ownDatabase(t)
	role := testkit.ChannelName(t)
	dropRole := func() { _, _ = testkit.DB(t).Exec("drop role if exists " + role) }
	n := nightOf(t, dsn)
	makeOutbox(t, n.db, "outbox")
	dropRole()
	testkit.Exec(t, n.db, "create role "+role+" login password 'x'; grant all on outbox to "+role)
	t.Cleanup(func() { _, _ = testkit.DB(t).Exec("drop database if exists " + role + " with (force)"); dropRole() })
	n.begin(testkit.WithUser(dsn, role, "x"), "orders=outbox:append:orders.log")
	n.handles()
	testkit.Exec(t, n.db, "revoke update, delete on outbox from "+role)
	n.says("")
	n.types(1, cli.OK)
	n.handles()
	n.mended()
}

func TestRunbookHandlerHangs(t *testing.T) {
	t.Parallel()
	n := nightOf(t, ownDatabase(t))
	stuck := n.script("stuck", "")
	send := n.script("send", `test ! -e "`+stuck+`" || exec sleep 1000; cat >>sent; echo >>sent`)
	n.begin(n.owner, "orders=exec:"+send, vars{"QUEUE_SIZE": "10", "HANDLER_TIMEOUT": "10m"})
	n.Wait(t, "delivery proven", 1)
	testkit.Exec(t, n.db, "select pg_notify('orders', i::text) from generate_series(1, 100) i")
	n.says("")
	if err := os.Remove(stuck); err != nil {
		t.Fatal(err)
	}
	n.types(1, cli.OK, "PID="+regexp.MustCompile(`process (\d+), started`).FindStringSubmatch(n.page.words(t))[1])
	n.until("not all were handled", func() bool {
		data, _ := os.ReadFile(filepath.Join(n.dir, "sent"))
		return strings.Count(string(data), "\n") == 100
	})
	n.says(", when it is over")
	n.mended()
}

func TestRunbookPoolerInTransactionMode(t *testing.T) {
	t.Parallel()
	server := testkit.LocalServer(t)
	n := nightOf(t, ownDatabase(t))
	pooled := strings.Replace(testkit.Bouncer(t, server, "transaction"), "/postgres?", "/"+testkit.ChannelName(t)+"?", 1)
	n.begin(pooled, "orders=append:orders.log")
	n.says("")
	n.edit("DATABASE_URL", n.owner)
	n.types(1, cli.OK)
	n.types(2, cli.OK)
	n.hears()
	n.mended()
}

func TestRunbookPasswordIsWrong(t *testing.T) {
	t.Parallel()
	server := testkit.OwnServer(t)
	n := nightOf(t, server.DSN())
	testkit.Exec(t, n.db, "create role app login password 'old'")
	hba := "host all app all scram-sha-256\nhost all postgres 127.0.0.1/32 trust\n"
	if err := errors.Join(server.WriteFile("pg_hba.conf", os.O_TRUNC, []byte(hba)), server.Reload()); err != nil {
		t.Fatal(err)
	}
	n.begin(testkit.WithUser(server.DSN(), "app", "old"), "orders=append:orders.log")
	n.hears()
	testkit.Exec(t, n.db, "alter role app password 'new'")
	testkit.Exec(t, n.db, "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'")
	n.says("")
	n.edit("DATABASE_URL", testkit.WithUser(server.DSN(), "app", "new"))
	n.types(1, cli.OK)
	n.types(2, cli.OK)
	if err := os.Remove(filepath.Join(n.dir, "orders.log")); err != nil {
		t.Fatal(err)
	}
	n.hears()
	n.mended()
}

func TestRunbookVacuumIsHeldBack(t *testing.T) {
	t.Parallel()
	server := testkit.OwnServer(t, "autovacuum = off")
	n := nightOf(t, server.DSN())
	makeOutbox(t, n.db, "outbox")
	report, err := testkit.Open(t, testkit.WithParams(server.DSN(), "application_name", "nightly report")).Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = report.Rollback() }()
	if _, err := report.Exec("set transaction isolation level repeatable read; select 1"); err != nil {
		t.Fatal(err)
	}
	testkit.Exec(t, n.db, `insert into outbox (channel, run_at) select 'orders', now() - interval '1 hour' from generate_series(1, 200000); delete from outbox`)
	n.begin(server.DSN(), "orders=outbox:append:orders.log")
	n.until("nobody is named who holds a snapshot", func() bool {
		insert(t, n.db, "outbox", "orders", "row")
		return len(n.All("claims are slow")) > 0
	})
	emptied(t, n.db, "outbox")
	n.says("")
	holder := fmt.Sprint(n.All("claims are slow")[0]["holder"])
	pid := "PID=" + regexp.MustCompile(`^session (\d+) of`).FindStringSubmatch(holder)[1]
	if out := n.types(1, cli.OK, pid); !strings.Contains(out, "nightly report") || !strings.Contains(out, "idle in transaction") {
		t.Errorf("%s", out)
	}
	n.types(2, cli.OK, pid)
	n.until("vacuum is still held back", func() bool {
		n.handles()
		return strings.HasSuffix(n.types(3, cli.OK), "} 0\n")
	})
	n.until("the dead rows are still there", func() bool {
		var dead int
		if err := n.db.QueryRow("select n_dead_tup from pg_stat_user_tables where relname = 'outbox'").Scan(&dead); err != nil {
			t.Fatal(err)
		}
		return dead < 100_000
	})
	n.mended()
}

func TestRunbookNobodyHandlesTheChannel(t *testing.T) {
	t.Parallel()
	n := nightOf(t, ownDatabase(t))
	makeOutbox(t, n.db, "outbox")
	testkit.Exec(t, n.db, "insert into outbox (channel, run_at) select 'oders', now() - interval '3 minutes' from generate_series(1, 2)")
	n.begin(n.owner, "orders=outbox:append:orders.log")
	n.says("")
	if line := n.Wait(t, "rows have been due for minutes", 1); line["unhandled"] != "oders" {
		t.Errorf("%v", line)
	}
	n.types(1, cli.OK, "WRONG=oders", "RIGHT=orders")
	emptied(t, n.db, "outbox")
	n.complete() // the page looks again a minute later
}

func TestRunbookStandby(t *testing.T) {
	t.Parallel()
	primary := testkit.OwnServer(t)
	standby := testkit.StandbyOf(t, primary)
	dsn, proxy := testkit.Proxied(t, primary.DSN())
	n := nightOf(t, dsn)
	n.begin(dsn, "orders=append:orders.log")
	n.hears()
	proxy.Target(standby.Addr())
	if err := primary.Stop(); err != nil {
		t.Fatal(err)
	}
	n.says("")
	n.types(1, cli.OK)
	n.says(", when it is promoted")
	n.hears()
	n.mended()
}

// TestRunbookHasATestForEachSection: there are ten, and each names one of the tests above.
func TestRunbookHasATestForEachSection(t *testing.T) {
	names := map[string]bool{}
	sections := strings.Split(testkit.ReadFile(t, runbook), "\n## ")[1:]
	for _, s := range sections {
		if m := regexp.MustCompile("`(TestRunbook[A-Za-z]+)`").FindStringSubmatch(s); m != nil {
			names[m[1]] = true
		}
	}
	if len(sections) != 10 || len(names) != 10 {
		t.Errorf("%d sections, %d tests", len(sections), len(names))
	}
}
