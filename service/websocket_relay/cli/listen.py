"""Print what a channel relays."""

import asyncio
import base64
import json
import math
import os
import re
import stat
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from websocket_relay.cli.common import (
    EPILOG,
    add_patience,
    add_target,
    count,
    notes_of,
    run,
    token_of,
    trust_of,
)
from websocket_relay.client import Message, Relay

DESCRIPTION = """\
Print what a channel relays, one message a line, until Ctrl-C.

It comes back by itself when the connection is lost or the relay restarts, and asks for what it
missed; nothing is printed twice. Text is printed as it is, with its control characters made
visible where it goes to a terminal. Binary messages are written as they are, without a line end,
but for a terminal, which is told their size only. With --json every line is an object:

  {"position": "1795441056000-7-0", "text": "hello"}
  {"position": "1795441056000-8-0", "base64": "AAEC"}

and has "after_gap": true where messages before it were missed for good."""

EXAMPLES = """\
examples:
  websocket-relay listen ws://localhost:8443/channels/news
  websocket-relay listen --history 20 --count 20 ws://localhost:8443/channels/news
  websocket-relay listen --json --ca cert.pem wss://localhost:8443/ | jq .text

"""

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal might obey. Tabs and line feeds are left."""


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "listen",
        help="print what a channel relays",
        description=DESCRIPTION,
        epilog=EXAMPLES + EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_target(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    first = parser.add_mutually_exclusive_group()
    first.add_argument("--since", default="", metavar="P", help="begin behind this position")
    first.add_argument(
        "--history", type=count, default=0, metavar="N", help="begin with the last N messages"
    )
    parser.add_argument("--count", type=count, default=0, metavar="N", help="end after N messages")
    add_patience(parser, "at the first attempt when it starts, then never")
    parser.set_defaults(run=lambda options: run(listen, options))


async def listen(options: Namespace) -> int:
    """Print messages until there are enough of them."""
    write = _writer(options)
    relay = Relay(
        options.url,
        token=token_of(options),
        ssl=trust_of(options),
        since=options.since,
        history=options.history,
        start_patience_s=options.patience or 0.0,
        patience_s=math.inf if options.patience is None else options.patience,
        on_event=notes_of(options),
    )
    async with _while_somebody_reads(), relay:
        left = options.count
        async for message in relay:
            write(message)
            left -= 1
            if left == 0 or not relay.waiting:
                sys.stdout.flush()
            if left == 0:
                break
    return 0


def _writer(options: Namespace) -> Callable[[Message], None]:
    if options.json:
        return lambda message: print(_object(message))
    return _write_shown if sys.stdout.isatty() else _write_as_it_is


def _object(message: Message) -> str:
    said: dict[str, object] = {"position": message.position}
    if isinstance(message.data, str):
        said["text"] = message.data
    else:
        said["base64"] = base64.b64encode(message.data).decode()
    if message.after_gap:
        said["after_gap"] = True
    return json.dumps(said, ensure_ascii=False)


def _write_shown(message: Message) -> None:
    if isinstance(message.data, bytes):
        print(f"[{len(message.data)} bytes]")
    else:
        print(CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", message.data))


def _write_as_it_is(message: Message) -> None:
    data = message.data
    sys.stdout.buffer.write(data if isinstance(data, bytes) else data.encode() + b"\n")


@asynccontextmanager
async def _while_somebody_reads() -> AsyncIterator[None]:
    """Raise BrokenPipeError when the pipe that is written to has lost its reader.

    Writing would tell as well, but only with the next message, and there may be none.
    """
    output = sys.stdout.fileno()
    task = asyncio.current_task()
    if task is None or not stat.S_ISFIFO(os.fstat(output).st_mode):
        yield
        return
    loop = asyncio.get_running_loop()
    was_left = False

    def leave() -> None:
        nonlocal was_left
        was_left = True
        loop.remove_reader(output)
        task.cancel()

    # A pipe's writing end never becomes readable; that its reader is gone is told all the same.
    loop.add_reader(output, leave)
    try:
        yield
    except asyncio.CancelledError:
        if was_left and not task.uncancel():
            raise BrokenPipeError from None
        raise
    finally:
        loop.remove_reader(output)
