//go:build unix

package testkit

import (
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"
)

// FakeServer answers every query with one row of text, for servers that cannot be run here. It returns its host:port.
func FakeServer(t *testing.T, row ...string) string {
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
			go answerWith(c, row)
		}
	}()
	return l.Addr().String()
}

// answerWith speaks as much of the protocol as a query without parameters needs.
func answerWith(c net.Conn, row []string) {
	defer c.Close()
	message := func(kind byte, body []byte) {
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
	message('R', []byte{0, 0, 0, 0})
	message('Z', []byte("I"))
	for {
		var kind [1]byte
		if _, err := io.ReadFull(c, kind[:]); err != nil {
			return
		}
		query, err := read()
		if err != nil || kind[0] != 'Q' {
			return
		}
		if strings.Trim(string(query), ";\x00") == "" { // lib/pq's ping
			message('I', nil)
			message('Z', []byte("I"))
			continue
		}
		columns := binary.BigEndian.AppendUint16(nil, uint16(len(row)))
		values := columns[:2:2]
		for _, v := range row {
			columns = append(columns, "x\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x19\xff\xff\xff\xff\xff\xff\x00\x00"...) // text
			values = append(binary.BigEndian.AppendUint32(values, uint32(len(v))), v...)
		}
		message('T', columns)
		message('D', values)
		message('C', []byte("SELECT 1\x00"))
		message('Z', []byte("I"))
	}
}
