"""List the hops of messages, requests and stops: the functions that they are passed through.

A hop is a function of the package on the way from the first byte to the last (call_recorder.py).
The relay is a process with real sockets and a real Redis. Knows no function of the relay by name.

`python -m tests.support.hops` prints the lists; `--write` puts them into the architecture page.
"""

import argparse
import asyncio
import json
import os
import re
import tempfile
import textwrap
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from signal import SIGTERM
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.support.brokers import Broker, RedisBroker
from tests.support.programs import ANY_REDIS, needed
from tests.support.raw_client import TEXT, frame, upgrade_request
from tests.support.relay_process import ROOT, RelayProcess, path_of

PAGE = ROOT / "docs" / "explanation" / "architecture.md"
BLOCK = re.compile(r"^## Hops\n.*?^```text\n(.*?)^```\n", re.DOTALL | re.MULTILINE)

CHANNEL = "hops"
MARK = b"the message whose way is recorded"
ATTEMPTS = 20
"""Recordings of a way at most, until two in a row agree. A heartbeat at the same moment may carry
the message along: then a part of the way is another one, or is not known."""


class Turn(NamedTuple):
    """One callback of the event loop on a way.

    Attributes:
        resumed: the coroutines that it resumed: they return the value.
        functions: those that pass it on.
    """

    resumed: Sequence[str]
    functions: Sequence[str]


Way = Sequence[Turn]


class Write(NamedTuple):
    """A write of the relay to a socket, and its way."""

    port: int
    data: bytes
    way: Way


class RecordedRelay:
    """A relay whose calls are recorded. It uses Redis.

    Args:
        directory: for its settings.
        broker: the Redis.
    """

    def __init__(self, directory: Path, broker: Broker) -> None:
        settings = {"backplane": {"url": broker.url}, "shutdown": {"spread_s": 0}}
        control, self._control = os.pipe()
        self._result, result = os.pipe()
        self._inherited = control, result
        module = ("tests.support.call_recorder", str(control), str(result))
        self.process = RelayProcess(directory, settings, module=module, descriptors=self._inherited)
        self._broker_port = broker.port

    def __enter__(self) -> Self:
        self.process.launch()
        for descriptor in self._inherited:
            os.close(descriptor)
        self.process.block_until_logged("ready")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.end()
        os.close(self._control)
        os.close(self._result)

    async def way(self, act: Callable[[], Awaitable[int]], last: bytes) -> Way:
        """Return the way from an act to the write of the bytes `last`.

        Args:
            act: causes the write, awaits its bytes, and returns the port that receives them.
            last: a part of the bytes.
        """
        before: Way = []
        for _ in range(ATTEMPTS):
            way = await self.way_once(act, last)
            if way[0].functions and way == before:
                return way
            before = way
        raise AssertionError(f"no two recordings of {ATTEMPTS} agree")

    async def way_once(self, act: Callable[[], Awaitable[int]], last: bytes) -> Way:
        """Return the same of an act that can't be repeated."""
        await self._command("start")
        port = await act()
        writes = await self._command("stop")
        way = _way_to(writes, port, last)
        if way[0].functions:
            return way
        # Bytes from the broker: the way to it goes before.
        return [*_way_to(writes, self._broker_port, MARK), *way]

    async def _command(self, line: str) -> list[Write]:
        os.write(self._control, f"{line}\n".encode())
        with os.fdopen(self._result, closefd=False) as results:
            found: list[dict[str, Any]] = json.loads(await asyncio.to_thread(results.readline))
        return [
            Write(
                each["port"],
                each["data"].encode("latin-1"),
                [Turn(turn["resumed"], turn["functions"]) for turn in each["way"]],
            )
            for each in found
        ]


def _way_to(writes: Sequence[Write], port: int, part: bytes) -> Way:
    """Return the way to the first write to a port that contains these bytes."""
    ways = (write.way for write in writes if write.port == port and part in write.data)
    return next(ways, [Turn([], [])])


