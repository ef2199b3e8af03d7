// Package proc starts programs, ends them with their children, and logs what they say.
package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// Find returns the path of a program, which is looked for in PATH unless it has
// a slash. The error says what is wrong with it.
func Find(program string) (path string, err error) {
	path, err = exec.LookPath(program)
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return "", fmt.Errorf("program %q is not in PATH", program)
	case errors.Is(err, os.ErrNotExist):
		return "", fmt.Errorf("program %q does not exist", program)
	case errors.Is(err, os.ErrPermission):
		return "", fmt.Errorf("program %q may not be executed; try chmod +x", program)
	case err != nil:
		return "", fmt.Errorf("program %q: %w", program, err)
	}
	return path, nil
}

// Command returns a command in a process group of its own. When ctx ends, the
// whole group is asked to end with SIGTERM, and the program is killed after
// grace. After its end call KillGroup for what it leaves behind.
func Command(ctx context.Context, grace time.Duration, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path, args...)
	ownGroup(cmd)
	cmd.Cancel = func() error { return terminateGroup(cmd.Process) }
	cmd.WaitDelay = grace
	return cmd
}

// KillGroup kills what a program has left running in its group. A program that
// was never started has left nothing.
func KillGroup(cmd *exec.Cmd) {
	if cmd.Process != nil {
		killGroup(cmd.Process)
	}
}
