//go:build unix

package pgtest

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	_ "github.com/lib/pq"
)

// patience bounds what a server does at once when it works.
const patience = 10 * time.Second

// printBin makes the test binary print Bin's results instead of running tests:
// Bin knows PGTEST_BIN only as it was when the process began.
const printBin = "PRINT_BIN"

func TestMain(m *testing.M) {
	if os.Getenv(printBin) != "" {
		fmt.Println(Bin())
		return
	}
	os.Exit(m.Run())
}

func TestBinHonoursPGTEST_BIN(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "initdb"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	empty := t.TempDir()
	for value, want := range map[string]string{
		dir:        dir + " <nil>",
		empty:      "PGTEST_BIN: exec: \"" + empty + "/initdb\"",
		"bin/pg/1": `PGTEST_BIN: "bin/pg/1" is not an absolute path`,
	} {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), printBin+"=yes", binVar+"="+value)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.HasPrefix(strings.TrimSpace(string(out)), want) {
			t.Errorf("%s=%s: got %q, %v, want %q", binVar, value, out, err, want)
		}
	}
}

func TestServerAndStandby(t *testing.T) {
	t.Parallel()
	// A standby refuses to start with fewer connections than its primary.
	primary, err := Start("max_connections = 60")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(primary.Close)
	standby, err := primary.Standby()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(standby.Close)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("primary's log:\n%s\nstandby's log:\n%s", primary.Log(), standby.Log())
		}
	})
	a, b := open(t, primary), open(t, standby)

	// "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
	program, err := exec.CommandContext(t.Context(), filepath.Join(primary.bin, "postgres"), "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	for db, recovering := range map[*sql.DB]string{a: "false", b: "true"} {
		version := query(t, db, "show server_version")
		if !strings.HasSuffix(strings.TrimSpace(string(program)), ") "+version) {
			t.Errorf("server of version %q, programs of version %q", version, program)
		}
		if got := query(t, db, "select pg_is_in_recovery()"); got != recovering {
			t.Errorf("in recovery: %s, want %s", got, recovering)
		}
		if got := query(t, db, "show max_connections"); got != "60" {
			t.Errorf("max_connections is %s, want 60", got)
		}
	}

	if _, err := a.ExecContext(t.Context(), "create table t as select 'replicated' as x"); err != nil {
		t.Fatal(err)
	}
	await(t, b, "select x from t", "replicated")

	if err := standby.Promote(); err != nil {
		t.Fatal(err)
	}
	if got := query(t, b, "insert into t values ('promoted') returning x"); got != "promoted" {
		t.Errorf("insert returned %q", got)
	}
	// The two are apart now.
	if got := query(t, a, "select count(*) from t"); got != "1" {
		t.Errorf("%s rows on the old primary, want 1", got)
	}
}

func open(t *testing.T, s *Server) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", s.DSN())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// query returns the one value of a statement's answer.
func query(t *testing.T, db *sql.DB, statement string) string {
	t.Helper()
	value, err := tryQuery(t, db, statement)
	if err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
	return value
}

func tryQuery(t *testing.T, db *sql.DB, statement string) (value string, err error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err = db.QueryRowContext(ctx, statement).Scan(&value)
	return value, err
}

// await repeats a query until it has the wanted answer.
func await(t *testing.T, db *sql.DB, statement, want string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		got, err := tryQuery(t, db, statement)
		if err == nil && got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %q, %v, want %q", statement, got, err, want)
		}
	}
}
