// feature: outbox

// Package history judges what has become of an outbox, whatever was killed meanwhile: the database keeps a record of what happened to
// each row, the handlers keep one of their calls, and Check compares the two.
package history

import (
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Kind is what happened to a row.
type Kind string

// The kinds. A row is another event after an upsert, and after each run of its schedule.
const (
	Committed  Kind = "committed"  // an event is there to be handled
	Superseded Kind = "superseded" // a producer has replaced it
	Claimed    Kind = "claimed"
	Released   Kind = "released" // given back, or to be tried again
	Done       Kind = "done"     // deleted, or moved to its next time
	Failed     Kind = "failed"   // given up
)

// Event is what happened to a row, in the transaction in which it happened.
type Event struct {
	Seq      int64 // orders the events of a row
	Kind     Kind
	Row      int64
	ID       string    // the idempotency key
	By       string    // the application_name
	Attempts int       // what the row said before, of a claim after
	At       time.Time // of the transaction
	Until    time.Time // of a claim: when its lease ends
	Payload  string    // of Committed, without a newline at its end
}

// Call is a call of a handler that has succeeded.
type Call struct {
	ID      string
	By      string // the replica, by its application_name
	Attempt int
	Payload string
}

// History is what there is to judge.
type History struct {
	Events  []Event
	Calls   []Call          // in the order in which they succeeded
	Known   []string        // payloads whose commit a producer was told of
	Left    map[string]bool // ids of events that may still wait at the end
	Ordered bool            // one replica worked with CONCURRENCY=1 and nothing failed: rows are handled in the order of their numbers
}

// Report is the judgement. Repeats are calls that were not needed, which at-least-once allows.
type Report struct {
	Committed, Handled, Repeats int
	Problems                    []string
}

func (r *Report) complain(format string, args ...any) {
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

// Check judges a history.
func Check(h History) *Report {
	r := &Report{}
	events := slices.Clone(h.Events)
	slices.SortFunc(events, func(a, b Event) int { return int(a.Seq - b.Seq) })
	// superseded are those of which nobody is to be told.
	committed, payloads, superseded, failed := map[string]Event{}, map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, e := range events {
		switch e.Kind {
		case Committed:
			committed[e.ID], payloads[e.Payload] = e, true
		case Superseded:
			superseded[e.ID] = true
		case Done: // at attempt 0 only the first time of a schedule is found
			superseded[e.ID] = superseded[e.ID] || e.Attempts == 0
		case Failed:
			failed[e.ID] = true
		}
	}
	r.Committed = len(committed)
	for _, p := range h.Known {
		if !payloads[p] {
			r.complain("%q was committed, and was never in the table", p)
		}
	}
	type attempt struct {
		id, by string
		n      int
	}
	handled, by, last := map[string]int{}, map[attempt]bool{}, int64(0)
	for _, c := range h.Calls {
		e, known := committed[c.ID]
		switch {
		case !known:
			r.complain("a ghost was handled: %q with the id %s was never committed", c.Payload, c.ID)
		case e.Payload != c.Payload:
			r.complain("the event %s was handled with the payload %q, and was committed with %q", c.ID, c.Payload, e.Payload)
		case h.Ordered && handled[c.ID] == 0 && e.Row < last:
			r.complain("row %d was handled after row %d", e.Row, last)
		}
		last = max(last, e.Row)
		handled[c.ID]++
		by[attempt{c.ID, c.By, c.Attempt}] = true
	}
	r.Handled = len(handled)
	r.Repeats = len(h.Calls) - len(handled)
	for id, e := range committed {
		if handled[id] == 0 && !superseded[id] && !failed[id] && !h.Left[id] {
			r.complain("row %d is lost: %q was never handled", e.Row, e.Payload)
		}
	}
	holders := map[int64]Event{} // the last claim of each row, until it is released
	for _, e := range events {
		holder, held := holders[e.Row]
		switch e.Kind {
		case Claimed:
			if held && holder.Until.After(e.At) {
				r.complain("row %d was claimed by %s at %v, and the lease of %s ends at %v", e.Row, e.By, e.At, holder.By, holder.Until)
			}
			holders[e.Row] = e
		case Done, Released, Failed:
			if !held || holder.By != e.By || holder.Attempts != e.Attempts && e.Attempts >= 0 {
				r.complain("the fence is broken: row %d is %s by %s at attempt %d, and was last claimed by %q at attempt %d", e.Row, e.Kind, e.By, e.Attempts, holder.By, holder.Attempts)
			}
			if e.Kind == Done && e.Attempts > 0 && !by[attempt{e.ID, e.By, e.Attempts}] {
				r.complain("row %d is done by %s at attempt %d, and %s has not handled it then", e.Row, e.By, e.Attempts, e.By)
			}
			delete(holders, e.Row)
		}
	}
	return r
}

// Schema is the SQL of the triggers that keep the record of an outbox. It is dropped with the table TABLE_history.
func Schema(table string) string {
	return strings.ReplaceAll(`
create table "{t}_history" (seq bigint generated always as identity, kind text, id bigint, event text, by text, attempts int,
	at timestamptz, until timestamptz, payload text);
create function "{t}_keep"() returns trigger language plpgsql as $$
declare
	me text := current_setting('application_name');
begin
	if tg_op = 'INSERT' then
		insert into "{t}_history" (kind, id, event, by, attempts, at, payload) values ('committed', new.id, new.event_id, me, new.attempts, now(), new.payload);
		return null;
	elsif tg_op = 'DELETE' then
		insert into "{t}_history" (kind, id, event, by, attempts, at) values ('done', old.id, old.event_id, me, old.attempts, now());
		return null;
	end if;
	if new.lease is not null and new.leased_until is distinct from old.leased_until then
		insert into "{t}_history" (kind, id, event, by, attempts, at, until) values ('claimed', new.id, new.event_id, me, new.attempts, now(), new.leased_until);
	elsif old.lease is not null and new.lease is null then
		insert into "{t}_history" (kind, id, event, by, attempts, at) values (
			case when new.failed_at is not null then 'failed' when new.event_id <> old.event_id then 'done' else 'released' end,
			old.id, old.event_id, me, old.attempts, now());
	elsif new.event_id <> old.event_id then
		insert into "{t}_history" (kind, id, event, by, attempts, at) values ('superseded', old.id, old.event_id, me, old.attempts, now());
	end if;
	if new.event_id <> old.event_id then
		insert into "{t}_history" (kind, id, event, by, attempts, at, payload) values ('committed', new.id, new.event_id, me, new.attempts, now(), new.payload);
	end if;
	return null;
end $$;
create trigger "{t}_keep" after insert or update or delete on "{t}" for each row execute function "{t}_keep"();
`, "{t}", table)
}

// Read reads the record of an outbox, and what is left in it.
func Read(db *sql.DB, table string) (h History, err error) {
	rows, err := db.Query(`select seq, kind, id, event, by, attempts, at, coalesce(until, at), coalesce(payload, '') from "` + table + `_history"`)
	if err != nil {
		return h, err
	}
	defer rows.Close()
	for rows.Next() {
		var e Event
		if err := rows.Scan(&e.Seq, &e.Kind, &e.Row, &e.ID, &e.By, &e.Attempts, &e.At, &e.Until, &e.Payload); err != nil {
			return h, err
		}
		e.Payload = strings.TrimSuffix(e.Payload, "\n")
		h.Events = append(h.Events, e)
	}
	if err := rows.Err(); err != nil {
		return h, err
	}
	left, err := db.Query(`select event_id from "` + table + `" where failed_at is null`)
	if err != nil {
		return h, err
	}
	defer left.Close()
	h.Left = map[string]bool{}
	for left.Next() {
		var id string
		if err := left.Scan(&id); err != nil {
			return h, err
		}
		h.Left[id] = true
	}
	return h, left.Err()
}

// Calls reads what handlers have written: a line "ID REPLICA ATTEMPT PAYLOAD" each.
func Calls(text string) (calls []Call) {
	for line := range strings.Lines(text) {
		var c Call
		rest := strings.TrimSuffix(line, "\n")
		var n string
		c.ID, rest, _ = strings.Cut(rest, " ")
		c.By, rest, _ = strings.Cut(rest, " ")
		n, c.Payload, _ = strings.Cut(rest, " ")
		_, _ = fmt.Sscan(n, &c.Attempt)
		calls = append(calls, c)
	}
	return calls
}
