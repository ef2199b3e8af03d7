package outbox

import "time"

// scan is how the claimer reads the index of due rows. A row that is done leaves an entry that vacuum cannot remove while a
// snapshot anywhere might still see it, and every claim would read all of them first. So when that has become dear, claims begin
// where the last one ended, and only now and then one reads everything: rows that were committed late or given back, and those
// whose lease has ended, may be anywhere.
type scan struct {
	from    place         // all that was due before it has been claimed or seen
	drained bool          // the last claim found less than it had room for, in rows and in bytes
	held    bool          // claims are dear because somebody holds a snapshot
	dear    bool          // the last look at everything was, for whatever reason, when it was last known
	cost    time.Duration // of the last look at everything
	looked  time.Time     // when it began
	owing   bool          // since then there was a claim that did not read everything
	asked   time.Time     // when the server was last asked when the next row is due
}

const (
	dearLook    = 2 * time.Millisecond   // on the server, when less was due than there was room for
	dearClaim   = 5 * time.Millisecond   // for us, besides
	perRow      = 20 * time.Microsecond  // for each row claimed
	askPause    = 100 * time.Millisecond // between questions when the next row is due: under load each claim would ask
	scanPause   = 2 * time.Second        // between looks at everything, while they are dear,
	scanBalance = 10                     // and so many times their own cost
)

func (s *scan) interval() time.Duration { return max(scanPause, scanBalance*s.cost) }
func (s *scan) overdue() bool           { return time.Since(s.looked) >= s.interval() }

// short says whether the next claim is to begin where the last one ended.
func (s *scan) short() bool { return s.held && !s.from.runAt.IsZero() && (s.drained || !s.overdue()) }

// again is when everything is to be looked at again, come what may.
func (s *scan) again() time.Duration {
	switch {
	case s.owing:
		return max(0, time.Until(s.looked.Add(s.interval())))
	case s.dear: // to find out when it is over
		return max(0, time.Until(s.looked.Add(max(30*time.Second, s.interval()))))
	}
	return time.Hour
}

// look claims up to room rows, among those after scan.from if short is true and otherwise among all. next is when to look again,
// if less were due.
func (o *Outbox) look(room int, short bool) (claimed int, next time.Duration, err error) {
	s, from, began := &o.scan, map[bool]place{true: o.scan.from}[short], time.Now()
	jobs, cut, err := o.store.claim(room, from, o.slack)
	took, dear := time.Since(began), s.dear
	if err != nil { // what it has claimed all the same comes due again
		return 0, 0, err
	}
	if len(jobs) > 0 {
		o.slack = min(max(2*took, o.slack/2), 10*time.Minute) // so much later they come due again if the listener is killed
	}
	o.push(jobs)
	if s.drained = len(jobs) < room && !cut; s.drained {
		next = time.Until(s.asked.Add(askPause))
	} else {
		dear = took > dearClaim+time.Duration(len(jobs))*perRow
	}
	if s.drained && (short || s.held || next <= 0) {
		var now time.Time
		if next, now, took, err = o.store.nextDue(from); err != nil {
			return len(jobs), 0, err
		}
		if s.asked = time.Now(); next <= 0 && len(jobs) == 0 {
			s.asked = time.Time{} // it is locked, and is to be asked for again
		}
		dear = took > dearLook
		s.from = place{runAt: now.Add(-time.Since(began))} // what has become due since the claim began is yet to be seen
	}
	if n := len(jobs); n > 0 && (!s.drained || next <= 0) { // there are more: as many as there was room for, or large ones
		s.from = place{jobs[n-1].runAt, jobs[n-1].id}
	}
	s.owing = short
	if short {
		return len(jobs), next, nil
	}
	s.looked, s.cost, s.dear, s.held = began, time.Since(began), dear, false
	if dear {
		s.held, err = o.pool.findHolder(o.store, o.log)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.counts.heldBack = s.held
	return len(jobs), next, err
}
