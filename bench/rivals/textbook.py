"""Broadcast as FastAPI's documentation teaches it: the baseline. Knows nothing of the relay.

usage: textbook.py PORT
"""

import sys

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect


class ConnectionManager:
    """Keep the connected clients and send to one after another."""

    def __init__(self) -> None:
        self.active_connections: list[WebSocket] = []

    async def connect(self, websocket: WebSocket) -> None:
        """Accept a client."""
        await websocket.accept()
        self.active_connections.append(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        """Forget a client that left."""
        self.active_connections.remove(websocket)

    async def broadcast(self, message: str) -> None:
        """Send to every client; the list is copied, for clients come and go meanwhile."""
        for connection in list(self.active_connections):
            try:
                await connection.send_text(message)
            except (RuntimeError, WebSocketDisconnect):
                continue  # it left during the broadcast


app = FastAPI()
manager = ConnectionManager()


@app.websocket("/")
async def relay(websocket: WebSocket) -> None:
    """Send the messages of this client to all."""
    await manager.connect(websocket)
    try:
        while True:
            await manager.broadcast(await websocket.receive_text())
    except WebSocketDisconnect:
        manager.disconnect(websocket)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
