//go:build unix

package pgtest

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// Wire is a proxy that reads PostgreSQL's protocol: it takes down every message of a session, both ways, and can
// make the network fail right after one of them. With TLS it ends the client's TLS itself, with a certificate of the
// test, so that it sees the messages inside and the records of the handshake; the server is reached without TLS.
//
// All methods may be called from any goroutine.
type Wire struct {
	listener net.Listener
	target   string
	tls      *tls.Config // nil: TLS is refused
	role     func(client net.Addr) string
	wg       sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	stage    string
	stopping bool
	sessions map[string]bool // those that have begun, of which each name is followed once
	links    map[*wireLink]bool
	seen     []Point
	counts   map[Point]int // of points with Nth 0
	fault    Fault
	fired    time.Time
}

// Point is a moment of a session: right after a message has passed.
type Point struct {
	Session string // the stage and the role, such as "start listener"
	Message string // "→ Query LISTEN" from the client, "← CommandComplete" from the server
	Nth     int    // of this message in this session, from 1
}

func (p Point) String() string { return fmt.Sprintf("%s %s %d", p.Session, p.Message, p.Nth) }

// FaultKind is what the network does at a Point.
type FaultKind string

// The kinds of faults.
const (
	Cut     FaultKind = "cut"     // both sides see the end of the connection
	Torn    FaultKind = "torn"    // so do they, and half of the message is missing
	Reset   FaultKind = "reset"   // the client gets a RST
	Silence FaultKind = "silence" // nothing comes through any more, and nothing ends
	Delay   FaultKind = "delay"   // everything is held back for a while, once
	Forget  FaultKind = "forget"  // nothing comes through, and what the client sends next draws a RST: a NAT that forgot
)

// Fault is what happens once, at a Point.
type Fault struct {
	Point Point
	Kind  FaultKind
	Delay time.Duration
}

// NewWire starts a Wire before target, a host:port. role names the connections of a client by their address, once its
// first byte has come. The first connection of a stage and a role is the session of that name; others pass unnoticed.
func NewWire(target string, config *tls.Config, role func(client net.Addr) string) (*Wire, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w := &Wire{listener: l, target: target, tls: config, role: role, sessions: map[string]bool{}, links: map[*wireLink]bool{}, counts: map[Point]int{}}
	w.wg.Go(w.accept)
	return w, nil
}

// Addr is the proxy's host:port.
func (w *Wire) Addr() string { return w.listener.Addr().String() }

// Stage begins a stage: sessions that begin from now on are of this stage.
func (w *Wire) Stage(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stage = name
}

// Stopping makes all further messages belong to a stage of that name, in the sessions that are open, too.
func (w *Wire) Stopping() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopping = true
}

// Arm has f happen when its Point comes.
func (w *Wire) Arm(f Fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = f
}

// Fired is when the fault happened; zero before.
func (w *Wire) Fired() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fired
}

// Points are those that have passed, in order.
func (w *Wire) Points() []Point {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Point(nil), w.seen...)
}

// Break resets the open connections of a role.
func (w *Wire) Break(role string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for l := range w.links {
		if l.role == role {
			l.reset()
		}
	}
}

// Close ends the proxy and every connection, and waits for its goroutines.
func (w *Wire) Close() {
	w.mu.Lock()
	w.closed = true
	for l := range w.links {
		l.end()
	}
	w.mu.Unlock()
	w.listener.Close()
	w.wg.Wait()
}

func (w *Wire) accept() {
	for {
		client, err := w.listener.Accept()
		if err != nil {
			return
		}
		l := &wireLink{wire: w, client: client, closed: make(chan struct{})}
		w.mu.Lock()
		w.links[l] = true
		if w.closed {
			l.end()
		}
		w.mu.Unlock()
		w.wg.Go(func() {
			_ = l.serve()
			l.end()
			w.mu.Lock()
			delete(w.links, l)
			w.mu.Unlock()
		})
	}
}

