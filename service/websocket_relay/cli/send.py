"""Send messages to a channel, and see to it that they were relayed."""

import asyncio
import os
import sys
import threading
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from websocket_relay.cancellation import cancel_until_done
from websocket_relay.cli.common import (
    EPILOG,
    UsageError,
    add_patience,
    add_target,
    note,
    notes_of,
    run,
    token_of,
    trust_of,
)
from websocket_relay.client import (
    MAX_MESSAGE_BYTES,
    RejectedError,
    Relay,
    UnavailableError,
    UnconfirmedError,
)

DESCRIPTION = """\
Send one message to a channel, or every line of standard input.

It ends with 0 only when all of it was relayed. It comes back by itself when the connection is lost
or the relay restarts, and sends what was not relayed. Where a connection breaks off, nobody may
know of the last messages whether they were: those are not sent again, and it ends with 1 and says
how many. With --repeat they are sent again, so some may be relayed twice."""

EXAMPLES = """\
examples:
  websocket-relay send ws://localhost:8443/channels/news "hello, everybody"
  tail -f log.txt | websocket-relay send ws://localhost:8443/channels/log
  websocket-relay send --binary picture.png ws://localhost:8443/channels/pictures

"""

PATIENCE_S = 30.0
CHUNK_BYTES = 65_536


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "send",
        help="send a message, or every line of standard input",
        description=DESCRIPTION,
        epilog=EXAMPLES + EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_target(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "message", nargs="?", metavar="MESSAGE", help="what to send (default: every line of input)"
    )
    what.add_argument(
        "--binary",
        type=Path,
        metavar="FILE",
        help="send a file as one binary message; -: the input",
    )
    parser.add_argument(
        "--repeat", action="store_true", help="send again what may or may not have been relayed"
    )
    add_patience(parser, f"at the first attempt when it starts, then {PATIENCE_S:g}")
    parser.set_defaults(run=lambda options: run(send, options))


def send(options: Namespace) -> Coroutine[Any, Any, int]:
    """Read what there is to send; return what sends it and waits until it was relayed."""
    return _send(options, _message(options))


async def _send(options: Namespace, message: str | bytes | None) -> int:
    patience_s = options.patience
    relay = Relay(
        options.url,
        token=token_of(options),
        ssl=trust_of(options),
        listens=False,
        repeats=options.repeat,
        start_patience_s=patience_s or 0.0,
        patience_s=PATIENCE_S if patience_s is None else patience_s,
        on_event=notes_of(options),
    )
    try:
        async with relay:
            await (_send_lines(relay) if message is None else relay.send(message))
            await relay.flush()
    except asyncio.CancelledError:
        if relay.unconfirmed:
            note(str(UnconfirmedError(relay.unconfirmed, "interrupted")))
        raise
    except (UnavailableError, RejectedError) as error:
        if not relay.unconfirmed:
            raise
        raise UnconfirmedError(relay.unconfirmed, str(error)) from None
    return 0


def _message(options: Namespace) -> str | bytes | None:
    """Return the one message to send; None: it is lines."""
    if options.binary is not None:
        return _content(options.binary)
    if options.message is None:
        return None
    try:
        text: str = options.message
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("the message is not UTF-8; --binary sends any bytes") from None
    return text


def _content(file: Path) -> bytes:
    pieces: list[bytes] = []
    size = 0
    source: int | Path = sys.stdin.fileno() if file == Path("-") else file
    with open(source, "rb", buffering=0) as opened:
        while piece := opened.read(CHUNK_BYTES):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_MESSAGE_BYTES:
                raise UsageError(f"{file}: a message has at most {MAX_MESSAGE_BYTES:,} bytes")
    return b"".join(pieces)


async def _send_lines(relay: Relay) -> None:
    """Send standard input; end early when the relay is lost while nobody types."""
    reading = asyncio.create_task(_read_and_send(relay))
    failing = asyncio.create_task(_hear_nothing(relay))
    try:
        await asyncio.wait({reading, failing}, return_when=asyncio.FIRST_COMPLETED)
        await (reading if reading.done() else failing)
    finally:
        await cancel_until_done(reading, failing)


async def _hear_nothing(relay: Relay) -> None:
    async for _ in relay:
        pass  # it listens to nothing: this ends when the relay is lost


async def _read_and_send(relay: Relay) -> None:
    number = 0
    async for chunk in _input():
        for line in chunk:
            number += 1
            try:
                text = _text(line)
            except ValueError as error:
                await relay.flush()
                raise UsageError(f"line {number} {error}") from None
            await relay.send(text)


def _text(line: bytes) -> str:
    if len(line) > MAX_MESSAGE_BYTES:
        raise ValueError(f"has more than {MAX_MESSAGE_BYTES:,} bytes")
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8; --binary sends any bytes") from None


async def _input() -> AsyncIterator[list[bytes]]:
    """Read lines of standard input, as many at a time as there are.

    A thread of its own reads: asyncio can't wait for files. At exit Python does not wait for a
    daemon, which may wait for the keyboard for ever.
    """
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[list[bytes] | OSError | None] = asyncio.Queue()
    wanted = threading.Semaphore(0)

    def hand_over(chunk: list[bytes] | OSError | None) -> None:
        wanted.acquire()
        with suppress(RuntimeError):  # the loop has ended, and so will this thread
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)

    def read() -> None:
        try:
            for lines in _lines(sys.stdin.fileno()):
                hand_over(lines)
        except OSError as error:
            hand_over(error)
        else:
            hand_over(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        wanted.release()
        chunk = await chunks.get()
        if isinstance(chunk, OSError):
            raise chunk
        if chunk is None:
            return
        yield chunk


def _lines(descriptor: int) -> Iterator[list[bytes]]:
    """Read lines, those of one read at a time; end with one that is too long for a message."""
    begun, size = [b""], 0
    while size <= MAX_MESSAGE_BYTES and (chunk := os.read(descriptor, CHUNK_BYTES)):
        more, *others = chunk.split(b"\n")
        begun.append(more)
        size += len(more)
        if others:
            *lines, rest = [b"".join(begun), *others]
            begun, size = [rest], len(rest)
            yield [line.removesuffix(b"\r") for line in lines]
    if size:
        yield [b"".join(begun)]
