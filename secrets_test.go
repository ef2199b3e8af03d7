// feature: check outbox execcmd webhook health

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/cli"
	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// TestNoSecretIsShown plants secrets in many places and looks for them in all that the program prints, serves and
// writes to the outbox, while all goes well and while it does not.
func TestNoSecretIsShown(t *testing.T) {
	t.Parallel()
	const planted = "hunter2"
	tab, name, dir := outboxTable(t, testkit.DB(t)), testkit.ChannelName(t), t.TempDir()
	fails := testkit.NewReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "an answer with "+planted, http.StatusBadRequest)
	})
	script := filepath.Join(dir, "script")
	// A program that shows what it inherits of ours, and fails.
	if err := testkit.WriteProgram(script, "#!/bin/sh\nenv | grep -v -e DATABASE_URL -e PGLISTENER_\nexit 1\n"); err != nil {
		t.Fatal(err)
	}
	secret := func(i int) string {
		return "whsec_" + base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%s-%024d", planted, i))
	}
	secretFile := filepath.Join(dir, "secret")
	if err := os.WriteFile(secretFile, []byte(secret(2)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	url := strings.Replace(fails.URL, "http://", "http://user-"+planted+":"+planted+"@", 1) + "/" + planted + "?token=" + planted
	prefix := strings.ToUpper(name)
	addr := testkit.FreshAddress(t)
	v := probing(strings.Replace(testkit.DSN(t), "@", ":"+planted+"@", 1), fmt.Sprintf("%[1]s_hook,%[1]s_run=exec:%[2]s --password %[3]s,%[1]s_rows", name, script, planted), sending(tab, vars{
		prefix + "_HOOK_HANDLER": url, prefix + "_ROWS_HANDLER": "outbox:" + url, "WEBHOOK_SECRET": secret(1), prefix + "_HOOK_WEBHOOK_SECRET_FILE": secretFile,
		"HTTP_ADDR": addr, "LOG_PAYLOADS": "false", "HANDLER_ATTEMPTS": "2", "OUTBOX_ATTEMPTS": "1", "LOG_LEVEL": "debug",
	}))
	encoded := base64.StdEncoding.EncodeToString([]byte(planted))
	clean := func(where, text string) {
		t.Helper()
		for _, s := range []string{planted, encoded[:8], "whsec_"} {
			for line := range strings.Lines(text) {
				if strings.Contains(line, s) && !strings.Contains(line, "whsec_$(") { // how to make one
					t.Errorf("%s shows a secret: %s", where, line)
				}
			}
		}
	}
	gaveUp := 3
	// begin: pipe
	// A program that repeats what it is given, where answers belong, and fails.
	pipe := filepath.Join(dir, "pipe")
	if err := os.WriteFile(pipe, []byte("#!/bin/sh\nenv | grep -v -e DATABASE_URL -e PGLISTENER_ >&2\n"+
		"while read -r line; do id=${line#*:\\\"}; echo \"$line\"; echo \"{\\\"id\\\":\\\"${id%%\\\"*}\\\",\\\"error\\\":\\\"$2\\\"}\"; done\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	v["CHANNELS"] += "," + name + "_pipe"
	v[prefix+"_PIPE_HANDLER"] = "pipe:" + pipe + " --password " + planted
	gaveUp++
	// end: pipe
	clean("-check", runCheck(t, v, cli.OK))
	p := runProgram(t, v)
	p.Wait(t, "delivery proven", 1)
	testkit.Send(t, name+"_hook", "a payload with "+planted)
	testkit.Send(t, name+"_run", "a payload with "+planted)
	insert(t, testkit.DB(t), tab, name+"_rows", "a payload with "+planted)
	testkit.Send(t, name+"_pipe", "a payload with "+planted) // feature: pipe
	p.Wait(t, "gave up", gaveUp)
	// begin: pipe
	p.Wait(t, "a line of the program is no answer", 1)
	if !strings.Contains(p.String(), "it answered with an error") {
		t.Error("the program of the pipe was not understood")
	}
	// end: pipe
	for _, path := range []string{"/livez", "/readyz", "/metrics", "/"} {
		_, body := get(t, "http://"+addr+path)
		clean(path, body)
	}
	for _, pid := range testkit.Backends(t, testkit.DB(t), "pglistener") {
		_ = pid // others' too: they reconnect
	}
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	clean("the log", p.String())
	var text string
	if err := testkit.DB(t).QueryRow(`select last_error from "` + tab + `"`).Scan(&text); err != nil {
		t.Fatal(err)
	}
	clean("last_error", text)

	// What is typed wrong is not repeated either.
	for _, args := range [][]string{{"postgres://u:hunter2@h/db"}, {"-check", "hunter2"}, {"-check=hunter2"}, {"--database-url=hunter2"}, {"-dpostgres://u:hunter2@h/db"}, {"-phunter2"}} {
		var out bytes.Buffer
		if code := run(t.Context(), args, cli.Env{Lookup: vars{}.lookup, Stdout: &out, Stderr: &out}); code != cli.Usage {
			t.Errorf("%v: exit code %d", args, code)
		}
		clean(fmt.Sprint(args), out.String())
	}
	for i, bad := range []vars{
		{"CHANNELS": "a=https://h/x?a=1,2&token=hunter2"}, {"CHANNELS": "a=exec:./p --pw x,hunter2 y"}, {"CHANNELS": "a=htps://u:hunter2@h"},
		{"CHANNELS": "a", "A_HANDLER": "exec:/bin/true --pw '&hunter2'"},
		{"CHANNELS": "a", "WEBHOOK_SECRET": "hunter2"}, {"CHANNELS": "a", "A_HANDLER": "https://u:hunter2%zz@h/"}, {"CHANNELS": "a", "DATABASE_URL": "postgres://u:hunter2%zz@h/d"},
		{"CHANNELS": "a", "WEBHOOK_SECRET_FILE": "hunter2"}, {"CHANNELS": "a", "A_WEBHOOK_AUTHORIZATION_FILE": "Bearer hunter2"}, {"CHANNELS": "a", "DATABASE_URL_FILE": "postgres://u:hunter2@h/d"},
	} {
		if bad["DATABASE_URL"] == "" && bad["DATABASE_URL_FILE"] == "" {
			bad["DATABASE_URL"] = "postgres://localhost/x"
		}
		clean(fmt.Sprint("mistake ", i), problemsOf(t, bad))
	}
}

// TestNothingIsLoggedPastTheLog: of bytes that come on an idle connection net/http tells Go's own log, whatever LOG_PAYLOADS says.
func TestNothingIsLoggedPastTheLog(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			ended <- err
			return
		}
		defer c.Close()
		req, err := http.ReadRequest(bufio.NewReader(c))
		if err == nil {
			_, _ = io.Copy(io.Discard, req.Body)
			_, _ = c.Write([]byte("HTTP/1.1 204 No Content\r\n\r\n"))
			_, _ = c.Write([]byte("and you said hunter2"))
			_, err = io.Copy(io.Discard, c) // until the other end has looked at it and closes
		}
		ended <- err
	}()
	channel := testkit.ChannelName(t)
	p := runProgram(t, fast(testkit.DSN(t), channel+"=http://"+l.Addr().String(), vars{"LOG_PAYLOADS": "false", "LOG_LEVEL": "debug"}))
	p.Wait(t, "listening", 1)
	testkit.Send(t, channel, "hunter2")
	p.Wait(t, "delivered", 1)
	select {
	case <-ended:
	case <-time.After(testkit.Patience):
		t.Fatal("the connection is kept")
	}
	p.signal(t, syscall.SIGTERM)
	p.exit(t, cli.OK, stopBound)
	if strings.Contains(p.String(), "hunter2") {
		t.Errorf("%s", p)
	}
}

// SIGHUP stops as SIGTERM does, unless it was ignored at the start, as nohup has it.
func TestSIGHUP(t *testing.T) {
	t.Parallel()
	// The tests themselves may have been started by nohup, and what is ignored is inherited; what is caught is not.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGHUP)
	defer signal.Stop(caught)
	p := runProgram(t, fast(testkit.DSN(t), testkit.ChannelName(t)))
	p.Wait(t, "listening", 1)
	p.signal(t, syscall.SIGHUP)
	p.exit(t, cli.OK, stopBound)
	p.Wait(t, "stopped", 1)

	q := &process{Logs: testkit.NewLogs(t), cmd: exec.Command("nohup", program(t)), exited: make(chan error, 1)}
	q.cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range fast(testkit.DSN(t), testkit.ChannelName(t)) {
		q.cmd.Env = append(q.cmd.Env, name+"="+value)
	}
	q.start(t)
	q.Wait(t, "listening", 1)
	q.signal(t, syscall.SIGHUP)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	select { // that nothing happens is the point
	case <-q.exited:
		t.Error("SIGHUP ends what nohup has started")
	case <-ctx.Done():
	}
	q.signal(t, syscall.SIGTERM)
	q.exit(t, cli.OK, stopBound)
}

// The end of whoever reads the log is no end of the work.
func TestReaderOfTheLogEnds(t *testing.T) {
	t.Parallel()
	channel := testkit.ChannelName(t)
	out := filepath.Join(t.TempDir(), "journal")
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program(t))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range fast(testkit.DSN(t), channel+"=append:"+out) {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stderr = write
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	read.Close() // as head(1) does
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	testkit.Eventually(t, "nothing is handled", func() bool {
		testkit.Send(t, channel, "x")
		data, _ := os.ReadFile(out)
		return len(data) > 0
	})
	_ = cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-exited:
	case <-time.After(testkit.Patience):
		t.Fatal("it does not stop")
	}
	if code := cmd.ProcessState.ExitCode(); code != cli.OK {
		t.Errorf("ended with %v", cmd.ProcessState)
	}
}