// wireLink is one proxied connection.
type wireLink struct {
	wire   *Wire
	client net.Conn // the socket
	closed chan struct{}
	ends   sync.Once

	mu     sync.Mutex
	server net.Conn
	silent bool
	forgot bool      // silent, and the next message of the client draws a RST
	until  time.Time // everything is held back until then

	// Owned by w.mu.
	role, session string
	last          string // the client's last message
}

func (l *wireLink) end() {
	l.ends.Do(func() {
		close(l.closed)
		l.client.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.server != nil {
			l.server.Close()
		}
	})
}

func (l *wireLink) reset() {
	_ = l.client.(*net.TCPConn).SetLinger(0)
	l.end()
}

var errEnded = errors.New("the connection was ended")

// pass writes a message to where it goes, and lets happen what is to happen at its Point.
func (l *wireLink) pass(message string, data []byte, to io.Writer) error {
	l.mu.Lock()
	silent, forgot, wait := l.silent, l.forgot, time.Until(l.until)
	l.mu.Unlock()
	if wait > 0 {
		select {
		case <-time.After(wait):
		case <-l.closed:
		}
	}
	if forgot && strings.HasPrefix(message, "→") {
		l.reset()
		return errEnded
	}
	if silent {
		return nil
	}
	kind, delay := l.wire.note(l, message)
	if kind == Torn {
		data = data[:len(data)/2]
	}
	if _, err := to.Write(data); err != nil {
		return err
	}
	switch kind {
	case Cut, Torn:
		l.end()
		return errEnded
	case Reset:
		l.reset()
		return errEnded
	case Silence, Forget, Delay:
		l.mu.Lock()
		l.silent, l.forgot, l.until = kind != Delay, kind == Forget, time.Now().Add(delay)
		l.mu.Unlock()
	}
	return nil
}

// note takes down a message, and says what is to happen at it.
func (w *Wire) note(l *wireLink, message string) (kind FaultKind, delay time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l.role == "" {
		l.role = w.role(l.client.RemoteAddr())
		if name := w.stage + " " + l.role; !w.sessions[name] {
			w.sessions[name], l.session = true, name
		}
	}
	if strings.HasPrefix(message, "→") {
		l.last = message
	} else if message == "← ReadyForQuery" {
		message += " after " + strings.TrimPrefix(l.last, "→ ")
	}
	if l.session == "" {
		return "", 0
	}
	p := Point{Session: l.session, Message: message}
	if w.stopping {
		p.Session = "stop " + l.role
	}
	w.counts[p]++
	p.Nth = w.counts[Point{Session: p.Session, Message: message}]
	w.seen = append(w.seen, p)
	if w.fired.IsZero() && p == w.fault.Point {
		w.fired = time.Now()
		return w.fault.Kind, w.fault.Delay
	}
	return "", 0
}

// serve connects the client to the server and follows both ways.
func (l *wireLink) serve() error {
	var client io.ReadWriter = l.client
	packet, err := readPacket(client, false)
	if err != nil {
		return err
	}
	if startCode(packet) == 80877103 { // an SSLRequest
		if err := l.pass("→ SSLRequest", nil, io.Discard); err != nil {
			return err
		}
		answer := "N"
		if l.wire.tls != nil {
			answer = "S"
		}
		if err := l.pass("← SSLAnswer", []byte(answer), client); err != nil {
			return err
		}
		if l.wire.tls != nil {
			records := &recordConn{Conn: l.client, link: l}
			secured := tls.Server(records, l.wire.tls)
			if err := secured.Handshake(); err != nil {
				return err
			}
			records.done = true
			client = secured
		}
		if packet, err = readPacket(client, false); err != nil {
			return err
		}
	}
	server, err := net.DialTimeout("tcp", l.wire.target, 5*time.Second)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.server = server
	l.mu.Unlock()
	select {
	case <-l.closed:
		server.Close()
	default:
	}
	name := "→ StartupMessage"
	if startCode(packet) == 80877102 {
		name = "→ CancelRequest"
	}
	if err := l.pass(name, packet, server); err != nil {
		return err
	}
	var back sync.WaitGroup
	back.Go(func() {
		_ = l.follow(bufio.NewReader(server), client, nameServer)
		l.end()
	})
	err = l.follow(bufio.NewReader(client), server, nameClient)
	l.end()
	back.Wait()
	return err
}

