//go:build unix

package pgtest

import (
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
	client, server net.Conn // server is nil on a link that was born mute
	silent         chan struct{}
	silence        sync.Once
	closed         chan struct{}
	close          sync.Once
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
	if l.server == nil {
		<-l.closed
	} else {
		var pumps sync.WaitGroup
		pumps.Go(func() { l.pump(l.server, l.client, delay) })
		pumps.Go(func() { l.pump(l.client, l.server, delay) })
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
		if l.server != nil {
			l.server.Close()
		}
	})
}

// pump copies from src to dst until either ends or the link falls silent. Then it holds
// the sockets open, unread and unwritten, until the link is ended.
func (l *link) pump(dst, src net.Conn, delay time.Duration) {
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
			if _, err := dst.Write(c.data); err != nil && !l.isSilent() {
				l.end()
			}
		}
	})
	buf := make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
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
