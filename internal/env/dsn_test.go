package env

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/lib/pq"
)

// TestSSLModeIsRequiredUnlessSaidOtherwise looks at what lib/pq makes of the connection string that it is given.
func TestSSLModeIsRequiredUnlessSaidOtherwise(t *testing.T) {
	services := filepath.Join(t.TempDir(), "services")
	if err := os.WriteFile(services, []byte("[open]\nhost=h\nsslmode=disable\n[shut]\nhost=h\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PGSERVICEFILE", services)
	for _, c := range []struct {
		dsn, variable string
		want          pq.SSLMode
	}{
		{"postgres://u:p@h/db", "", "require"},
		{"postgresql://u:p@h/db?connect_timeout=5", "", "require"},
		{"host=h dbname=db", "", "require"},
		{"", "", "require"}, // the PG* variables
		{"postgres://u:p@h1,h2/db?port=1,2", "", "require"},
		{"postgres://u:p@h/db?sslmode=disable", "", "disable"},
		{"postgres://u:p@h/db?sslmode=prefer", "", "prefer"},
		{"host=h sslmode=verify-full", "", "verify-full"},
		{"postgres://u:p@h/db", "disable", "disable"},
		{"host=h", "prefer", "prefer"},
		{"postgres://u:p@h/db?sslmode=verify-ca", "disable", "verify-ca"},
		{"service=open", "", "disable"},
		{"service=shut", "", "require"},
		{"service=shut", "allow", "allow"},
		{"postgres://u:p@h/db?sslrootcert=system", "", "verify-full"},
		{"host=/var/run/postgresql", "", "disable"}, // no TLS on a unix socket
	} {
		t.Run(c.dsn+" "+c.variable, func(t *testing.T) {
			t.Setenv("PGSSLMODE", c.variable)
			if c.variable == "" {
				os.Unsetenv("PGSSLMODE")
			}
			cfg, err := pq.NewConfig(WithDefaults(c.dsn, "pglistener"))
			if err != nil || cfg.SSLMode != c.want || cfg.ApplicationName != "pglistener" {
				t.Errorf("sslmode %q, application %q, want %q; %v", cfg.SSLMode, cfg.ApplicationName, c.want, err)
			}
		})
	}
	os.Unsetenv("PGSSLMODE")
	if cfg, _ := pq.NewConfig("host=h"); cfg.SSLMode != "" {
		t.Errorf("lib/pq sets sslmode to %q when nobody does: WithDefaults must find out otherwise", cfg.SSLMode)
	}
}
