// Package env reads the environment: variables that are declared by tags on structs, CHANNELS, and the connection string. No
// error of it shows a secret.
package env

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sethvargo/go-envconfig"
)

// Variables are the fields of structs, one struct a package, nested in the program's. These tags say what each may be:
//
//	env:"NAME,default=VALUE"  its name and its default
//	usage:"..."               its meaning, for -h, docs/settings.md and .env.example
//	file:"true"               NAME_FILE may name a file that holds the value, which is a secret
//	oneof:"a b"               it is one of these words
//	quotes:"keep"             quotes around the whole belong to the value
//	only:"channel"            it counts with a channel's prefix alone
//	min:"0" max:"100"         bounds of a number or a duration; without them 1 to a million, more than 0 to a year
//
// A struct may have a method Validate() []error, for what tags cannot say; each error begins with a variable's name.

// Lookuper returns the value of a variable and whether it is set: os.LookupEnv, or a map in tests.
type Lookuper func(name string) (string, bool)

// Decode fills the variables among the fields of target, a pointer to a struct. It returns every problem at once, one error each,
// beginning with the name of the variable and free of secrets. An empty variable counts as unset.
func Decode(target any, lookup Lookuper) []error {
	return (&decoder{target: target, lookup: lookup}).decode()
}

// DecodeFor is Decode for a channel: each variable may have the channel's prefix, and the one without it counts only where that
// is not set. It returns the prefixed names that are set, and the problems of those alone: the others are Decode's.
func DecodeFor(target any, lookup Lookuper, channel string) (set []string, problems []error) {
	d := &decoder{target: target, lookup: lookup, prefix: Prefix(channel)}
	for _, err := range d.decode() {
		name, _, _ := strings.Cut(strings.TrimPrefix(err.Error(), d.prefix), ":")
		if _, ok := variableOf(target, strings.TrimSuffix(name, "_FILE")); ok && strings.HasPrefix(err.Error(), d.prefix+name) {
			problems = append(problems, err)
		}
	}
	return d.set, problems
}

// DecodeChannels decodes a copy of base for each channel. It returns them, and the prefixed names that are set, by
// channel. Two channels that would both read a variable are an error.
func DecodeChannels[T any](base T, routes []Route, lookup Lookuper) (all map[string]T, set map[string][]string, problems []error) {
	all, set = map[string]T{}, map[string][]string{}
	readers := map[string]string{} // the channel that reads a variable
	for _, r := range routes {
		s := base
		names, wrong := DecodeFor(&s, lookup, r.Channel)
		all[r.Channel], set[r.Channel], problems = s, names, append(problems, wrong...)
		for _, name := range append(names, r.Variable) {
			if other := readers[name]; other != "" && name != "CHANNELS" {
				problems = append(problems, fmt.Errorf("%s: it is for channel %q as well as for %q; rename one of the channels", name, other, r.Channel))
			}
			readers[name] = r.Channel
		}
	}
	return all, set, problems
}

// Merge adds problems to others, but for those that only repeat one with other words before it.
func Merge(problems, more []error) []error {
	for _, err := range more {
		if !slices.ContainsFunc(problems, func(p error) bool {
			return strings.HasSuffix(err.Error(), p.Error()) || errors.Is(err, errors.Unwrap(p))
		}) {
			problems = append(problems, err)
		}
	}
	return problems
}

// Prefix is what stands before the name of a variable that is for one channel alone: the channel in upper case, with an
// underscore for all that is neither letter nor digit.
func Prefix(channel string) string {
	return notInPrefix.ReplaceAllString(strings.ToUpper(channel), "_") + "_"
}

var notInPrefix = regexp.MustCompile(`[^A-Z0-9]`)

// IsSet says whether a variable is set, for a channel if that is not "", or for all.
func IsSet(lookup Lookuper, channel, name string) bool {
	own, _ := lookup(Prefix(channel) + name)
	value, _ := lookup(name)
	return own != "" || value != ""
}

