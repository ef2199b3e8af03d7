//go:build unix

package outbox

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/pglistener/pglistener/internal/pgtest/testkit"
)

// storeOf is a store of a table and a channel of the test's own.
func storeOf(t *testing.T) (s store, tab string) {
	t.Helper()
	tab = outboxTable(t, testkit.DB(t))
	names, err := parseTable(tab)
	if err != nil {
		t.Fatal(err)
	}
	return store{
		db: testkit.DB(t), table: names, channel: testkit.ChannelName(t), owner: "11111111-1111-1111-1111-111111111111",
		lease: time.Minute, timeout: time.Minute, bytes: 1 << 20,
	}, tab
}

// TestPlaceAfterMinusInfinity: it is a time that may stand in a row, and one from which a claim may go on.
func TestPlaceAfterMinusInfinity(t *testing.T) {
	t.Parallel()
	s, tab := storeOf(t)
	db, channel, names := s.db, s.channel, s.table
	testkit.Exec(t, db, names.sql("insert into {table} (channel, run_at) select $1, '-infinity' from generate_series(1, 2)"), channel)
	insert(t, db, tab, channel, "the last")
	from := place{}
	for i := range 3 {
		if wait, _, _, err := s.nextDue(from); err != nil || wait > 0 {
			t.Fatalf("%d: next in %v, %v", i, wait, err)
		}
		jobs, _, err := s.claim(1, from, 0)
		if err != nil || len(jobs) != 1 || (jobs[0].payload == "the last") != (i == 2) {
			t.Fatalf("%d: %+v, %v", i, jobs, err)
		}
		from = place{jobs[0].runAt, jobs[0].id}
	}
}

// TestFenceSeesEveryClaim plays what the model found on the real statements: attempts begin again when a row is changed while its
// handler runs, or moves to its next time, and then the same replica may hold it with the same lease and the same attempts.
func TestFenceSeesEveryClaim(t *testing.T) {
	t.Parallel()
	s, _ := storeOf(t)
	db, channel, names := s.db, s.channel, s.table
	claim := func() job {
		t.Helper()
		jobs, _, err := s.claim(10, place{}, 0)
		if err != nil || len(jobs) != 1 {
			t.Fatalf("%d rows claimed: %v", len(jobs), err)
		}
		return jobs[0]
	}
	end := func(e ending, want fate) {
		t.Helper()
		fates, err := s.end([]ending{e})
		if err != nil || fates[e.id] != want {
			t.Fatalf("%v: %v, want %s", fates, err, want)
		}
	}
	held := func(j job) {
		t.Helper()
		var until string
		err := db.QueryRow(names.sql("select leased_until::text from {table} where id = $1 and lease = $2 and attempts = $3"), j.id, s.owner, j.attempts).Scan(&until)
		if err != nil || until != j.until {
			t.Fatalf("it is leased until %q, want %q: %v", until, j.until, err)
		}
	}
	upsert := func() {
		t.Helper()
		testkit.Exec(t, db, names.sql(`insert into {table} (channel, key, payload) values ($1, 'k', clock_timestamp()::text)
			on conflict (channel, key) where failed_at is null do update set payload = excluded.payload`), channel)
	}

	upsert()
	first := claim()
	upsert()
	end(ending{job: first}, changed) // and the answer is lost
	second := claim()
	if second.attempts != first.attempts {
		t.Fatalf("attempts are %d, then %d", first.attempts, second.attempts)
	}
	end(ending{job: first}, lost)
	held(second)
	if err := s.giveBack([]job{first}); err != nil {
		t.Fatal(err)
	}
	held(second)
	if err := s.giveBack([]job{second}); err != nil {
		t.Fatal(err)
	}
	third := claim()
	testkit.Exec(t, db, names.sql("update {table} set leased_until = now()"))
	if err := s.giveBack([]job{claim()}); err != nil {
		t.Fatal(err)
	}
	end(ending{job: third}, lost) // nobody has it, so it is not locked either
	third = claim()
	end(ending{job: third}, ended)

	testkit.Exec(t, db, names.sql("insert into {table} (channel, schedule, attempts) values ($1, '@every 1s', 0)"), channel)
	for range 2 { // at attempts -1, which the trigger sets: its first time is to be found, also when that was lost
		if first := claim(); first.attempts != 0 {
			t.Fatalf("attempts are %d: its first time is that of its insertion", first.attempts)
		}
		testkit.Exec(t, db, names.sql("update {table} set leased_until = now()"))
	}
	// An upsert of the same schedule comes while its first time is being found.
	first = claim()
	testkit.Exec(t, db, names.sql("update {table} set payload = 'changed'"))
	end(ending{job: first, runAt: time.Now().Add(time.Hour)}, changed)
	if again := claim(); again.attempts != 0 || again.payload != "changed" {
		t.Fatalf("attempts are %d: it runs as soon as it is changed", again.attempts)
	}
	testkit.Exec(t, db, names.sql("update {table} set lease = null, leased_until = null, attempts = 0"))
	run := claim()
	end(ending{job: run, runAt: time.Now().Add(-time.Second)}, ended)
	next := claim()
	if next.attempts != run.attempts {
		t.Fatalf("attempts are %d, then %d", run.attempts, next.attempts)
	}
	end(ending{job: run, runAt: time.Now().Add(time.Hour)}, lost)
	held(next)
	if _, ids, err := s.count([]int64{next.id, next.id + 1}); err != nil || !slices.Equal(ids, []int64{next.id}) {
		t.Errorf("alive: %v, %v", ids, err)
	}
}

