"""The command `send`: publish messages, and wait until they are acknowledged. No server code."""

import asyncio
import os
import sys
import threading
from argparse import Namespace
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from websocket_relay.cancellation import cancel_until_done
from websocket_relay.cli.common import (
    UsageError,
    add_command,
    add_reconnect_arguments,
    event_printer,
    new_client,
    print_notice,
    run_with_url,
)
from websocket_relay.client import Relay, UnconfirmedError
from websocket_relay.client.connection import MAX_MESSAGE_BYTES
from websocket_relay.outcomes import RelayError

DESCRIPTION = """\
Publish one message, or every line of standard input. Each message is published exactly once.

When the connection is lost or the relay restarts, the command reconnects and sends what the relay
has not acknowledged again, and no subscriber receives it twice. The exit status is 0 only if every
message was acknowledged. Where the relay no longer knows what became of a message, it is
unconfirmed: the exit status is 1, and the last line has the number of such messages."""

EXAMPLES = """\
examples:
  websocket-relay send --channel news ws://localhost:8443 "hello"
  tail -f log.txt | websocket-relay send --channel log ws://localhost:8443
  websocket-relay send --binary picture.png --channel pictures ws://localhost:8443

"""

PATIENCE_S = 30.0
CHUNK_BYTES = 65_536
MAX_IN_FLIGHT = 1_000
"""Messages that are sent before the first of them is answered."""


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands, "send", "send a message, or every line of standard input", DESCRIPTION, EXAMPLES
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "message",
        nargs="?",
        metavar="MESSAGE",
        help="the text to send (default: every line of standard input)",
    )
    source.add_argument(
        "--binary",
        type=Path,
        metavar="FILE",
        help="send a file as one binary message; -: standard input",
    )
    parser.add_argument(
        "--channel", metavar="NAME", help="name of the channel (default: that of the URL)"
    )
    add_reconnect_arguments(parser, f"after one attempt at the start, later {PATIENCE_S:g}")

    def run_send(options: Namespace) -> int:
        def shift(message: str) -> bool:
            is_free = options.message is None and options.binary is None
            if is_free:
                options.message = message
            return is_free

        return run_with_url(parser, options, send, shift)

    parser.set_defaults(run=run_send)


def send(options: Namespace) -> Coroutine[Any, Any, int]:
    """Read the message; return the coroutine that publishes it and waits for the answer."""
    return _send(options, _message(options))


async def _send(options: Namespace, message: str | bytes | None) -> int:
    relay = new_client(options, event_printer(options), patience_s=PATIENCE_S)
    publishes = Publishes(relay, options.channel or relay.channel)
    try:
        async with relay:
            await (_send_lines(relay, publishes) if message is None else publishes.start(message))
            await publishes.settle()
    except asyncio.CancelledError:
        if publishes.in_flight:
            print_notice(f"{_count(publishes.in_flight)} unconfirmed: interrupted")
        raise
    except RelayError:
        await publishes.settle()
        publishes.raise_failures()
        raise
    publishes.raise_failures()
    return 0


