"""Open connections that send the beginning of a handshake or a request, and no more."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from tests.support.raw_client import RawClient
from tests.support.relay_process import RelayProcess

PARTIAL_CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)
"""The first bytes of a TLS handshake (RFC 8446 section 4)."""


@asynccontextmanager
async def open_connections(
    relay: RelayProcess, count: int, *starts: bytes
) -> AsyncIterator[Sequence[RawClient]]:
    """Open connections that send these starts in turn, and nothing after them."""
    async with AsyncExitStack() as stack:
        opened = []
        for number in range(count):
            raw = await stack.enter_async_context(await relay.connect_tcp())
            await raw.send(starts[number % len(starts)])
            opened.append(raw)
        yield opened
