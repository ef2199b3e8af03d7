# Two commands matter: "make demo" shows what it does, "make test" runs everything
# that takes less than five minutes.

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: build demo test test-extra soak lint matrix new postgres tools bench

build:
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o bin/pglistener .

# begin: execcmd
# DEMO_SECONDS=15 makes it end by itself.
demo: postgres build
	@go build -o bin/demo ./internal/demo
	@bin/demo bin/pglistener

# end: execcmd
test: tools lint
	go test -race -shuffle=on ./...

# What is heavy: the whole suites of copies without each feature, outages that last, much memory, a browser, and a fault after every
# message.
test-extra: tools
	@sh internal/pgtest/install.sh browser # feature: page
	TEST_EXTRA=yes go test -count=1 -timeout=60m -run '^(TestCopiesPassTheirTests|TestOutageOfAMinute|TestOldProgramWorksTheNewTable|TestReplicasThatFallSilentFreezeOrDie|TestMemoryIsBounded|TestEveryBoundary|TestPageInABrowser)$$' .
	TEST_EXTRA=yes go test -count=1 -run '^TestClaimProtocolAsModel$$' ./internal/outbox # feature: outbox

# begin: outbox execcmd webhook health
# Faults at random for SOAK_MINUTES, 30 if it is not set; one line a minute. CHAOS_SEED=123 repeats a plan.
soak: tools
	TEST_SOAK=yes go test -v -count=1 -timeout=0 -run '^TestSoak$$' .

# end: outbox execcmd webhook health
lint:
	go vet ./...
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt these: $$unformatted"; exit 1; }
	go run $(STATICCHECK) ./...

# The whole suite on PostgreSQL 14 to 18, one line for each; the output is in bin/matrix-*.log.
matrix: tools
	@mkdir -p bin; unset TEST_DATABASE_URL; failed=; for v in 14 15 16 17 18; do \
		if bin=$$(sh internal/pgtest/versions.sh $$v) && PGTEST_BIN=$$bin go test -race -shuffle=on -count=1 ./... >bin/matrix-$$v.log 2>&1; then \
			echo "$$("$$bin/postgres" --version): passed"; \
		else \
			echo "PostgreSQL $$v: FAILED; see bin/matrix-$$v.log"; failed=yes; \
		fi; \
	done; test -z "$$failed"

# A copy for a project of your own:
# make new MODULE=example.com/acme/notifier DIR=../notifier WITHOUT="outbox webhook"
new:
	@go run ./internal/template '$(MODULE)' '$(DIR)' $(WITHOUT)

# What the tests and the demo need and go does not bring.
postgres:
	@sh internal/pgtest/install.sh

tools:
	@sh internal/pgtest/install.sh all
# begin: outbox

# Against lib/pq's bare loop, pgx, River, graphile-worker and net/http; about 25 minutes. ROWS="latency claim" runs some only.
bench: postgres build
	@go test -c -o bin/pglistener.test .
	@cd bench && go build -o ../bin/bench .
	@bin/bench bin/pglistener bin/pglistener.test $(ROWS)
# end: outbox