class Publishes:
    """The messages of this command: those in flight, and those that failed.

    Args:
        relay: publishes them.
        channel: the name of the channel.

    Attributes:
        has_failures: set when a message was not acknowledged.
    """

    def __init__(self, relay: Relay, channel: str) -> None:
        self.has_failures = asyncio.Event()
        self._relay = relay
        self._channel = channel
        self._tasks: set[asyncio.Task[str]] = set()
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._failures: list[RelayError] = []

    async def start(self, message: str | bytes) -> None:
        """Publish a message, after those that were started before."""
        await self._slots.acquire()
        task = asyncio.create_task(self._relay.publish(self._channel, message))
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    @property
    def in_flight(self) -> int:
        """The number of messages that are not answered."""
        return len(self._tasks)

    async def settle(self) -> None:
        """Wait until no message is in flight."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def raise_failures(self) -> None:
        """Raise an error with the number of messages that failed, if any did."""
        unconfirmed = [each for each in self._failures if isinstance(each, UnconfirmedError)]
        refused = [each for each in self._failures if not isinstance(each, UnconfirmedError)]
        reason = f"{refused[0]}; {_count(len(refused))} not published" if refused else ""
        if unconfirmed:
            reason = reason or str(unconfirmed[0])
            raise UnconfirmedError(f"{_count(len(unconfirmed))} unconfirmed: {reason}")
        if refused:
            raise type(refused[0])(reason)

    def _on_done(self, task: "asyncio.Task[str]") -> None:
        self._tasks.discard(task)
        self._slots.release()
        if not task.cancelled() and isinstance(error := task.exception(), RelayError):
            self._failures.append(error)
            self.has_failures.set()


def _count(messages: int) -> str:
    return "1 message" if messages == 1 else f"{messages:,} messages"


def _message(options: Namespace) -> str | bytes | None:
    """Return the message to send; None: the lines of standard input."""
    if options.binary is not None:
        return _file_content(options.binary)
    if options.message is None:
        return None
    try:
        text: str = options.message
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("the message is not UTF-8; --binary sends any bytes") from None
    return text


def _file_content(file: Path) -> bytes:
    chunks: list[bytes] = []
    size = 0
    path: int | Path = sys.stdin.fileno() if file == Path("-") else file
    with open(path, "rb", buffering=0) as opened:
        while chunk := opened.read(CHUNK_BYTES):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_MESSAGE_BYTES:
                raise UsageError(f"{file}: a message has at most {MAX_MESSAGE_BYTES:,} bytes")
    return b"".join(chunks)


async def _send_lines(relay: Relay, publishes: Publishes) -> None:
    """Publish standard input; end at the first failure, even while no input arrives."""
    reading = asyncio.create_task(_read_and_publish(publishes))
    closed = asyncio.create_task(relay.wait_closed())
    failed = asyncio.create_task(publishes.has_failures.wait())
    tasks: tuple[asyncio.Task[Any], ...] = (reading, closed, failed)
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await cancel_until_done(*tasks)


async def _read_and_publish(publishes: Publishes) -> None:
    line_number = 0
    async for lines in _input_lines():
        for line in lines:
            line_number += 1
            try:
                text = _decoded(line)
            except ValueError as error:
                await publishes.settle()
                raise UsageError(f"line {line_number} {error}") from None
            await publishes.start(text)


def _decoded(line: bytes) -> str:
    if len(line) > MAX_MESSAGE_BYTES:
        raise ValueError(f"has more than {MAX_MESSAGE_BYTES:,} bytes")
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8; --binary sends any bytes") from None


async def _input_lines() -> AsyncIterator[list[bytes]]:
    """Yield the lines of standard input, all that are available at a time.

    A thread reads them: asyncio can't wait for files. It is a daemon thread, because Python would
    wait for any other at exit, and a read from the keyboard may never return.
    """
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[list[bytes] | OSError | None] = asyncio.Queue()
    requests = threading.Semaphore(0)

    def hand_over(chunk: list[bytes] | OSError | None) -> None:
        requests.acquire()
        with suppress(RuntimeError):  # the loop is closed: the process exits
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)

    def read() -> None:
        try:
            for lines in _read_lines(sys.stdin.fileno()):
                hand_over(lines)
        except OSError as error:
            hand_over(error)
        else:
            hand_over(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        requests.release()
        chunk = await chunks.get()
        if isinstance(chunk, OSError):
            raise chunk
        if chunk is None:
            return
        yield chunk


def _read_lines(descriptor: int) -> Iterator[list[bytes]]:
    """Yield the lines of each read; stop after a line that is too long for a message."""
    partial, size = [b""], 0
    while size <= MAX_MESSAGE_BYTES and (chunk := os.read(descriptor, CHUNK_BYTES)):
        head, *others = chunk.split(b"\n")
        partial.append(head)
        size += len(head)
        if others:
            *lines, rest = [b"".join(partial), *others]
            partial, size = [rest], len(rest)
            yield [line.removesuffix(b"\r") for line in lines]
    if size:
        yield [b"".join(partial)]
