package outbox

import (
	"database/sql"
	"sync"
	"time"

	"github.com/pglistener/pglistener/internal/pgconn"
)

// Pool is the two connections that all outbox channels of a process share: one
// to claim, one to complete. It connects when it is first used, and closes them
// when the last channel has ended. The zero Pool is ready.
type Pool struct {
	mu    sync.Mutex
	db    *sql.DB
	users int
}

// acquire returns the connections. timeout bounds every answer of the server.
func (p *Pool) acquire(dsn string, timeout time.Duration) (*sql.DB, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.users == 0 {
		db, err := pgconn.OpenDB(dsn, timeout)
		if err != nil {
			return nil, err
		}
		db.SetMaxOpenConns(2)
		db.SetMaxIdleConns(2)
		db.SetConnMaxIdleTime(time.Minute)
		p.db = db
	}
	p.users++
	return p.db, nil
}

// release gives them back: once for each acquire.
func (p *Pool) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.users--; p.users == 0 {
		p.db.Close()
	}
}
