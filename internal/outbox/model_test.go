package outbox

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// The protocol of store.go as a model: every interleaving of two replicas on three rows, with faults at every point. What the SQL
// does to a row is done here by write, claim and giveBack; when one of them changes there, it has to change here.

const (
	modelReplicas = 2
	modelRows     = 3
	modelJobs     = 2 // of a replica on one row: one that is late, and one claimed after it
)

// What the rows are.
const (
	rowPlain     = iota // deleted by complete
	rowKeyed            // a producer may upsert it
	rowScheduled        // moves to its next time, once
)

type phase uint8

const (
	noJob phase = iota
	isClaimed
	isRunning
	isDone    // the handler has succeeded
	hasFailed // the handler has failed
	onTheWay  // the replica has crashed; what it has sent of a done job may yet arrive
)

// modelJob is a claimed row in a replica. What the SQL finds out by comparing is kept as whether it would be equal, so that there
// are no counters and the model is finite.
type modelJob struct {
	phase    phase
	owner    uint8 // what it has put into lease
	attempts int8
	live     bool // its lease has not ended, nor was it released
	latest   bool // nobody has claimed the row since: leased_until is what it was
	changed  bool // somebody has written the row since: xmin is not what it was
	outdated bool // the row has become another event since
	gone     bool // the row was deleted since; one of the same key has another id
}

type modelRow struct {
	exists, failed bool
	lease          uint8 // 0 is null
	leased         bool  // leased_until > now()
	attempts       int8
	handled        bool // some handler has succeeded with what is in it now
	ran            bool // it has moved to its next time
	untimed        bool // the first time of its schedule is yet to be found
}

// inserted is a new row. The trigger gives one with a schedule the attempts -1.
func inserted(row int) modelRow {
	r := modelRow{exists: true, untimed: row == rowScheduled}
	if r.untimed {
		r.attempts = -1
	}
	return r
}

var notInPlay = modelRow{failed: true} // which nobody claims

type modelState struct {
	rows   [modelRows]modelRow
	jobs   [modelReplicas][modelRows][modelJobs]modelJob
	age    [modelReplicas]uint8 // crashes of each: a new process has a new owner
	faults uint8                // left: crashes, ends of leases, changes, failures and lost replies, together
	calm   bool                 // there was none yet
}

// protocol are the decisions of the SQL. A broken one decides otherwise.
type protocol struct {
	mayClaim     func(modelRow) bool
	oursComplete func(modelRow, modelJob) bool
	oursEnd      func(modelRow, modelJob) bool
	oursBack     func(modelRow, modelJob) bool
	changed      func(modelJob) bool
	timeIsLost   func(modelRow) bool // when a claim, which was to find the first time, has come to nothing
	timeIsFound  func(modelJob) bool // when the row was changed meanwhile
}

func theProtocol() protocol {
	return protocol{
		mayClaim:     func(r modelRow) bool { return r.lease == 0 || !r.leased },
		oursComplete: func(r modelRow, j modelJob) bool { return r.lease == j.owner && r.attempts == j.attempts },
		oursEnd: func(r modelRow, j modelJob) bool {
			return r.lease == j.owner && j.latest && (r.attempts == j.attempts || r.attempts == -1)
		},
		oursBack:    func(r modelRow, j modelJob) bool { return r.lease == j.owner && j.latest && r.attempts == j.attempts },
		changed:     func(j modelJob) bool { return j.changed },
		timeIsLost:  func(r modelRow) bool { return r.attempts == 0 && r.lease != 0 },
		timeIsFound: func(j modelJob) bool { return j.attempts > 0 },
	}
}

// each calls f with every job of a row.
func (s *modelState) each(row int, f func(*modelJob)) {
	for p := range s.jobs {
		for k := range s.jobs[p][row] {
			if j := &s.jobs[p][row][k]; j.phase != noJob {
				f(j)
			}
		}
	}
}

// wrote takes note that the row was written, by j unless it is nil.
func (s *modelState) wrote(row int, by *modelJob) {
	s.each(row, func(j *modelJob) {
		if j != by {
			j.changed = true
		}
	})
}

// another makes the row another event.
func (s *modelState) another(row int) {
	s.rows[row].handled = false
	s.each(row, func(j *modelJob) { j.outdated = true })
}

// release takes the lease from the row.
func (s *modelState) release(row int) {
	s.rows[row].lease, s.rows[row].leased = 0, false
	s.each(row, func(j *modelJob) {
		if j.latest {
			j.live = false
		}
	})
}

// claim is store.claim for one row. slot is where the job goes; -1 when the answer is lost.
func (s *modelState) claim(p, row, slot int, by protocol) (violated string) {
	s.each(row, func(j *modelJob) {
		if j.live && !j.gone {
			violated = "claimed although a lease on it lives"
		}
		j.latest = false
	})
	r := &s.rows[row]
	if row != rowScheduled || !by.timeIsLost(*r) {
		r.attempts++
	}
	if row == rowScheduled && r.untimed && r.attempts > 0 {
		violated = "runs before its first time was found"
	}
	r.lease, r.leased = uint8(p+1)+modelReplicas*s.age[p], true
	s.wrote(row, nil)
	if slot >= 0 {
		s.jobs[p][row][slot] = modelJob{phase: isClaimed, owner: r.lease, attempts: r.attempts, live: true, latest: true}
	}
	return violated
}

