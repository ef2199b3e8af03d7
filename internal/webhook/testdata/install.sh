#!/bin/sh
# Installs the npm package standardwebhooks into bin/npm, for TestStandardWebhooksLibraryVerifies. It says nothing
# unless it fails, and does nothing when the right version is there. npm checks what it fetches against
# package-lock.json.
set -eu
cd "$(dirname "$0")"
bin=../../../bin

works() {
	node -e '
		const want = require("./package.json").dependencies.standardwebhooks;
		const dir = process.argv[1] + "/npm/node_modules/standardwebhooks";
		const { Webhook } = require(dir);
		new Webhook("c2VjcmV0").sign("id", new Date(), "{}");
		if (require(dir + "/package.json").version !== want) process.exit(1);
	' "$bin" 2>/dev/null
}

command -v npm >/dev/null && command -v node >/dev/null || { echo "npm is missing: apt-get install npm; brew install node" >&2; exit 1; }
works && exit 0

mkdir -p "$bin"
new=$(mktemp -d "$bin/npm.XXXXXX")
trap 'rm -rf "$new"' EXIT
cp package.json package-lock.json "$new"
npm ci --prefix "$new" --ignore-scripts --no-audit --no-fund --no-update-notifier --fetch-retries=1 --fetch-retry-mintimeout=1000 --fetch-timeout=30000 --loglevel=error >/dev/null
rm -rf "$bin/npm"
mv "$new" "$bin/npm"
works || { echo "bin/npm: the package standardwebhooks does not work" >&2; exit 1; }
