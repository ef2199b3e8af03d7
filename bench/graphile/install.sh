#!/bin/sh
# Installs the npm package graphile-worker into bin/graphile, for make bench. It says nothing unless it fails, and does
# nothing when the right version is there. npm checks what it fetches against package-lock.json.
set -eu
cd "$(dirname "$0")"
bin=../../bin

command -v npm >/dev/null && command -v node >/dev/null || { echo "npm is missing: apt-get install npm; brew install node" >&2; exit 1; }
cmp -s package-lock.json "$bin/graphile/package-lock.json" && exit 0

mkdir -p "$bin"
new=$(mktemp -d "$bin/graphile.XXXXXX")
trap 'rm -rf "$new"' EXIT
cp package.json package-lock.json "$new"
npm ci --prefix "$new" --ignore-scripts --no-audit --no-fund --no-update-notifier --fetch-retries=1 --fetch-retry-mintimeout=1000 --fetch-timeout=30000 --loglevel=error >/dev/null
rm -rf "$bin/graphile"
mv "$new" "$bin/graphile"
