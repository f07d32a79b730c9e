// Broadcast as the documentation of `ws` shows it. Knows nothing of the relay.
// usage: node server.js PORT
'use strict';

const { WebSocket, WebSocketServer } = require('ws');

const port = Number(process.argv[2]);
const server = new WebSocketServer({
  host: '127.0.0.1',
  port,
  backlog: 4096,
  perMessageDeflate: false,
  maxPendingAutoPongs: 0, // no limit: else a stall of 60 pings ends the connection that probes it
});

server.on('connection', (client) => {
  client.on('error', () => client.terminate());
  client.on('message', (data, isBinary) => {
    for (const each of server.clients) {
      if (each.readyState === WebSocket.OPEN) each.send(data, { binary: isBinary });
    }
  });
});
server.on('listening', () => console.log('ready'));
