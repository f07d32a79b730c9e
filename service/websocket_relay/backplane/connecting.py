"""Connect to a server of a broker in time. Knows no broker's protocol."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from websocket_relay.backplane.stream import BrokerError
from websocket_relay.backplane.timings import Timings
from websocket_relay.cancellation import Deadline


async def connect_in_time(
    host: str,
    port: int,
    connect: Callable[[], Coroutine[Any, Any, None]],
    timings: Timings,
    *,
    path: str = "",
) -> None:
    """Resolve a name, then connect to it.

    A library resolves the name again; most resolvers then know it. Where they do not, it takes
    about as long once more, so the second deadline includes that time.

    Args:
        host, port: of the server; an empty host: there is no name to resolve.
        connect: opens the connection, by the name.
        timings: the time limits.
        path: of the Unix socket, if the host is empty.

    Raises:
        BrokerError: a deadline has passed, or the name does not exist or is malformed.
    """
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    if host:
        try:
            async with Deadline(timings.resolve_timeout_s):
                await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except TimeoutError:
            raise BrokerError(f"{host}: the name was not resolved in time") from None
        except OSError as error:
            raise BrokerError(f"{host}: {error.strerror}") from None
        except UnicodeError:  # an empty label, or one of more than 63 characters
            raise BrokerError(f"{host}: not the name of a host") from None
    try:
        async with Deadline(loop.time() - started_at + timings.connect_timeout_s):
            await connect()
    except TimeoutError:
        raise BrokerError(f"{path or f'{host}:{port}'}: not connected in time") from None
