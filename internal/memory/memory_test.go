package memory

import "testing"

func TestBudget(t *testing.T) {
	b := New(1000, 2) // a share of 250 each, and 500 for whoever comes first
	var held [2]int64
	change := func(i int, by int64) {
		b.Changed(held[i], held[i]+by)
		held[i] += by
	}
	if b.Share() != 250 {
		t.Errorf("the share is %d", b.Share())
	}
	// The first holder takes its share and all that is free.
	for held[0] < 10_000 && b.Fits(held[0], 50) {
		change(0, 50)
	}
	if held[0] != 750 {
		t.Errorf("one holder takes %d", held[0])
	}
	// The second one is sure of its share all the same, and has no more.
	for held[1] < 10_000 && b.Fits(held[1], 50) {
		change(1, 50)
	}
	if held[1] != 250 {
		t.Errorf("the other takes %d", held[1])
	}
	// What the first one lets go is there for the second.
	change(0, -100)
	if !b.Fits(held[1], 100) || b.Fits(held[1], 101) {
		t.Error("a holder cannot have what another has let go, or more than that")
	}
	change(0, -650)
	change(1, -250)
	if held[0] != 0 || held[1] != 0 || !b.Fits(0, 750) || b.Fits(0, 751) {
		t.Error("what all have let go is not there again")
	}
}

func TestManyHolders(t *testing.T) {
	if b := New(10, 1000); b.Fits(0, 6) || !b.Fits(0, 5) {
		t.Error("shares of nothing are wrong")
	}
	if b := New(10, 0); b.Share() != 5 {
		t.Errorf("without holders the share is %d", b.Share())
	}
}
