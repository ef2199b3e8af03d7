//go:build !unix

package proc

import (
	"os"
	"os/exec"
)

// Without process groups only the program itself can be ended, and only at once.

func ownGroup(*exec.Cmd) {}

func terminateGroup(p *os.Process) error { return p.Kill() }

func killGroup(*os.Process) {}
