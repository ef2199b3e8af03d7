package pipe

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/retry"
)

// Check implements notify.Checker: it starts the program, gives it nothing, closes its stdin and waits for its end, in which a
// program that cannot load what it needs fails. It does not use the program that Run keeps.
func (h *handler) Check(ctx context.Context) (string, error) {
	return h.check(ctx, 300*time.Millisecond, 2*time.Second)
}

// check is Check. The program must run on for open, and should then end within closed.
func (h *handler) check(ctx context.Context, open, closed time.Duration) (string, error) {
	var stderr tail
	p, err := h.launch(func(p *program) { _, _ = io.Copy(io.Discard, p.stdout) }, &stderr)
	if err != nil {
		return "", err
	}
	ended, end := context.WithCancel(context.Background())
	go func() { p.wait(h.setup.Grace); end() }()
	defer context.AfterFunc(ctx, p.stop)()
	early := !retry.Sleep(ended, open)
	_ = p.stdin.Close()
	inTime := !retry.Sleep(ended, closed)
	p.stop()
	<-ended.Done()
	switch state := p.cmd.ProcessState; {
	case ctx.Err() != nil:
		return "", fmt.Errorf("%s: %w", h.path, context.Cause(ctx))
	case inTime && !state.Success():
		said := strings.Fields(strings.ToValidUTF8(string(stderr), "?")) // for one line
		return "", fmt.Errorf("%s: %v: %s", h.path, state, strings.Join(said, " "))
	case early:
		return "", fmt.Errorf("%s: it ended at once, with exit status 0; it should read lines from stdin until there are no more", h.path)
	case inTime:
		return h.path + " starts, and ends when its stdin does", nil
	}
	return fmt.Sprintf("%s starts; it was stopped because it did not end within %v of its stdin", h.path, closed), nil
}

// tail keeps the end of what is written to it.
type tail []byte

// Write implements io.Writer. It never fails.
func (t *tail) Write(p []byte) (int, error) {
	*t = append(*t, p...)
	*t = (*t)[max(0, len(*t)-500):]
	return len(p), nil
}