// write is store.complete, or store.end.
func (s *modelState) write(row int, j *modelJob, by protocol) (violated string) {
	r := &s.rows[row]
	simple := row == rowPlain && j.phase != hasFailed // for complete, which does not look for changes: a row without a key has none
	if j.gone || simple && !by.oursComplete(*r, *j) || !simple && !by.oursEnd(*r, *j) {
		return ""
	}
	if !j.latest {
		violated = "a late write has changed what another claim holds"
	}
	before := *j
	changed := by.changed(*j) && !simple
	s.release(row)
	s.wrote(row, nil)
	finished := func() {
		if !r.handled && before.attempts != 0 { // at attempt 0 only the first time of a schedule is found
			violated = "ended although what is in it was never handled"
		}
	}
	switch {
	case changed && row == rowScheduled && !by.timeIsFound(before):
		r.attempts = -1
	case changed:
		r.attempts = min(r.attempts, 0)
	case j.phase == hasFailed:
		r.failed = j.attempts >= 2 // given up
	case row == rowScheduled:
		finished()
		r.attempts, r.untimed = 0, false
		s.another(row)
		r.ran = true
	default:
		finished()
		*r = modelRow{}
		s.each(row, func(j *modelJob) { j.gone, j.live = true, false })
	}
	return violated
}

// giveBack is store.giveBack.
func (s *modelState) giveBack(row int, j *modelJob, by protocol) (violated string) {
	r := &s.rows[row]
	if j.gone || !by.oursBack(*r, *j) {
		return ""
	}
	if !j.latest {
		violated = "a late give-back has changed what another claim holds"
	}
	s.release(row)
	s.wrote(row, nil)
	r.attempts--
	return violated
}

// next calls visit with every state that may follow, and what has led to it.
func (s modelState) next(by protocol, visit func(next modelState, violated, action string, args ...any)) {
	fault := s
	fault.faults--
	fault.calm = false
	for row, r := range s.rows {
		live := r.exists && !r.failed && (row != rowScheduled || !r.ran || r.untimed || !r.handled)
		for p := range s.jobs {
			for slot, j := range s.jobs[p][row] {
				if j.phase == noJob {
					if live && by.mayClaim(r) {
						n := s
						visit(n, n.claim(p, row, slot, by), "replica %d claims row %d", p, row)
						if s.faults > 0 {
							n := fault
							visit(n, n.claim(p, row, -1, by), "replica %d claims row %d, and the answer is lost", p, row)
						}
					}
					break // the slots are alike
				}
			}
			for slot, j := range s.jobs[p][row] {
				n, f := s, fault
				nj, fj := &n.jobs[p][row][slot], &f.jobs[p][row][slot]
				switch j.phase {
				case isClaimed:
					nj.phase = isRunning
					if row == rowScheduled && j.attempts == 0 {
						nj.phase = isDone // no handler runs
					}
					visit(n, "", "replica %d begins row %d", p, row)
					n = s
					nj = &n.jobs[p][row][slot]
					violated := n.giveBack(row, nj, by)
					*nj = modelJob{}
					visit(n, violated, "replica %d gives row %d back", p, row)
				case isRunning:
					nj.phase = isDone
					violated := ""
					if !j.outdated && !j.gone {
						if s.rows[row].handled && s.calm {
							violated = "handled again although nothing has failed"
						}
						n.rows[row].handled = true
					}
					visit(n, violated, "replica %d has handled row %d", p, row)
					if s.faults > 0 {
						fj.phase = hasFailed
						visit(f, "", "replica %d fails with row %d", p, row)
					}
				case isDone, hasFailed, onTheWay:
					violated := n.write(row, nj, by)
					*nj = modelJob{}
					visit(n, violated, "the result of replica %d on row %d is written", p, row)
					if s.faults > 0 && j.phase != onTheWay {
						violated := f.write(row, fj, by)
						visit(f, violated, "the result of replica %d on row %d is written, and the answer is lost", p, row)
					}
				}
			}
		}
		if s.faults == 0 {
			continue
		}
		if r.leased {
			n := fault
			n.rows[row].leased = false
			n.each(row, func(j *modelJob) {
				if j.latest {
					j.live = false
				}
			})
			visit(n, "", "the lease on row %d ends", row)
		}
		if row != rowPlain && r != notInPlay {
			n := fault
			if n.rows[row].exists && !n.rows[row].failed {
				n.another(row)
				n.wrote(row, nil)
			} else {
				n.rows[row] = inserted(row)
			}
			visit(n, "", "a producer writes row %d", row)
			if row == rowScheduled && r.exists && !r.failed {
				n.rows[row].attempts, n.rows[row].untimed = -1, true
				visit(n, "", "a producer gives row %d another schedule", row)
			}
		}
	}
	for p := range s.jobs {
		if s.faults == 0 {
			break
		}
		n := fault
		n.age[p]++
		for row := range n.jobs[p] {
			for slot := range n.jobs[p][row] {
				if j := &n.jobs[p][row][slot]; j.phase == isDone {
					j.phase = onTheWay
				} else if j.phase != onTheWay {
					*j = modelJob{}
				}
			}
		}
		visit(n, "", "replica %d crashes", p)
	}
}

