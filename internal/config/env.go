// Package config reads the environment: variables that are declared by tags on
// structs, CHANNELS, and the connection string. No error of it shows a secret.
package config

import (
	"context"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sethvargo/go-envconfig"
)

// Variables are the fields of structs, one struct a package, nested in Config.
// These tags say what each may be:
//
//	env:"NAME,default=VALUE"  its name and its default
//	usage:"..."               its meaning, for -h, docs/settings.md and .env.example
//	file:"true"               NAME_FILE may name a file that holds the value
//	oneof:"a b"               it is one of these words
//	min:"0"                   a number or a duration is at least that; without the tag at least 1, or more than 0
//
// The rest of the file reads them.

// Lookuper returns the value of a variable and whether it is set: os.LookupEnv,
// or a map in tests.
type Lookuper func(name string) (string, bool)

// Decode fills the variables among the fields of target, a pointer to a struct.
// It returns every problem at once, one error each, beginning with the name of
// the variable and free of secrets.
func Decode(target any, lookup Lookuper) []error {
	var problems []error
	bad := map[string]bool{}
	// envconfig stops at the first value it cannot decode, so it is run again
	// without that one until it is content.
	for {
		var last string
		err := envconfig.ProcessWith(context.Background(), &envconfig.Config{
			Target: target,
			// Values already there are defaults or good: without this, a second
			// run would keep what the first one set and never see a default.
			DefaultOverwrite: true,
			Lookuper: envconfig.LookuperFunc(func(name string) (string, bool) {
				last = name
				if bad[name] {
					return "", false
				}
				value, err := lookupValue(target, lookup, name)
				if err != nil {
					problems, bad[name] = append(problems, err), true
				}
				return value, value != ""
			}),
		})
		if err == nil {
			return append(problems, outOfRange(target, bad)...)
		}
		if bad[last] {
			return append(problems, err) // not the value's fault: a bug in the struct's tags
		}
		bad[last] = true
		value, _ := lookup(last)
		hint := "a whole number"
		if v, _ := variableOf(target, last); v.field.Type == reflect.TypeFor[time.Duration]() {
			hint = "a duration such as 500ms, 10s or 1m30s"
		}
		problems = append(problems, fmt.Errorf("%s: %q is not %s", last, value, hint))
	}
}

// outOfRange checks the tags oneof and min of every variable that is not bad already.
func outOfRange(target any, bad map[string]bool) (problems []error) {
	for _, v := range Variables(target) {
		if bad[v.Name] {
			continue
		}
		least, hasLeast := v.field.Tag.Lookup("min")
		switch value := v.value.Interface().(type) {
		case string:
			if words := strings.Fields(v.field.Tag.Get("oneof")); len(words) > 0 && !slices.Contains(words, value) {
				problems = append(problems, fmt.Errorf("%s: %q is not one of %s", v.Name, value, strings.Join(words, ", ")))
			}
		case int:
			bound := 1
			if hasLeast {
				bound, _ = strconv.Atoi(least)
			}
			if value < bound {
				problems = append(problems, fmt.Errorf("%s: %d is less than %d", v.Name, value, bound))
			}
		case time.Duration:
			if value < 0 || value == 0 && !hasLeast {
				problems = append(problems, fmt.Errorf("%s: %v is not positive; write a duration such as 10s", v.Name, value))
			}
		}
	}
	return problems
}

// lookupValue returns the value of a variable, from NAME_FILE where that is
// allowed and set. An empty variable counts as unset.
func lookupValue(target any, lookup Lookuper, name string) (string, error) {
	value, _ := lookup(name)
	if v, ok := variableOf(target, name); !ok || !v.File {
		return value, nil
	}
	path, _ := lookup(name + "_FILE")
	if path == "" {
		return value, nil
	}
	if value != "" {
		return "", fmt.Errorf("%s_FILE: %s is set too; set one of them", name, name)
	}
	data, err := readSmall(path)
	if err != nil {
		return "", fmt.Errorf("%s_FILE: %w", name, err)
	}
	value = strings.TrimRight(string(data), "\r\n")
	if value == "" {
		return "", fmt.Errorf("%s_FILE: %q is empty", name, path)
	}
	return value, nil
}

// readSmall reads a file that holds one value, so that a wrong path cannot fill the memory.
func readSmall(path string) ([]byte, error) {
	const limit = 64 << 10
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && len(data) > limit {
		err = fmt.Errorf("%q is larger than %d bytes", path, limit)
	}
	return data, err
}

// Variable is a field that is read from the environment.
type Variable struct {
	Name, Default, Usage string
	File                 bool // NAME_FILE may name a file
	field                reflect.StructField
	value                reflect.Value
}

// Variables returns those of target, a pointer to a struct, and of the structs in it, in their order.
func Variables(target any) []Variable { return collect(reflect.ValueOf(target).Elem()) }

func collect(s reflect.Value) (all []Variable) {
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
			all = append(all, collect(s.Field(i))...)
		}
	}
	return all
}

func variableOf(target any, name string) (Variable, bool) {
	for _, v := range Variables(target) {
		if v.Name == name {
			return v, true
		}
	}
	return Variable{}, false
}

// Print writes a table of the variables of target, for -h.
func Print(w io.Writer, target any) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range Variables(target) {
		fmt.Fprintf(tw, "  %s\t%s\t%s\n", v.Name, v.Default, v.Usage)
		if v.File {
			fmt.Fprintf(tw, "  %s_FILE\t\ta file that holds %s\n", v.Name, v.Name)
		}
	}
	tw.Flush()
}
