"""The command `listen`: print the messages of a channel. Knows no server code."""

import asyncio
import base64
import json
import math
import os
import re
import stat
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from websocket_relay.cli.common import (
    add_command,
    add_reconnect_arguments,
    event_printer,
    positive_int,
    run,
    tls_context,
    token_source,
)
from websocket_relay.client import Message, Relay

DESCRIPTION = """\
Print the messages of a channel, one a line, until Ctrl-C.

When the connection is lost or the relay restarts, the command reconnects and resumes after the last
message; no message is printed twice. Text is printed as it is; on a terminal, control characters
are escaped. Binary messages are written as they are, without a line end; on a terminal, only their
size is printed. With --json every line is an object:

  {"position": "1795441056000-7-0", "text": "hello"}
  {"position": "1795441056000-8-0", "base64": "AAEC"}

and has "after_gap": true where messages before it are lost."""

EXAMPLES = """\
examples:
  websocket-relay listen ws://localhost:8443/channels/news
  websocket-relay listen --history 20 --count 20 ws://localhost:8443/channels/news
  websocket-relay listen --json --ca cert.pem wss://localhost:8443/ | jq .text

"""

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that may control a terminal. Tabs and line feeds are not among them."""


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands, "listen", "print the messages of a channel", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--since", default="", metavar="P", help="start after this position")
    start.add_argument(
        "--history",
        type=positive_int,
        default=0,
        metavar="N",
        help="start with the last N messages",
    )
    parser.add_argument(
        "--count", type=positive_int, default=0, metavar="N", help="end after N messages"
    )
    add_reconnect_arguments(parser, "after one attempt at the start, later never")
    parser.set_defaults(run=lambda options: run(listen, options))


async def listen(options: Namespace) -> int:
    """Print messages, up to --count; return the exit status."""
    write_message = _writer(options)
    relay = Relay(
        options.url,
        token=token_source(options),
        ssl=tls_context(options),
        uses_proxy=not options.no_proxy,
        since=options.since,
        history=options.history,
        start_patience_s=options.patience or 0.0,
        patience_s=math.inf if options.patience is None else options.patience,
        on_event=event_printer(options),
    )
    async with _broken_pipe_ends_it(), relay:
        remaining = options.count
        async for message in relay:
            write_message(message)
            remaining -= 1
            if remaining == 0 or not relay.waiting:
                sys.stdout.flush()
            if remaining == 0:
                break
    return 0


def _writer(options: Namespace) -> Callable[[Message], None]:
    if options.json:
        return lambda message: print(_as_json(message))
    return _write_to_terminal if sys.stdout.isatty() else _write_raw


def _as_json(message: Message) -> str:
    fields: dict[str, object] = {"position": message.position}
    if isinstance(message.data, str):
        fields["text"] = message.data
    else:
        fields["base64"] = base64.b64encode(message.data).decode()
    if message.after_gap:
        fields["after_gap"] = True
    return json.dumps(fields, ensure_ascii=False)


def _write_to_terminal(message: Message) -> None:
    if isinstance(message.data, bytes):
        print(f"[{len(message.data)} bytes]")
    else:
        print(CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", message.data))


def _write_raw(message: Message) -> None:
    data = message.data
    sys.stdout.buffer.write(data if isinstance(data, bytes) else data.encode() + b"\n")


@asynccontextmanager
async def _broken_pipe_ends_it() -> AsyncIterator[None]:
    """Raise BrokenPipeError when the reader of the output pipe has closed it.

    A write would raise it too, but only with the next message, which may never arrive.
    """
    output = sys.stdout.fileno()
    task = asyncio.current_task()
    if task is None or not stat.S_ISFIFO(os.fstat(output).st_mode):
        yield
        return
    loop = asyncio.get_running_loop()
    was_closed = False

    def on_pipe_closed() -> None:
        nonlocal was_closed
        was_closed = True
        loop.remove_reader(output)
        task.cancel()

    try:
        # The write end of a pipe never becomes readable, but the loop reports that its reader
        # closed.
        loop.add_reader(output, on_pipe_closed)
    except NotImplementedError:  # on Windows
        yield
        return
    try:
        yield
    except asyncio.CancelledError:
        if was_closed and not task.uncancel():
            raise BrokenPipeError from None
        raise
    finally:
        loop.remove_reader(output)