// explore walks all states of some rows with so many faults, and returns how many there are, or the shortest way to a violation.
func explore(by protocol, faults uint8, rows ...int) (states int, counterexample string) {
	type step struct {
		from   int
		action string
	}
	start := modelState{faults: faults, calm: true}
	for i := range start.rows {
		start.rows[i] = notInPlay
	}
	for _, i := range rows {
		start.rows[i] = inserted(i)
	}
	known := map[modelState]struct{}{start: {}}
	queue, steps := []modelState{start}, []step{{-1, ""}}
	for i := 0; i < len(queue) && counterexample == ""; i++ {
		queue[i].next(by, func(n modelState, violated, action string, args ...any) {
			if counterexample != "" {
				return
			}
			if violated != "" {
				lines := []string{fmt.Sprintf(action, args...) + ": " + violated}
				for at := i; at > 0; at = steps[at].from {
					lines = append([]string{steps[at].action}, lines...)
				}
				counterexample = strings.Join(lines, "\n")
				return
			}
			if _, ok := known[n]; !ok {
				known[n] = struct{}{}
				queue, steps = append(queue, n), append(steps, step{i, fmt.Sprintf(action, args...)})
			}
		})
	}
	return len(known), counterexample
}

// walk explores each row alone with three faults, and all together with fewer: with two, there are a million states.
func walk(by protocol) (states int, counterexample string) {
	together := uint8(1)
	if os.Getenv("TEST_EXTRA") != "" {
		together = 2
	}
	for _, c := range []struct {
		faults uint8
		rows   []int
	}{{3, []int{rowPlain}}, {3, []int{rowKeyed}}, {3, []int{rowScheduled}}, {together, []int{rowPlain, rowKeyed, rowScheduled}}} {
		n, found := explore(by, c.faults, c.rows...)
		if states += n; found != "" {
			return states, found
		}
	}
	return states, ""
}

// TestClaimProtocolAsModel: nothing is lost, at most one lease on a row lives, what is changed is handled once more, nothing is
// handled twice when nothing fails, and a late write of a lease that has ended changes nothing. Each weaker protocol breaks one of
// these.
func TestClaimProtocolAsModel(t *testing.T) {
	t.Parallel()
	states, counterexample := walk(theProtocol())
	t.Logf("%d states", states)
	if counterexample != "" {
		t.Error(counterexample)
	}
	noFence := func(modelRow, modelJob) bool { return true }
	byLease := func(r modelRow, j modelJob) bool { return r.lease == j.owner }
	byAttempts := func(r modelRow, j modelJob) bool { return r.attempts == j.attempts }
	byBoth := func(r modelRow, j modelJob) bool { return r.lease == j.owner && r.attempts == j.attempts }
	for name, weaken := range map[string]func(*protocol){
		"complete without a fence":     func(p *protocol) { p.oursComplete = noFence },
		"complete by lease":            func(p *protocol) { p.oursComplete = byLease },
		"complete by attempts":         func(p *protocol) { p.oursComplete = byAttempts },
		"end without a fence":          func(p *protocol) { p.oursEnd = noFence },
		"end by lease":                 func(p *protocol) { p.oursEnd = byLease },
		"end by attempts":              func(p *protocol) { p.oursEnd = byAttempts },
		"end by lease and attempts":    func(p *protocol) { p.oursEnd = byBoth },
		"give back without a fence":    func(p *protocol) { p.oursBack = noFence },
		"give back by lease":           func(p *protocol) { p.oursBack = byLease },
		"give back by lease, attempts": func(p *protocol) { p.oursBack = byBoth },
		"leases are not looked at":     func(p *protocol) { p.mayClaim = func(modelRow) bool { return true } },
		"changed rows are deleted":     func(p *protocol) { p.changed = func(modelJob) bool { return false } },
		"a lost claim finds the time":  func(p *protocol) { p.timeIsLost = func(modelRow) bool { return false } },
		"a change finds the time":      func(p *protocol) { p.timeIsFound = func(modelJob) bool { return true } },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := theProtocol()
			weaken(&p)
			if _, counterexample := walk(p); counterexample == "" {
				t.Error("nothing breaks: the model does not see what this is for")
			} else {
				t.Log(counterexample)
			}
		})
	}
}
