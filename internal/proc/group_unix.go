//go:build unix

package proc

import (
	"os"
	"os/exec"
	"syscall"
)

// ownGroup has cmd start in a process group of its own, so that its children can be reached with it, and so that a Ctrl-C in the
// terminal reaches the listener alone.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

func terminateGroup(p *os.Process) error {
	err := syscall.Kill(-p.Pid, syscall.SIGTERM)
	if err == syscall.ESRCH {
		return os.ErrProcessDone // what os/exec expects when there is nothing to end
	}
	return err
}

func killGroup(p *os.Process) { _ = syscall.Kill(-p.Pid, syscall.SIGKILL) }
