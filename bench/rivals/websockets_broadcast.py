"""The websockets library with its own `broadcast`, on uvloop. Knows nothing of the relay.

usage: websockets_broadcast.py PORT [deflate]    deflate: with the library's own default compression
"""

import asyncio
import sys

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

clients: set[ServerConnection] = set()


async def relay(connection: ServerConnection) -> None:
    """Send the messages of this client to all."""
    clients.add(connection)
    try:
        async for message in connection:
            broadcast(clients, message)
    finally:
        clients.remove(connection)


async def main(port: int, compression: str | None) -> None:
    """Serve until the process is ended."""
    async with serve(relay, "127.0.0.1", port, compression=compression, backlog=4096):
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), "deflate" if sys.argv[2:] else None))
