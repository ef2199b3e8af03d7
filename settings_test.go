// feature: check outbox schedule execcmd

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// The tests of settings per channel and of schedules, with the program itself.

// Three jobs of a small team run from one .env: a drain every five minutes and when rung, a daily report, and a
// clean-up at minute 15 with a limit of its own.
func TestThreeJobsFromOneFile(t *testing.T) {
	t.Parallel()
	tab, name := outboxTable(t, testkit.DB(t)), testkit.ChannelName(t)
	dir := t.TempDir()
	for _, job := range []string{"drain", "report", "clean"} {
		text := fmt.Sprintf("#!/bin/sh\necho \"%s $1 for ${PGLISTENER_RUN_AT:-a ring}\" >> %s/ran\n", job, dir)
		if err := testkit.WriteProgram(filepath.Join(dir, job), text); err != nil {
			t.Fatal(err)
		}
	}
	prefix := strings.ToUpper(name)
	file := strings.Join([]string{
		"DATABASE_URL=" + testkit.DSN(t), "LOG_FORMAT=json", "OUTBOX_TABLE=" + tab,
		fmt.Sprintf("CHANNELS=%[1]s_drain,%[1]s_report,%[1]s_clean", name),
		prefix + "_DRAIN_HANDLER='doorbell:exec:" + dir + "/drain \"all of it\"'",
		prefix + "_DRAIN_SCHEDULE='*/5 * * * *'",
		prefix + "_REPORT_HANDLER=outbox:exec:" + dir + "/report",
		prefix + "_REPORT_SCHEDULE='CRON_TZ=Europe/Berlin 0 3 * * *'",
		prefix + "_CLEAN_HANDLER=outbox:exec:" + dir + "/clean",
		prefix + "_CLEAN_SCHEDULE='15 * * * *'", prefix + "_CLEAN_HANDLER_TIMEOUT=10m",
	}, "\n") + "\n"
	if err := os.WriteFile(filepath.Join(dir, ".env"), []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &process{Logs: testkit.NewLogs(t), exited: make(chan error, 1),
		cmd: exec.Command("sh", "-c", "set -a; . "+dir+"/.env; exec "+program(t))}
	p.start(t)
	p.Wait(t, "delivery proven", 1)
	db := testkit.DB(t)
	next := func(channel string) (at time.Time) {
		t.Helper()
		testkit.Eventually(t, channel+" has no row with a next time", func() bool {
			return db.QueryRow(`select run_at from "`+tab+`" where channel = $1 and attempts = 0 and lease is null and run_at > now()`, channel).Scan(&at) == nil
		})
		return at
	}
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	if at := next(name + "_report").In(berlin); at.Hour() != 3 || at.Minute() != 0 || time.Until(at) > 25*time.Hour {
		t.Errorf("the report is due at %v", at)
	}
	if at := next(name + "_clean"); at.Minute() != 15 || time.Until(at) > time.Hour {
		t.Errorf("the clean-up is due at %v", at)
	}
	if at := next(name + "_drain schedule"); at.Minute()%5 != 0 || time.Until(at) > 5*time.Minute {
		t.Errorf("the drain is due at %v", at)
	}
	ran := func() string {
		data, _ := os.ReadFile(filepath.Join(dir, "ran"))
		return string(data)
	}
	if got := ran(); got != "" { // not at the start
		t.Errorf("ran at the start: %s", got)
	}
	testkit.Send(t, name+"_drain", "")
	testkit.Eventually(t, "the doorbell was not heard", func() bool { return strings.Contains(ran(), "drain all of it for a ring\n") })
	// Their times come.
	testkit.Exec(t, db, `update "`+tab+`" set run_at = date_trunc('minute', now()) where schedule is not null`)
	for _, channel := range []string{name + "_report", name + "_clean", name + "_drain schedule"} {
		testkit.Send(t, channel, "") // it sleeps until what it knows
	}
	testkit.Eventually(t, "the report did not run", func() bool {
		return strings.Contains(ran(), "report  for 2") && strings.Contains(ran(), "clean  for 2")
	})
	if n := strings.Count(ran(), "\n"); n > 4 {
		t.Errorf("ran too often: %s", ran())
	}
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, 25*time.Second)
}

