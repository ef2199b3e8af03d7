package outbox

import (
	"database/sql"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/lib/pq"

	"github.com/pglistener/pglistener/internal/notify"
	"github.com/pglistener/pglistener/internal/pgconn"
)

// Pool is the two connections that all outbox channels of a process share: one to claim, one to complete. It connects when it is
// first used, and closes them when the last channel has ended. The zero Pool is ready.
type Pool struct {
	mu       sync.Mutex
	db       *sql.DB
	channels []string // of the users, once each
	looked   time.Time
	unknown  map[string]int // channels that nobody here handles, with their rows,
	sum      int            // which are so many

	asking   sync.Mutex // guards what follows, also while the server is asked
	asked    time.Time  // when findHolder last asked
	snapshot string     // the oldest then
	held     bool       // it was the oldest at the time before, too
}

// acquire returns the connections. timeout bounds every answer of the server.
func (p *Pool) acquire(channel, dsn string, timeout time.Duration) (*sql.DB, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.channels) == 0 {
		db, err := pgconn.OpenDB(dsn, timeout)
		if err != nil {
			return nil, err
		}
		db.SetMaxOpenConns(2) // and as many idle, which is the default
		db.SetConnMaxIdleTime(time.Minute)
		p.db = db
	}
	p.channels = append(p.channels, channel)
	return p.db, nil
}

// release gives them back: once for each acquire.
func (p *Pool) release(channel string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.channels = slices.DeleteFunc(p.channels, func(c string) bool { return c == channel })
	if len(p.channels) == 0 {
		p.db.Close()
	}
}

// lookForStrangers warns of rows that have been due for minutes on channels that this listener does not handle: perhaps nobody
// does. It looks once a minute.
func (p *Pool) lookForStrangers(s store, log *slog.Logger) error {
	p.mu.Lock()
	handled, recent := slices.Clone(p.channels), time.Since(p.looked) < time.Minute
	if !recent {
		p.looked = time.Now()
	}
	p.mu.Unlock()
	if recent {
		return nil
	}
	found, err := byKey[string, int](s, statement("strangers"), pq.StringArray(handled))
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sum = 0
	for channel, n := range found {
		p.sum += n
		if p.unknown[channel] == 0 {
			log.Warn("rows have been due for minutes on a channel that this listener does not handle: add it to CHANNELS, or correct the channel of the rows",
				"unhandled", channel, "rows", n)
		}
	}
	p.unknown = found
	return nil
}

// findHolder says whether somebody holds a snapshot for long, so that dead rows cannot be removed, and names a new holder in the
// log. It asks the server every five seconds at most, and believes what it has been told twice.
func (p *Pool) findHolder(s store, log *slog.Logger) (held bool, err error) {
	p.asking.Lock()
	defer p.asking.Unlock()
	if time.Since(p.asked) < 5*time.Second {
		return p.held, nil
	}
	var who, snapshot string
	if err = s.db.QueryRow(statement("holder")).Scan(&who, &snapshot); err != nil {
		return false, err
	}
	held = who != "" && snapshot == p.snapshot
	if held && !p.held {
		log.Warn("claims are slow because dead rows cannot be removed: somebody holds a snapshot that might still see them", "holder", who)
	}
	p.asked, p.snapshot, p.held = time.Now(), snapshot, held
	return held, nil
}

// stats are the figures of all channels together; the first one tells them.
func (p *Pool) stats(channel string) []notify.Stat {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.channels) == 0 || p.channels[0] != channel {
		return nil
	}
	return []notify.Stat{{Name: "pglistener_outbox_unhandled_rows", Kind: "gauge", Value: float64(p.sum),
		Help: "Rows that have been due for minutes on channels that this listener does not handle, up to a thousand each."}}
}
