// feature: outbox

package history

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// TestCheckSeesWhatIsWrong: a checker that lets anything pass proves nothing.
func TestCheckSeesWhatIsWrong(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	// Row 1 is handled twice: replica a is killed, and b takes it when the lease has ended. Row 2 fails once, is given back once, and
	// becomes another event while it waits; then it is done. Row 3 still waits, row 4 was given up, and row 5 has found the
	// first time of its schedule.
	good := func() History {
		return History{
			Events: []Event{
				{1, Committed, 1, "e1", "producer", 0, at(0), at(0), "one"},
				{2, Committed, 2, "e2", "producer", 0, at(0), at(0), "two"},
				{3, Claimed, 1, "e1", "a", 1, at(1), at(11), ""},
				{4, Claimed, 2, "e2", "a", 1, at(1), at(11), ""},
				{5, Released, 2, "e2", "a", 1, at(2), at(2), ""},
				{6, Claimed, 2, "e2", "b", 2, at(3), at(13), ""},
				{7, Released, 2, "e2", "b", 2, at(4), at(4), ""},
				{8, Superseded, 2, "e2", "producer", 1, at(5), at(5), ""},
				{9, Committed, 2, "e2b", "producer", 1, at(5), at(5), "two, changed"},
				{10, Claimed, 1, "e1", "b", 2, at(12), at(22), ""},
				{11, Done, 1, "e1", "b", 2, at(13), at(13), ""},
				{12, Claimed, 2, "e2b", "b", 2, at(14), at(24), ""},
				{13, Done, 2, "e2b", "b", 2, at(15), at(15), ""},
				{14, Committed, 3, "e3", "producer", 0, at(16), at(16), "three"},
				{15, Committed, 4, "e4", "producer", 0, at(17), at(17), "four"},
				{16, Claimed, 4, "e4", "b", 1, at(18), at(28), ""},
				{17, Failed, 4, "e4", "b", 1, at(19), at(19), ""},
				{18, Committed, 5, "e5", "b", -1, at(20), at(20), "schedule"},
				{19, Claimed, 5, "e5", "a", 0, at(20), at(30), ""},
				{20, Done, 5, "e5", "a", 0, at(21), at(21), ""},
				{21, Committed, 5, "e5b", "a", 0, at(21), at(21), "schedule"},
			},
			Calls:   Calls("e1 a 1 one\ne1 b 2 one\ne2b b 2 two, changed\n"),
			Known:   []string{"one", "two", "two, changed"},
			Left:    map[string]bool{"e3": true, "e5b": true},
			Ordered: true,
		}
	}
	if r := Check(good()); len(r.Problems) > 0 || r.Committed != 7 || r.Handled != 2 || r.Repeats != 1 {
		t.Errorf("%+v", r)
	}
	without := func(h *History, seq int64) {
		h.Events = slices.DeleteFunc(h.Events, func(e Event) bool { return e.Seq == seq })
	}
	for name, c := range map[string]struct {
		spoil func(*History)
		want  string
	}{
		"a row that was never handled": {func(h *History) { h.Left = nil }, `row 3 is lost: "three" was never handled`},
		"a commit that is not there":   {func(h *History) { h.Known = append(h.Known, "five") }, `"five" was committed, and was never in the table`},
		"a ghost":                      {func(h *History) { h.Calls = append(h.Calls, Call{"e9", "a", 1, "rolled back"}) }, "a ghost was handled"},
		"another payload":              {func(h *History) { h.Calls[0].Payload = "won" }, `was handled with the payload "won"`},
		"another order":                {func(h *History) { slices.Reverse(h.Calls) }, "row 1 was handled after row 2"},
		"two leases":                   {func(h *History) { h.Events[9].At = at(10) }, "row 1 was claimed by b"},
		"a result after the lease":     {func(h *History) { h.Events[10].By = "a" }, "the fence is broken: row 1 is done by a at attempt 2"},
		"a result of an older attempt": {func(h *History) { h.Events[10].Attempts = 1 }, "the fence is broken: row 1 is done by b at attempt 1"},
		"a row given back by another":  {func(h *History) { h.Events[6].By = "a" }, "the fence is broken: row 2 is released by a"},
		"a result without a claim":     {func(h *History) { without(h, 12) }, "the fence is broken: row 2 is done by b"},
		"done and not handled":         {func(h *History) { h.Calls[1] = h.Calls[0] }, "row 1 is done by b at attempt 2, and b has not handled it then"},
		"a change that is forgotten":   {func(h *History) { h.Calls = h.Calls[:2]; without(h, 13) }, `"two, changed" was never handled`},
	} {
		t.Run(name, func(t *testing.T) {
			h := good()
			c.spoil(&h)
			if all := strings.Join(Check(h).Problems, "\n"); !strings.Contains(all, c.want) {
				t.Errorf("no %q in\n%s", c.want, all)
			}
		})
	}
}