// hints say what a variable of a type must be; every string is one.
var hints = map[reflect.Type]string{
	reflect.TypeFor[int]():           "a whole number",
	reflect.TypeFor[bool]():          "true or false",
	reflect.TypeFor[time.Duration](): "a duration such as 500ms, 10s or 1m30s",
	reflect.TypeFor[Bytes]():         "a size such as 1500KB, 64MB or 1GB",
}

type decoder struct {
	target any
	lookup Lookuper
	prefix string
	set    []string          // prefixed names that are set
	names  map[string]string // under which each variable was found
}

func (d *decoder) decode() []error {
	var problems []error
	bad := map[string]bool{}
	// envconfig stops at the first value it cannot decode, so it is run again without that one until it is content.
	for {
		d.set, d.names = nil, map[string]string{}
		var last string
		err := envconfig.ProcessWith(context.Background(), &envconfig.Config{
			Target: d.target,
			// Values already there are defaults or good: without this, a second run would keep what the first one set and never
			// see a default.
			DefaultOverwrite: true,
			Lookuper: envconfig.LookuperFunc(func(name string) (string, bool) {
				last = name
				if bad[name] {
					return "", false
				}
				value, err := d.value(name)
				if err != nil {
					problems, bad[name] = append(problems, err), true
				}
				return value, value != ""
			}),
		})
		if err == nil {
			return append(append(problems, d.outOfRange(bad)...), d.invalid()...)
		}
		v, known := variableOf(d.target, last)
		if bad[last] || !known {
			return append(problems, err) // not the value's fault: a bug in the struct's tags
		}
		bad[last] = true
		value, _ := d.lookup(d.names[last])
		problems = append(problems, fmt.Errorf("%s: %q is not %s", d.names[last], value, hints[v.field.Type]))
	}
}

// value returns the value of a variable: with the prefix if that is set, from a file where that is allowed.
func (d *decoder) value(name string) (string, error) {
	v, _ := variableOf(d.target, name)
	for _, prefix := range slices.Compact([]string{d.prefix, ""}) {
		if prefix == "" && v.field.Tag.Get("only") == "channel" {
			continue
		}
		d.names[name] = prefix + name
		value, err := v.find(d.lookup, prefix+name)
		if value == "" && err == nil {
			continue
		}
		if prefix != "" {
			d.set = append(d.set, prefix+name)
		}
		return value, err
	}
	return "", nil
}

// find returns the value of a variable, or what is in the file that NAME_FILE names.
func (v Variable) find(lookup Lookuper, name string) (string, error) {
	value, _ := lookup(name)
	if v.field.Tag.Get("quotes") != "keep" {
		value = Unquote(value)
	}
	path, _ := lookup(name + "_FILE")
	if path = Unquote(path); !v.File || path == "" {
		return value, nil
	}
	data, err := ReadFile(path, 64<<10)
	text := strings.TrimRight(string(data), "\r\n")
	switch {
	case value != "":
		err = fmt.Errorf("%s is set too; set one of them", name)
	case err == nil && text == "":
		err = fmt.Errorf("%q is empty", path)
	}
	if unread := new(fs.PathError); errors.As(err, &unread) && !filepath.IsAbs(path) {
		err = fmt.Errorf("%w; the path is not shown because it may be the secret itself; write an absolute path", unread.Err)
	}
	if err != nil {
		return "", fmt.Errorf("%s_FILE: %w", name, err)
	}
	return text, nil
}

