// Package memory bounds how many bytes wait in a process.
package memory

import "sync/atomic"

// Budget is shared by several holders. Each is sure of an equal share of one half; what it holds beyond that it takes from the
// other half, as long as there is any. Its methods may be called from any goroutine; Changed must follow Fits before anyone else
// asks, for the limit to be exact.
type Budget struct {
	half, share int64
	taken       atomic.Int64 // of the half of which nobody is sure
}

// New makes a Budget of so many bytes.
func New(limit int64, holders int) *Budget {
	return &Budget{half: limit / 2, share: limit / 2 / int64(max(1, holders))}
}

// Share is what each holder is sure of, in bytes.
func (b *Budget) Share() int64 { return b.share }

// Fits says whether who holds some bytes may hold more.
func (b *Budget) Fits(held, more int64) bool {
	return b.taken.Load()+b.beyond(held+more)-b.beyond(held) <= b.half
}

// Changed takes note that a holder holds more, or less, than before.
func (b *Budget) Changed(before, now int64) { b.taken.Add(b.beyond(now) - b.beyond(before)) }

// beyond is what of some bytes is beyond the share.
func (b *Budget) beyond(held int64) int64 { return max(0, held-b.share) }
