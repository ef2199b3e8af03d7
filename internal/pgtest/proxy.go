//go:build unix

package pgtest

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// Proxy is a TCP proxy that fails as networks do. All methods may be called
// from any goroutine and take effect at once.
type Proxy struct {
	listener net.Listener
	wg       sync.WaitGroup

	mu     sync.Mutex
	target string
	delay  time.Duration // each way, for links made from now on
	mute   bool          // links made from now on are accepted and never served
	refuse bool          // connections made from now on are closed at once
	links  map[*link]struct{}
	closed bool
	dialed int
}

// link is one proxied connection.
type link struct {
	client  net.Conn
	silent  chan struct{}
	silence sync.Once
	closed  chan struct{}
	close   sync.Once

	mu      sync.Mutex
	server  net.Conn // nil on a link that was born mute
	startup []byte   // the client's first message
}

// NewProxy starts a proxy on a port of its own before target, a host:port.
func NewProxy(target string) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{listener: l, target: target, links: map[*link]struct{}{}}
	p.wg.Add(1)
	go p.accept()
	return p, nil
}

// Addr is the proxy's host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Close ends the proxy and every link, and waits for its goroutines.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	for l := range p.links {
		l.end()
	}
	p.mu.Unlock()
	p.listener.Close()
	p.wg.Wait()
}

// Silence makes the open links swallow everything, both ways, without closing:
// a NAT that forgot them, or a failover behind a virtual address.
// Links made later work.
func (p *Proxy) Silence() {
	for _, l := range p.open() {
		l.silence.Do(func() { close(l.silent) })
	}
}

// Mute decides whether links made from now on are accepted and never served.
func (p *Proxy) Mute(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mute = on
}

// Refuse decides whether connections made from now on are closed at once.
func (p *Proxy) Refuse(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = on
}

// Reset cuts the open links with a RST towards the client.
func (p *Proxy) Reset() {
	for _, l := range p.open() {
		if tcp, ok := l.client.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		l.end()
	}
}

// Swap puts new sessions of the server behind the open links, as a proxy or pooler does that
// fails over without telling its client. It works without TLS and with trust authentication.
func (p *Proxy) Swap() error {
	p.mu.Lock()
	target := p.target
	p.mu.Unlock()
	var errs []error
	for _, l := range p.open() {
		errs = append(errs, l.swap(target))
	}
	return errors.Join(errs...)
}

// Delay holds back everything by d each way, on links made from now on.
func (p *Proxy) Delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

// Target sends links made from now on to another host:port.
func (p *Proxy) Target(addr string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = addr
}

// Dialed counts the connections that clients have made.
func (p *Proxy) Dialed() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dialed
}

func (p *Proxy) open() []*link {
	p.mu.Lock()
	defer p.mu.Unlock()
	links := make([]*link, 0, len(p.links))
	for l := range p.links {
		links = append(links, l)
	}
	return links
}

func (p *Proxy) accept() {
	defer p.wg.Done()
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		p.dialed++
		closed, refuse, mute, target, delay := p.closed, p.refuse, p.mute, p.target, p.delay
		p.mu.Unlock()
		if closed || refuse {
			client.Close()
			continue
		}
		l := &link{client: client, silent: make(chan struct{}), closed: make(chan struct{})}
		if !mute {
			if l.server, err = net.DialTimeout("tcp", target, 5*time.Second); err != nil {
				client.Close()
				continue
			}
		}
		p.mu.Lock()
		p.links[l] = struct{}{}
		if p.closed {
			l.end()
		}
		p.mu.Unlock()
		p.wg.Add(1)
		go p.serve(l, delay)
	}
}

func (p *Proxy) serve(l *link, delay time.Duration) {
	defer p.wg.Done()
	if l.serverConn() == nil {
		<-l.closed
	} else {
		var pumps sync.WaitGroup
		pumps.Go(func() { l.pump(l.toServer, l.fromClient, delay) })
		pumps.Go(func() { l.pump(l.client.Write, l.fromServer, delay) })
		pumps.Wait()
	}
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
}

func (l *link) end() {
	l.close.Do(func() {
		close(l.closed)
		l.client.Close()
		if s := l.serverConn(); s != nil {
			s.Close()
		}
	})
}

func (l *link) serverConn() net.Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.server
}

func (l *link) toServer(p []byte) (int, error) { return l.serverConn().Write(p) }

// fromClient reads from the client, and keeps its first message for a swap.
func (l *link) fromClient(p []byte) (int, error) {
	n, err := l.client.Read(p)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.startup == nil && n > 0 {
		l.startup = append([]byte(nil), p[:n]...)
	}
	return n, err
}

// fromServer reads from the server, and goes on with another one after a swap.
func (l *link) fromServer(p []byte) (int, error) {
	for {
		s := l.serverConn()
		n, err := s.Read(p)
		if n > 0 || err == nil || s == l.serverConn() {
			return n, err
		}
	}
}

// swap puts a new session of the server behind the client's connection.
func (l *link) swap(target string) error {
	fresh, err := net.DialTimeout("tcp", target, 5*time.Second)
	if err != nil {
		return err
	}
	l.mu.Lock()
	startup := l.startup
	l.mu.Unlock()
	if _, err := fresh.Write(startup); err != nil {
		return err
	}
	// Swallow the answer, up to ReadyForQuery: the client has had one.
	for kind := byte(0); kind != 'Z'; {
		var head [5]byte
		if _, err := io.ReadFull(fresh, head[:]); err != nil {
			return err
		}
		kind = head[0]
		if _, err := io.CopyN(io.Discard, fresh, int64(binary.BigEndian.Uint32(head[1:]))-4); err != nil {
			return err
		}
	}
	l.mu.Lock()
	old := l.server
	l.server = fresh
	l.mu.Unlock()
	_ = old.Close() // may have ended meanwhile
	return nil
}

// pump copies from read to write until either ends or the link falls silent. Then it holds
// the sockets open, unread and unwritten, until the link is ended.
func (l *link) pump(write, read func([]byte) (int, error), delay time.Duration) {
	type chunk struct {
		data []byte
		due  time.Time
	}
	// The delay is latency, not bandwidth: chunks queue up behind each other.
	chunks := make(chan chunk, 1024)
	var wg sync.WaitGroup
	wg.Go(func() {
		for c := range chunks {
			select {
			case <-time.After(time.Until(c.due)):
			case <-l.closed:
			}
			if l.isSilent() {
				continue
			}
			if _, err := write(c.data); err != nil && !l.isSilent() {
				l.end()
			}
		}
	})
	buf := make([]byte, 64<<10)
	for {
		n, err := read(buf)
		if n > 0 && !l.isSilent() {
			c := chunk{data: append([]byte(nil), buf[:n]...), due: time.Now().Add(delay)}
			select {
			case chunks <- c:
			case <-l.closed:
			}
		}
		if err != nil {
			if l.isSilent() {
				// The other side's FIN or RST is swallowed too.
				<-l.closed
			}
			break
		}
	}
	close(chunks)
	wg.Wait()
	l.end()
}

func (l *link) isSilent() bool {
	select {
	case <-l.silent:
		return true
	default:
		return false
	}
}