// Unquote removes one pair of quotes around a whole value: docker's --env-file keeps those that a shell and systemd need around
// blanks.
func Unquote(value string) string {
	value = strings.TrimSpace(value)
	if n := len(value); n > 1 && (value[0] == '\'' || value[0] == '"') && value[n-1] == value[0] {
		double, inner := value[0] == '"', value[1:n-1]
		if double && strings.Contains(strings.NewReplacer(`\\`, "", `\"`, "").Replace(inner), `"`) {
			return value // as in "a"."b": no pair around the whole
		}
		if value = inner; double {
			value = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\$`, `$`, "\\`", "`").Replace(value)
		}
	}
	return value
}

// ReadFile reads a file of at most limit bytes, so that a wrong path cannot fill the memory.
func ReadFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%q is larger than %d bytes", path, limit)
	}
	return data, err
}

// outOfRange checks the tags oneof, min and max of every variable that is not bad already.
func (d *decoder) outOfRange(bad map[string]bool) (problems []error) {
	for _, v := range Variables(d.target) {
		least, most := v.field.Tag.Get("min"), v.field.Tag.Get("max")
		words := strings.Fields(v.field.Tag.Get("oneof"))
		wrong := ""
		switch value := v.value.Interface().(type) {
		case string:
			if len(words) > 0 && !slices.Contains(words, value) {
				wrong = fmt.Sprintf("%q is not one of %s", value, strings.Join(words, ", "))
			}
		case int:
			low, _ := strconv.Atoi(cmp.Or(least, "1"))
			high, _ := strconv.Atoi(cmp.Or(most, "1000000"))
			if value < low || value > high {
				wrong = fmt.Sprintf("%d is not from %d to %d", value, low, high)
			}
		case Bytes:
			if value < 1<<20 {
				wrong = "it is less than 1MB"
			}
		case time.Duration:
			if value < 0 || value == 0 && least == "" {
				wrong = fmt.Sprintf("%v is not positive; write a duration such as 10s", value)
			} else if value > 366*24*time.Hour {
				wrong = fmt.Sprintf("%v is more than a year", value)
			}
		}
		if wrong != "" && !bad[v.Name] {
			problems = append(problems, fmt.Errorf("%s: %s", d.names[v.Name], wrong))
		}
	}
	return problems
}

// invalid asks the structs that can validate themselves. Where a variable has the prefix, so has the error.
func (d *decoder) invalid() (problems []error) {
	var visit func(reflect.Value)
	visit = func(s reflect.Value) {
		if v, ok := s.Interface().(interface{ Validate() []error }); ok {
			for _, err := range v.Validate() {
				name, text, _ := strings.Cut(err.Error(), ": ")
				problems = append(problems, fmt.Errorf("%s: %s", cmp.Or(d.names[name], name), text))
			}
		}
		for i := range s.NumField() {
			if f := s.Type().Field(i); f.IsExported() && f.Type.Kind() == reflect.Struct {
				visit(s.Field(i))
			}
		}
	}
	visit(reflect.ValueOf(d.target).Elem())
	return problems
}

// Variable is a field that is read from the environment.
type Variable struct {
	Name, Default, Usage string
	File                 bool // NAME_FILE may name a file
	field                reflect.StructField
	value                reflect.Value
}

// Variables returns those of target, a pointer to a struct, and of the structs in it, in their order.
func Variables(target any) (all []Variable) {
	s := reflect.ValueOf(target).Elem()
	for i := range s.NumField() {
		f := s.Type().Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("env"), ",")
		switch {
		case name != "":
			all = append(all, Variable{
				Name: name, Default: strings.TrimPrefix(options, "default="), Usage: f.Tag.Get("usage"),
				File: f.Tag.Get("file") != "", field: f, value: s.Field(i),
			})
		case f.Type.Kind() == reflect.Struct && f.IsExported():
			all = append(all, Variables(s.Field(i).Addr().Interface())...)
		}
	}
	return all
}

func variableOf(target any, name string) (Variable, bool) {
	all := Variables(target)
	if i := slices.IndexFunc(all, func(v Variable) bool { return v.Name == name }); i >= 0 {
		return all[i], true
	}
	return Variable{}, false
}

// Print writes a table of the variables of target, for -h, without those of but.
func Print(w io.Writer, target, but any) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range Variables(target) {
		if _, left := variableOf(but, v.Name); left {
			continue
		}
		fmt.Fprintf(tw, "  %s\t%s\t%s\n", v.Name, v.Default, v.Usage)
		if v.File {
			fmt.Fprintf(tw, "  %s_FILE\t\ta file that holds %s\n", v.Name, v.Name)
		}
	}
	tw.Flush()
}
