// Package proc starts programs, ends them with their children, and logs what they say.
package proc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pglistener/pglistener/internal/env"
)

// Settings are the variables of programs.
type Settings struct {
	Pass string `env:"ENV_PASS" usage:"variables that programs inherit, comma-separated, besides PATH; if empty, all but the listener's own secrets"`
}

// own are the variables that are the listener's alone and may hold secrets; and none has an equals sign in its name.
var own = regexp.MustCompile(`WEBHOOK_|^CHANNELS|_HANDLER$|^NOTIFY_SOCKET$|^WATCHDOG_|=`)

func (s Settings) passed() []string {
	return strings.FieldsFunc(s.Pass, func(r rune) bool { return r == ',' || r == ' ' })
}

// Validate returns what is wrong with ENV_PASS. Its error shows no entry, which may be a secret.
func (s Settings) Validate() []error {
	if i := slices.IndexFunc(s.passed(), own.MatchString); i >= 0 {
		return []error{fmt.Errorf("ENV_PASS: entry %d is never passed: it is a variable of the listener's own, such as CHANNELS, or has WEBHOOK_ in its name, or is no name", i+1)}
	}
	return nil
}

// Environ is what a program inherits of the environment: never what is only the listener's.
func (s Settings) Environ() (all []string) {
	pass := s.passed()
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if !own.MatchString(name) && (s.Pass == "" || name == "PATH" || slices.Contains(pass, name)) {
			all = append(all, v)
		}
	}
	return all
}

// Program takes apart what follows the name of a handler, and finds the program. What only a shell would understand is an error and not
// an odd argument.
func Program(handler, command string) (path string, args []string, err error) {
	words, err := env.Words(command)
	if err == nil && len(words) == 0 {
		err = fmt.Errorf("%s needs a program: %[1]s:PROGRAM [ARG...]", handler)
	}
	if err != nil {
		return "", nil, err
	}
	for _, w := range words {
		if w != "" && strings.ContainsRune("|<>&;", rune(w[0])) || strings.HasPrefix(w, "2>") {
			return "", nil, errors.New("there is no shell, so a word that begins with | < > & ; or 2> would be an argument like any other; put the command into a script")
		}
	}
	path, err = find(words[0])
	return path, words[1:], err
}

// Stamp writes a time as RFC 3339 has it, or nothing when it is zero.
func Stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// find returns the path of a program, which is looked for in PATH unless it has a slash. The error says what is wrong with it.
func find(program string) (path string, err error) {
	path, err = exec.LookPath(program)
	switch {
	case err != nil && strings.Contains(program, "="): // it may be a secret
		return "", errors.New("the command begins with a variable, which only a shell would set; set it for the listener instead")
	case errors.Is(err, exec.ErrNotFound):
		return "", fmt.Errorf("program %q is not in PATH", program)
	case errors.Is(err, os.ErrNotExist):
		return "", fmt.Errorf("program %q does not exist", program)
	case errors.Is(err, os.ErrPermission):
		return "", fmt.Errorf("program %q may not be executed; try chmod +x", program)
	case err != nil:
		return "", fmt.Errorf("program %q: %w", program, err)
	}
	return path, checkShebang(path)
}

// checkShebang finds a script that was written on another system: the kernel takes the carriage return for a part of the
// interpreter's name, and says only that there is no such file.
func checkShebang(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return nil // it may be executed all the same
	}
	defer f.Close()
	line, _ := bufio.NewReader(io.LimitReader(f, 256)).ReadString('\n')
	if strings.HasPrefix(line, "#!") && strings.HasSuffix(line, "\r\n") {
		return fmt.Errorf("program %q: its first line ends in CR LF, as on Windows; convert it: sed -i 's/\\r$//' %s", path, path)
	}
	return nil
}

// Command returns a command in a process group of its own. When ctx ends, the whole group is asked to end with SIGTERM, and the
// program is killed after grace. After its end call KillGroup for what it leaves behind.
func Command(ctx context.Context, grace time.Duration, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path, args...)
	ownGroup(cmd)
	cmd.Cancel = func() error { return terminateGroup(cmd.Process) }
	cmd.WaitDelay = grace
	return cmd
}

// KillGroup kills what a program has left running in its group. A program that was never started has left nothing.
func KillGroup(cmd *exec.Cmd) {
	if cmd.Process != nil {
		killGroup(cmd.Process)
	}
}