// Two channels of one process differ in concurrency, time limit and interval, and each is obeyed.
func TestChannelsDiffer(t *testing.T) {
	t.Parallel()
	a, b := testkit.ChannelName(t)+"_a", testkit.ChannelName(t)+"_b"
	dir := t.TempDir()
	text := "#!/bin/sh\necho \"begin $PGLISTENER_CHANNEL\" >> " + dir + "/ran\nsleep 1\necho \"end $PGLISTENER_CHANNEL\" >> " + dir + "/ran\n"
	if err := testkit.WriteProgram(filepath.Join(dir, "slow"), text); err != nil {
		t.Fatal(err)
	}
	p := runProgram(t, fast(testkit.DSN(t), a+"=exec:"+dir+"/slow,"+b+"=exec:"+dir+"/slow", vars{
		strings.ToUpper(a) + "_CONCURRENCY": "4", strings.ToUpper(b) + "_HANDLER_TIMEOUT": "300ms", strings.ToUpper(b) + "_HANDLER_ATTEMPTS": "1",
	}))
	p.Wait(t, "delivery proven", 1)
	for range 4 {
		testkit.Send(t, a, "x")
	}
	testkit.Send(t, b, "x")
	line := p.Wait(t, "gave up", 1)
	if line["channel"] != b || line["attempts"] != 1.0 || !strings.Contains(line["error"].(string), "HANDLER_TIMEOUT") {
		t.Errorf("%v", line)
	}
	testkit.Eventually(t, "not all have ended", func() bool {
		data, _ := os.ReadFile(filepath.Join(dir, "ran"))
		return strings.Count(string(data), "end "+a) == 4
	})
	data, _ := os.ReadFile(filepath.Join(dir, "ran"))
	begun, most := 0, 0
	for line := range strings.Lines(string(data)) {
		switch strings.TrimSpace(line) {
		case "begin " + a:
			begun++
		case "end " + a:
			begun--
		}
		most = max(most, begun)
	}
	if most != 4 {
		t.Errorf("%d at once, want 4", most)
	}
}

// -check says what is in force for each channel.
func TestCheckShowsWhatIsInForce(t *testing.T) {
	t.Parallel()
	out := runCheck(t, fast(testkit.DSN(t), "one,two", vars{"ONE_CONCURRENCY": "7", "ONE_HANDLER": "exec:cat --secret hunter2", "TWO_CONCURENCY": "7"}), cli.OK)
	for _, want := range []string{"one: plain exec:cat (2 arguments), with ONE_CONCURRENCY", "two: plain log\n", "TWO_CONCURENCY: nobody reads this variable; did you mean TWO_CONCURRENCY?"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "hunter2") {
		t.Errorf("an argument is shown:\n%s", out)
	}
}

// A plain channel has no schedule, and one that cannot be read is named.
func TestSchedulesThatCannotWork(t *testing.T) {
	t.Parallel()
	for want, v := range map[string]vars{
		`CHANNELS: channel "a": a plain channel has no schedule`: {"CHANNELS": "a", "A_SCHEDULE": "@daily"},
		"A_SCHEDULE: ":               {"CHANNELS": "a=doorbell:log", "A_SCHEDULE": "0 25 * * *"},
		"A_SCHEDULE: it never comes": {"CHANNELS": "a=doorbell:log", "A_SCHEDULE": "0 3 31 6 *"},
	} {
		v["DATABASE_URL"] = "postgres://localhost/x"
		if out := problemsOf(t, v); !strings.Contains(out, want) || strings.Count(out, "\n") != 1 {
			t.Errorf("%q, want one line with %q", out, want)
		}
	}
}

func TestCheckRunsNoHandler(t *testing.T) {
	t.Parallel()
	mark := filepath.Join(t.TempDir(), "mark")
	runCheck(t, fast(testkit.DSN(t), testkit.ChannelName(t)+"=doorbell:exec:touch "+mark), cli.OK)
	if _, err := os.Stat(mark); err == nil {
		t.Error("the doorbell ran")
	}
}

func TestOutboxLeastPrivileges(t *testing.T) {
	t.Parallel()
	tab := outboxTable(t, testkit.DB(t))
	channel, s := testkit.ChannelName(t), &seen{}
	role := "r" + strconv.FormatInt(time.Now().UnixNano(), 36)
	testkit.Exec(t, testkit.DB(t), "create role "+role+" login password 'x'")
	t.Cleanup(func() { _, _ = testkit.DB(t).Exec("drop owned by " + role + "; drop role " + role) })
	dsn := testkit.WithUser(testkit.DSN(t), role, "x")
	out := runCheck(t, fast(dsn, channel+"=outbox:log", sending(tab)), cli.Failed)
	if !strings.Contains(out, "grant select, insert, update, delete on") {
		t.Errorf("no help: %s", out)
	}
	testkit.Exec(t, testkit.DB(t), `grant select, update, delete on "`+tab+`" to `+role)
	out = runCheck(t, fast(dsn, channel+"=outbox:log", sending(tab)), cli.OK)
	if !strings.Contains(out, "table "+tab+" fits") {
		t.Errorf("%s", out)
	}
	start(t, fast(dsn, channel+"=outbox:seen", sending(tab)), with("seen", s)).listening(t)
	insert(t, testkit.DB(t), tab, channel, "x")
	emptied(t, testkit.DB(t), tab)
}
