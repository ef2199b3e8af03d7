package workers

import (
	"bytes"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestNoneWaitsForOneThatBlocks has functions that all block until the last of them has begun.
func TestNoneWaitsForOneThatBlocks(t *testing.T) {
	var p Pool
	const n = 200
	var begun atomic.Int32
	all, done := make(chan struct{}), make(chan struct{}, n)
	for range n {
		p.Go(func() {
			if begun.Add(1) == n {
				close(all)
			}
			<-all
			done <- struct{}{}
		})
	}
	for range n {
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatalf("%d of %d have begun", begun.Load(), n)
		}
	}
}

// TestShortOnesShareGoroutines: on one processor nobody else can take what waits, and nothing but time slices makes a second goroutine
// run.
func TestShortOnesShareGoroutines(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	var p Pool
	const n = 1000
	used := map[string]bool{} // goroutines; guarded by mu
	var order []int
	var mu sync.Mutex
	var all sync.WaitGroup
	all.Add(n)
	before := runtime.NumGoroutine()
	for i := range n {
		p.Go(func() {
			defer all.Done()
			stack := make([]byte, 40)
			id, _, _ := bytes.Cut(stack[:runtime.Stack(stack, false)], []byte(" ["))
			mu.Lock()
			defer mu.Unlock()
			used[string(id)] = true
			order = append(order, i)
		})
	}
	if more := runtime.NumGoroutine() - before; more > n/10 {
		t.Errorf("%d goroutines were started for %d functions", more, n)
	}
	all.Wait()
	if len(used) > n/10 {
		t.Errorf("%d functions ran on %d goroutines", n, len(used))
	}
	back := 0
	for i := 1; i < n; i++ {
		if order[i] < order[i-1] {
			back++
		}
	}
	if back > n/10 { // a few, where one goroutine took over from another
		t.Errorf("%d of %d ran out of order", back, n)
	}
}

// TestEachRunsOnce has many goroutines add functions, also from within functions.
func TestEachRunsOnce(t *testing.T) {
	var p Pool
	const adders, each = 8, 2000
	ran := make([]atomic.Int32, 2*adders*each)
	var all sync.WaitGroup
	all.Add(len(ran))
	run := func(i int) {
		ran[i].Add(1)
		all.Done()
	}
	for a := range adders {
		go func() {
			for i := a * each; i < (a+1)*each; i++ {
				p.Go(func() {
					p.Go(func() { run(adders*each + i) })
					run(i)
				})
			}
		}()
	}
	all.Wait()
	for i := range ran {
		if n := ran[i].Load(); n != 1 {
			t.Fatalf("function %d ran %d times", i, n)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() { // until the last goroutine has found nothing more
		p.mu.Lock()
		idle := len(p.waiting) == 0 && !p.coming
		p.mu.Unlock()
		if idle {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("a goroutine that was started never began")
		}
	}
}
