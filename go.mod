module github.com/pglistener/pglistener

go 1.25.0

require (
	github.com/lib/pq v1.12.3
	github.com/sethvargo/go-envconfig v1.4.3
)
