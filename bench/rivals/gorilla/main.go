// The classic hub on gorilla/websocket: one hub, and per client a reader, a writer and a queue.
// Knows nothing of the relay.
//
// usage: gorilla PORT [deflate | CERT KEY]    deflate: with the library's own compression
package main

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/gorilla/websocket"
)

// As in gorilla's own chat example. There a client with a full queue is dropped; here the hub waits
// for it, since a server that drops what it is asked to deliver would win by losing.
const queueMessages = 256

type message struct {
	kind int
	data []byte
}

type client struct {
	conn *websocket.Conn
	send chan message
}

type hub struct {
	clients    map[*client]bool
	broadcast  chan message
	register   chan *client
	unregister chan *client
}

func (h *hub) run() {
	for {
		select {
		case c := <-h.register:
			h.clients[c] = true
		case c := <-h.unregister:
			delete(h.clients, c)
			close(c.send)
		case m := <-h.broadcast:
			for c := range h.clients {
				c.send <- m
			}
		}
	}
}

func (c *client) readPump(h *hub) {
	defer func() {
		h.unregister <- c
		c.conn.Close()
	}()
	for {
		kind, data, err := c.conn.ReadMessage()
		if err != nil {
			return
		}
		h.broadcast <- message{kind, data}
	}
}

func (c *client) writePump() {
	for m := range c.send {
		if c.conn.WriteMessage(m.kind, m.data) != nil {
			break
		}
	}
	c.conn.Close() // the reader then unregisters, which closes the queue
	for range c.send {
		continue // the hub must not wait for a client that is gone
	}
}

func main() {
	h := &hub{map[*client]bool{}, make(chan message), make(chan *client), make(chan *client)}
	go h.run()
	upgrader := websocket.Upgrader{
		ReadBufferSize:    1024,
		WriteBufferSize:   1024,
		EnableCompression: len(os.Args) == 3,
	}
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		conn, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		c := &client{conn, make(chan message, queueMessages)}
		h.register <- c
		go c.writePump()
		go c.readPump(h)
	})
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("ready")
	if len(os.Args) == 4 {
		log.Fatal(http.ServeTLS(listener, nil, os.Args[2], os.Args[3]))
	}
	log.Fatal(http.Serve(listener, nil))
}
