package queue

import "github.com/pglistener/pglistener/internal/notify"

// fifo is a ring that grows as needed; its owner sets the bound.
type fifo struct {
	ring []notify.Notification
	head int
	n    int
}

func (q *fifo) len() int { return q.n }

func (q *fifo) push(n notify.Notification) {
	if q.n == len(q.ring) {
		bigger := make([]notify.Notification, max(16, 2*q.n))
		copy(bigger, q.ring[q.head:])
		copy(bigger[len(q.ring)-q.head:], q.ring[:q.head])
		q.ring, q.head = bigger, 0
	}
	q.ring[(q.head+q.n)%len(q.ring)] = n
	q.n++
}

func (q *fifo) pop() notify.Notification {
	n := q.ring[q.head]
	q.ring[q.head] = notify.Notification{} // release the payload
	q.head = (q.head + 1) % len(q.ring)
	if q.n--; q.n == 0 && len(q.ring) > 1024 { // a burst is over: release its memory
		q.ring, q.head = nil, 0
	}
	return n
}

// size is what a notification that waits takes: its payload, its place in a ring of which half may be empty, and what the
// allocator rounds up.
func size(n notify.Notification) int64 { return int64(len(n.Payload)) + 256 }

// fits says whether q may hold so much more. q.mu is held, here and below.
func (q *Queue) fits(more int64) bool {
	return q.options.Memory == nil || q.options.Memory.Fits(q.bytes, more)
}

// hold counts bytes that q holds from now on, or no longer holds.
func (q *Queue) hold(bytes int64) {
	if q.options.Memory != nil {
		q.options.Memory.Changed(q.bytes, q.bytes+bytes)
	}
	q.bytes += bytes
}
