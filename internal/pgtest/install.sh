#!/bin/sh
# Makes sure that what the tests and the demo run is on this machine: a PostgreSQL
# server, and with the argument "all" also PgBouncer, promtool and, on Linux,
# systemd-analyze. Installs Debian's packages when it may, and otherwise says what to type.
# With the argument "browser" it makes sure of Chromium instead.  # feature: page

have_postgres() {
	[ -n "$TEST_DATABASE_URL" ] && return
	command -v initdb >/dev/null && return
	for f in /usr/lib/postgresql/*/bin/initdb /usr/pgsql-*/bin/initdb /opt/homebrew/opt/postgresql@*/bin/initdb \
		/usr/local/opt/postgresql@*/bin/initdb /usr/local/pgsql/bin/initdb /Applications/Postgres.app/Contents/Versions/*/bin/initdb; do
		[ -x "$f" ] && return
	done
	return 1
}

have_pgbouncer() { command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ]; }

have_promtool() { command -v promtool >/dev/null || [ -x bin/promtool ]; }

have_languages() { command -v python3 >/dev/null && command -v node >/dev/null; } # feature: pipe
have_analyze() { [ "$(uname)" != Linux ] || command -v systemd-analyze >/dev/null; }

have_browser() { command -v chromium >/dev/null || command -v google-chrome >/dev/null; } # feature: page

complete() {
	[ "$1" != browser ] || { have_browser; return; } # feature: page
	have_postgres || return 1
	[ "$1" != all ] || { have_pgbouncer && have_promtool && have_analyze; } || return 1
	[ "$1" != all ] || have_languages || return 1 # feature: pipe
}

# Only the programs are wanted: no cluster, and no service that starts.
install_quietly() {
	mkdir -p /etc/postgresql-common
	[ -e /etc/postgresql-common/createcluster.conf ] || echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

complete "$1" && exit 0

if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
	echo "installing what is missing, from Debian's packages"
	apt-get update -qq
	[ "$1" != browser ] || install_quietly chromium # feature: page
	have_postgres || install_quietly postgresql
	if [ "$1" = all ]; then
		have_pgbouncer || {
			install_quietly pgbouncer
			command -v systemctl >/dev/null && systemctl disable -q --now pgbouncer 2>/dev/null
		}
		have_analyze || install_quietly systemd
		have_languages || install_quietly python3 nodejs # feature: pipe
		# The package would bring a service; only this one program is needed.
		have_promtool || (
			dir=$(mktemp -d) && chmod 755 "$dir" && mkdir -p bin && out=$PWD/bin &&
				cd "$dir" && apt-get download -qq prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool &&
				mv usr/bin/promtool "$out/" && rm -rf "$dir"
		)
	fi
	complete "$1" && exit 0
fi

# begin: page
if [ "$1" = browser ]; then
	echo "Chromium is missing: the test that looks at the page will be skipped (apt-get install chromium; brew install --cask chromium)" >&2
	[ "$CI" != true ]
	exit
fi
# end: page
if have_postgres; then
	echo "PgBouncer, promtool or systemd-analyze is missing: the tests that need them will be skipped (apt-get install pgbouncer prometheus systemd; brew install pgbouncer prometheus)" >&2
	[ "$CI" != true ]
	exit
fi

cat >&2 <<'END'
No PostgreSQL server programs (initdb, postgres) were found. Install them:

  Debian, Ubuntu:  sudo apt-get install postgresql pgbouncer prometheus
  macOS:           brew install postgresql@17 pgbouncer prometheus

or let the tests use a server in a container:

  docker compose -f docker-compose.test.yml up -d --wait
  export TEST_DATABASE_URL='postgres://postgres:postgres@127.0.0.1:55432/postgres?sslmode=disable'
END
exit 1