// TestTableOfSeveral: a ctid is a place in one table. Of a table that is divided into partitions, or has children, each part has the
// same places, and a claim of a row must not take what stands in the same place of another.
func TestTableOfSeveral(t *testing.T) {
	t.Parallel()
	db := testkit.DB(t)
	for name, divide := range map[string]string{
		"children": `create table "%s_mail" () inherits ("%[1]s")`,
		"partitions": `alter table "%s" rename to "%[1]s_whole"; create table "%[1]s" (like "%[1]s_whole" including defaults including identity) partition by list (channel);
			drop table "%[1]s_whole"; create table "%[1]s_orders" partition of "%[1]s" for values in ('orders'); create table "%[1]s_mail" partition of "%[1]s" for values in ('mail')`,
	} {
		t.Run(name, func(t *testing.T) {
			s, tab := storeOf(t)
			s.channel = "orders"
			t.Cleanup(func() { _, _ = db.Exec(`drop table if exists "` + tab + `" cascade`) })
			testkit.Exec(t, db, fmt.Sprintf(divide, tab))
			insert(t, db, tab, "orders", "")
			testkit.Exec(t, db, `insert into "`+tab+`_mail" (id, channel) overriding system value select n, 'mail' from generate_series(1001, 1050) n`) // in all places
			mail := func() (state string) {
				if err := db.QueryRow(`select string_agg(format('%s %s %s', id, attempts, last_error), ', ' order by id) from "` + tab + `" where channel = 'mail'`).Scan(&state); err != nil {
					t.Fatal(err)
				}
				return state
			}
			claim := func() []job {
				jobs, _, err := s.claim(10, place{}, 0)
				if err != nil || len(jobs) != 1 {
					t.Fatalf("%d rows are claimed: %v", len(jobs), err)
				}
				return jobs
			}
			before := mail()
			if err := s.giveBack(claim()); err != nil || mail() != before {
				t.Errorf("given back: %v; the mail is %q", err, mail())
			}
			for _, e := range []ending{{text: "no"}, {text: "no", failed: true, runAt: time.Now().Add(-time.Second)}, {text: ""}} {
				e.job = claim()[0]
				e.keyed = true
				fates, err := s.end([]ending{e})
				if err != nil || fates[e.id] != ended || mail() != before {
					t.Errorf("ended %q: %v %v; the mail is %q", e.text, fates, err, mail())
				}
			}
			if n := rowCount(t, db, tab); n != 51 {
				t.Errorf("%d rows are left, want the mail and a copy of what has failed", n)
			}
		})
	}
}