async def record_all(directory: Path) -> str:
    """Return the text of the page's block: each way with its hops, a turn a line."""
    async with RedisBroker(needed(*ANY_REDIS), directory / "redis") as broker:
        with RecordedRelay(directory, broker) as relay:
            message = await _message(relay)
            ways = {
                "a message through Redis": (message, frozenset[str]()),
                "a POST": (await _post(relay), _of_broker(message)),
                "an event stream until its first message": (await _stream(relay), frozenset()),
                "a refused handshake": (await _refusal(relay), frozenset()),
                "a drain until the close frame": (await _drain(relay), frozenset()),
            }
    return "\n".join(_text(title, way, without) for title, (way, without) in ways.items())


def _of_broker(message: Way) -> frozenset[str]:
    """Return the functions that pass a message to the broker, and those that return it."""
    reading = next(index for index, turn in enumerate(message) if index and not turn.functions)
    return frozenset({*message[reading - 1].functions, *message[reading + 1].resumed})


async def _message(relay: RecordedRelay) -> Way:
    async with (
        relay.process.raw_client(CHANNEL) as publisher,
        relay.process.raw_client(CHANNEL) as subscriber,
    ):

        async def publish() -> int:
            await publisher.send(frame(TEXT, MARK))
            await publisher.read_message()
            await subscriber.read_message()
            return int(subscriber.socket.getsockname()[1])

        return await relay.way(publish, MARK)


async def _exchange(relay: RecordedRelay, request: bytes, last: bytes) -> int:
    """Send a request on a new connection, and read up to `last`; return its local port."""
    received = b""
    async with await relay.process.connect_tcp() as client:
        await client.send(request)
        while last not in received:
            received += await client.read_chunk()
        return int(client.socket.getsockname()[1])


async def _post(relay: RecordedRelay) -> Way:
    request = (
        f"POST {path_of(CHANNEL)} HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
        f"Content-Length: {len(MARK)}\r\n\r\n"
    ).encode() + MARK
    last = b" 202 Accepted\r\n"
    return await relay.way(lambda: _exchange(relay, request, last), last)


async def _stream(relay: RecordedRelay) -> Way:
    """The first message is the latest one of the history."""
    request = f"GET {path_of(CHANNEL)}/events?history=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    return await relay.way(lambda: _exchange(relay, request.encode(), MARK), MARK)


async def _refusal(relay: RecordedRelay) -> Way:
    request, last = upgrade_request(path_of("%20")), b"HTTP/1.1 404"
    return await relay.way(lambda: _exchange(relay, request, last), last)


async def _drain(relay: RecordedRelay) -> Way:
    async with relay.process.raw_client(CHANNEL) as client:

        async def stop() -> int:
            relay.process.signal(SIGTERM)
            await client.read_close_frame()
            return int(client.socket.getsockname()[1])

        return await relay.way_once(stop, b"draining")


def _text(title: str, way: Way, without: frozenset[str]) -> str:
    turns = list(_hops_by_turn(way, without))
    lines = [f"{title}: {sum(map(len, turns))}"]
    for number, hops in enumerate(turns, 1):
        lines += textwrap.wrap(
            ", ".join(hops), 110, initial_indent=f"{number:3}  ", subsequent_indent=" " * 5
        )
    return "\n".join([*lines, ""])


def _hops_by_turn(way: Way, without: frozenset[str]) -> Iterator[list[str]]:
    """Yield the hops of each turn, each function once."""
    seen = set(without)
    for turn in way:
        names = dict.fromkeys([*turn.resumed, *turn.functions])
        if hops := [name for name in names if name not in seen]:
            yield hops
        seen.update(names)


def listed() -> str:
    """Return the lists of the page."""
    page = PAGE.read_text()
    return page[_block_of(page)]


def _block_of(page: str) -> slice:
    found = BLOCK.search(page)
    assert found is not None, f"no lists of hops in {PAGE}"
    return slice(*found.span(1))


def main() -> None:
    """Print the lists, or write them to the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into the page")
    is_written = parser.parse_args().write
    with tempfile.TemporaryDirectory() as directory:
        text = asyncio.run(record_all(Path(directory)))
    print(text, end="")
    if is_written:
        page = PAGE.read_text()
        block = _block_of(page)
        PAGE.write_text(page[: block.start] + text + page[block.stop :])


if __name__ == "__main__":
    main()
