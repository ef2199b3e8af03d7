// Package workers runs many short functions on few goroutines.
package workers

import "sync"

// Pool runs functions, each as if on a goroutine of its own; but a goroutine that is done with one goes on to the next, which costs
// a small part of a new one. None waits behind one that blocks or takes long: while any waits, a goroutine has been started that
// has yet to begin, and it will take it. The zero Pool is ready.
type Pool struct {
	mu      sync.Mutex
	waiting []func() // in order
	coming  bool     // a goroutine has been started and has not begun
}

// Go has f run, and returns at once. Any goroutine may call it. Whoever must know when f has returned has f say so.
func (p *Pool) Go(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting = append(p.waiting, f)
	p.call()
}

// call starts a goroutine, if something waits and none is coming already. p.mu is held.
func (p *Pool) call() {
	if len(p.waiting) > 0 && !p.coming {
		p.coming = true
		go p.work()
	}
}

// work runs what waits until nothing does.
func (p *Pool) work() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.coming = false
	for len(p.waiting) > 0 {
		f := p.waiting[0]
		p.waiting[0], p.waiting = nil, p.waiting[1:]
		p.call() // for the rest: f may block
		p.mu.Unlock()
		f()
		p.mu.Lock()
	}
}
