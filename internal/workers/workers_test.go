package workers

import (
	"bytes"
	"fmt"
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

// TestShortOnesShareGoroutines: on one processor nobody else can take what waits, and nothing but the scheduler makes a second goroutine
// run. A processor that stands still for a moment does, so one try of twenty is enough.
func TestShortOnesShareGoroutines(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	before := runtime.NumGoroutine() // of the first try: what a try has left behind counts against the next
	var complaint string
	for range 20 {
		if complaint = shortOnes(before); complaint == "" {
			return
		}
	}
	t.Error(complaint)
}

// shortOnes has a Pool run many functions, and says what is wrong with where and when they ran. There were before goroutines.
func shortOnes(before int) string {
	var p Pool
	const n = 1000
	var goroutine [n]string
	var began [n]int64
	var all sync.WaitGroup
	all.Add(n)
	var count atomic.Int64
	for i := range n {
		p.Go(func() {
			defer all.Done()
			stack := make([]byte, 40)
			id, _, _ := bytes.Cut(stack[:runtime.Stack(stack, false)], []byte(" ["))
			goroutine[i], began[i] = string(id), count.Add(1)
		})
	}
	if more := runtime.NumGoroutine() - before; more > n/10 {
		return fmt.Sprintf("%d goroutines were started for %d functions", more, n)
	}
	all.Wait()
	used, back := map[string]bool{}, 0
	for i := range n {
		used[goroutine[i]] = true
		if i > 0 && began[i] < began[i-1] {
			back++
		}
	}
	if len(used) > n/10 {
		return fmt.Sprintf("%d functions ran on %d goroutines", n, len(used))
	}
	if back > n/10 { // a few, where one goroutine took over from another
		return fmt.Sprintf("%d of %d ran out of order", back, n)
	}
	return ""
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