// follow passes messages on, one by one.
func (l *wireLink) follow(from io.Reader, to io.Writer, name func([]byte) string) error {
	for {
		packet, err := readPacket(from, true)
		if err != nil {
			return err
		}
		if err := l.pass(name(packet), packet, to); err != nil {
			return err
		}
	}
}

// readPacket reads a message with its length, and its type if it has one.
func readPacket(r io.Reader, typed bool) ([]byte, error) {
	head := make([]byte, 4, 64)
	if typed {
		head = head[:5]
	}
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[len(head)-4:])
	if n < 4 || n > 1<<24 {
		return nil, fmt.Errorf("a message of %d bytes", n)
	}
	packet := append(head, make([]byte, n-4)...)
	_, err := io.ReadFull(r, packet[len(head):])
	return packet, err
}

// startCode is the code in a first packet: a version, or a request.
func startCode(packet []byte) uint32 {
	if len(packet) < 8 {
		return 0
	}
	return binary.BigEndian.Uint32(packet[4:])
}

var serverNames = map[byte]string{
	'A': "Notification", 'C': "CommandComplete", 'D': "DataRow", 'E': "Error", 'I': "EmptyQueryResponse", 'K': "BackendKeyData", 'N': "Notice",
	'S': "ParameterStatus", 'T': "RowDescription", 'Z': "ReadyForQuery",
}

func nameServer(packet []byte) string {
	if packet[0] == 'R' {
		methods := map[byte]string{0: "Ok", 3: "CleartextPassword", 10: "SASL", 11: "SASLContinue", 12: "SASLFinal"}
		if name, ok := methods[packet[8]]; ok {
			return "← Authentication" + name
		}
	}
	if name, ok := serverNames[packet[0]]; ok {
		return "← " + name
	}
	return fmt.Sprintf("← %q", packet[0])
}

func nameClient(packet []byte) string {
	switch packet[0] {
	case 'Q':
		verb, _, _ := bytes.Cut(bytes.Trim(packet[5:], "\x00;"), []byte(" "))
		if len(verb) == 0 {
			return "→ Query ping"
		}
		return "→ Query " + strings.ToUpper(string(verb))
	case 'p':
		return "→ PasswordOrSASL"
	case 'X':
		return "→ Terminate"
	}
	return fmt.Sprintf("→ %q", packet[0])
}

// recordConn is the client's socket during a TLS handshake: it follows its records.
type recordConn struct {
	net.Conn
	link *wireLink
	rest []byte // of a record that was read
	done bool
}

var recordNames = map[byte]string{20: "ChangeCipherSpec", 21: "Alert", 22: "Handshake", 23: "Encrypted"}

func (c *recordConn) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		if c.done {
			return c.Conn.Read(p)
		}
		head := make([]byte, 5)
		if _, err := io.ReadFull(c.Conn, head); err != nil {
			return 0, err
		}
		record := append(head, make([]byte, binary.BigEndian.Uint16(head[3:]))...)
		if _, err := io.ReadFull(c.Conn, record[5:]); err != nil {
			return 0, err
		}
		var whole bytes.Buffer
		if err := c.link.pass("→ TLS "+recordNames[record[0]], record, &whole); err != nil {
			return 0, err
		}
		c.rest = whole.Bytes() // nothing, if the network is silent
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *recordConn) Write(p []byte) (int, error) {
	if c.done {
		return c.Conn.Write(p)
	}
	for rest := p; len(rest) >= 5; {
		n := min(5+int(binary.BigEndian.Uint16(rest[3:])), len(rest))
		if err := c.link.pass("← TLS "+recordNames[rest[0]], rest[:n], c.Conn); err != nil {
			return 0, err
		}
		rest = rest[n:]
	}
	return len(p), nil
}
