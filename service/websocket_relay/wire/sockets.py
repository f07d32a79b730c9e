"""Use the socket of a transport beside it, for what uvloop's transports make dear.

Knows no protocol.
"""

import asyncio
import socket


def socket_of(transport: asyncio.Transport) -> socket.SocketType:
    """Return an object of the transport's socket that can send.

    It must be detached before the transport closes the descriptor: in `connection_lost`.
    """
    known = transport.get_extra_info("socket")
    return socket.SocketType(known.family, known.type, known.proto, known.fileno())


def peer_of(transport: asyncio.Transport) -> tuple[str, int] | None:
    """Return the address of the peer; None if it has disconnected, or has none.

    uvloop's transports would keep it: 150 bytes for each connection.
    """
    connected = socket_of(transport)
    try:
        name = connected.getpeername()
    except OSError:
        return None
    finally:
        connected.detach()
    return (name[0], name[1]) if isinstance(name, tuple) else None
