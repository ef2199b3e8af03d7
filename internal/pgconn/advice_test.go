package pgconn

import (
	"fmt"
	"strings"
	"testing"

	"github.com/lib/pq"
)

// TestLostTransactionStatusIsTheServersBug: the server's file must be lost to cause it, so the error is made here as lib/pq makes it.
func TestLostTransactionStatusIsTheServersBug(t *testing.T) {
	err := fmt.Errorf("listen %q: %w", "orders", &pq.Error{Code: "58P01", Message: "could not access status of transaction 14279685"})
	if text := Advice(err); !strings.Contains(text, "bug of the server") || !strings.Contains(text, "15.16") {
		t.Errorf("the advice is %q", text)
	}
	if Hopeless(err) {
		t.Error("it would end the start, although it may go away when the queue is read")
	}
}
