# Two commands matter: "make demo" shows what it does, "make test" runs everything.

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: build demo test lint postgres tools bench

build:
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o bin/pglistener .

# DEMO_SECONDS=15 makes it end by itself.
demo: postgres build
	@go build -o bin/demo ./internal/demo
	@bin/demo bin/pglistener

test: tools lint
	go test -race -shuffle=on ./...

lint:
	go vet ./...
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt these: $$unformatted"; exit 1; }
	go run $(STATICCHECK) ./...

# What the tests and the demo need and go does not bring.
postgres:
	@sh internal/pgtest/install.sh

tools:
	@sh internal/pgtest/install.sh all

# Against lib/pq's bare loop, pgx and River; about 15 minutes. ROWS="latency claim" runs some only.
bench: postgres build
	@go test -c -o bin/pglistener.test .
	@cd bench && go build -o ../bin/bench .
	@bin/bench bin/pglistener bin/pglistener.test $(ROWS)
