#!/bin/sh
# Makes sure that what the tests and the demo run is on this machine. Installs
# Debian's packages when it may, and otherwise says what to type.

[ -n "$TEST_DATABASE_URL" ] && exit 0

have_postgres() {
	command -v initdb >/dev/null && return
	for f in /usr/lib/postgresql/*/bin/initdb /usr/pgsql-*/bin/initdb /opt/homebrew/opt/postgresql@*/bin/initdb \
		/usr/local/opt/postgresql@*/bin/initdb /usr/local/pgsql/bin/initdb /Applications/Postgres.app/Contents/Versions/*/bin/initdb; do
		[ -x "$f" ] && return
	done
	return 1
}

have_postgres && exit 0

if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
	echo "no PostgreSQL server found; installing Debian's package"
	# Only the programs are wanted, not a cluster that runs.
	mkdir -p /etc/postgresql-common
	[ -e /etc/postgresql-common/createcluster.conf ] || echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends postgresql >/dev/null
	have_postgres && exit 0
fi

cat >&2 <<'END'
No PostgreSQL server programs (initdb, postgres) were found. Install them:

  Debian, Ubuntu:  sudo apt-get install postgresql
  macOS:           brew install postgresql@17

or let the tests use a server in a container:

  docker compose -f docker-compose.test.yml up -d --wait
  export TEST_DATABASE_URL='postgres://postgres:postgres@127.0.0.1:55432/postgres?sslmode=disable'
END
exit 1
