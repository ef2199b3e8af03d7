//go:build unix

package testkit

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
)

// Sender sends a message of the protocol to a client.
type Sender func(kind byte, body string)

// FakeServer is for servers that cannot be run here, or cannot be made to answer so. It speaks as much of the protocol as queries
// without parameters need: for each connection it asks for what answers a query, after which it says that it is ready for the next
// one. It returns its host:port.
func FakeServer(t *testing.T, connected func(Sender) (query func(text string))) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c, connected)
		}
	}()
	return l.Addr().String()
}

func serve(c net.Conn, connected func(Sender) func(string)) {
	defer c.Close()
	send := func(kind byte, body string) {
		b := append([]byte{kind}, binary.BigEndian.AppendUint32(nil, uint32(len(body)+4))...)
		_, _ = c.Write(append(b, body...))
	}
	read := func() (body []byte, err error) {
		var length [4]byte
		if _, err = io.ReadFull(c, length[:]); err == nil {
			body = make([]byte, binary.BigEndian.Uint32(length[:])-4)
			_, err = io.ReadFull(c, body)
		}
		return body, err
	}
	if _, err := read(); err != nil { // the start-up packet
		return
	}
	send('R', "\x00\x00\x00\x00")
	send('Z', "I")
	query := connected(send)
	for {
		var kind [1]byte
		if _, err := io.ReadFull(c, kind[:]); err != nil {
			return
		}
		text, err := read()
		if err != nil || kind[0] != 'Q' {
			return
		}
		query(string(text[:len(text)-1])) // it ends in a zero
		send('Z', "I")
	}
}

// OneRow answers every query with one row of text.
func OneRow(row ...string) func(Sender) func(string) {
	return func(send Sender) func(string) {
		return func(text string) {
			if text == "" || text == ";" { // lib/pq's ping
				send('I', "")
				return
			}
			columns := binary.BigEndian.AppendUint16(nil, uint16(len(row)))
			values := columns[:2:2]
			for _, v := range row {
				columns = append(columns, "x\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x19\xff\xff\xff\xff\xff\xff\x00\x00"...) // text
				values = append(binary.BigEndian.AppendUint32(values, uint32(len(v))), v...)
			}
			send('T', string(columns))
			send('D', string(values))
			send('C', "SELECT 1\x00")
		}
	}
}
