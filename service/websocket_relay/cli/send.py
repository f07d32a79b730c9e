"""The command `send`: publish messages, and wait until they are relayed. Knows no server code."""

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
    print_notice,
    run,
    tls_context,
    token_source,
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

The exit status is 0 only if every message was relayed. When the connection is lost or the relay
restarts, the command reconnects and sends the messages that were not relayed. A message that may or
may not have been relayed is unconfirmed: it is not sent again, the exit status is 1, and the last
line has their number. With --repeat unconfirmed messages are sent again, so some may be relayed
twice."""

EXAMPLES = """\
examples:
  websocket-relay send ws://localhost:8443/channels/news "hello"
  tail -f log.txt | websocket-relay send ws://localhost:8443/channels/log
  websocket-relay send --binary picture.png ws://localhost:8443/channels/pictures

"""

PATIENCE_S = 30.0
CHUNK_BYTES = 65_536


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
    parser.add_argument("--repeat", action="store_true", help="send unconfirmed messages again")
    add_reconnect_arguments(parser, f"after one attempt at the start, later {PATIENCE_S:g}")
    parser.set_defaults(run=lambda options: run(send, options))


def send(options: Namespace) -> Coroutine[Any, Any, int]:
    """Read the message; return the coroutine that sends it and waits until it is relayed."""
    return _send(options, _message(options))


async def _send(options: Namespace, message: str | bytes | None) -> int:
    patience_s = options.patience
    relay = Relay(
        options.url,
        token=token_source(options),
        ssl=tls_context(options),
        uses_proxy=not options.no_proxy,
        listens=False,
        repeats=options.repeat,
        start_patience_s=patience_s or 0.0,
        patience_s=PATIENCE_S if patience_s is None else patience_s,
        on_event=event_printer(options),
    )
    try:
        async with relay:
            await (_send_lines(relay) if message is None else relay.send(message))
            await relay.flush()
    except asyncio.CancelledError:
        if relay.unconfirmed:
            print_notice(str(UnconfirmedError(relay.unconfirmed, "interrupted")))
        raise
    except (UnavailableError, RejectedError) as error:
        if relay.unconfirmed > relay.unsent:
            raise UnconfirmedError(relay.unconfirmed, str(error)) from None
        if relay.unsent:
            messages = "1 message" if relay.unsent == 1 else f"{relay.unsent:,} messages"
            raise type(error)(f"{error}; {messages} not relayed") from None
        raise
    return 0


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


async def _send_lines(relay: Relay) -> None:
    """Send standard input; end when the relay is lost, even while no input arrives."""
    sending = asyncio.create_task(_read_and_send(relay))
    failing = asyncio.create_task(_wait_for_failure(relay))
    try:
        await asyncio.wait({sending, failing}, return_when=asyncio.FIRST_COMPLETED)
        await (sending if sending.done() else failing)
    finally:
        await cancel_until_done(sending, failing)


async def _wait_for_failure(relay: Relay) -> None:
    async for _ in relay:
        pass  # with listens=False no message arrives: the loop ends when the relay is lost


async def _read_and_send(relay: Relay) -> None:
    line_number = 0
    async for lines in _input_lines():
        for line in lines:
            line_number += 1
            try:
                text = _decoded(line)
            except ValueError as error:
                await relay.flush()
                raise UsageError(f"line {line_number} {error}") from None
            await relay.send(text)


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
