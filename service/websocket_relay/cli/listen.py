"""The command `listen`: print the messages of channels. Knows no server code."""

import asyncio
import base64
import json
import math
import os
import re
import stat
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from websocket_relay.cancellation import cancel_until_done
from websocket_relay.cli.common import (
    add_command,
    add_reconnect_arguments,
    event_printer,
    new_client,
    positive_int,
    print_notice,
    run_with_url,
)
from websocket_relay.client import Connected, Disconnected, Message, Subscription

DESCRIPTION = """\
Print the messages of channels, one a line, until Ctrl-C.

Without CHANNEL it is the channel in the URL, or the channel `default`. When the connection is lost
or the relay restarts, the command reconnects and resumes after the last message; no message is
printed twice. Text is printed as it is; on a terminal, control characters are escaped. Binary
messages are written as they are, without a line end; on a terminal, only their size is printed.
With more than one channel, each line starts with the channel. With --json every line is an object:

  {"position": "1795441056000-7-0", "text": "hello"}
  {"position": "1795441056000-8-0", "base64": "AAEC"}

and has "after_gap": true where messages before it are lost, and "channel" where there is more than
one."""

EXAMPLES = """\
examples:
  websocket-relay listen ws://localhost:8443 news
  websocket-relay listen --history 20 --exit ws://localhost:8443 news
  websocket-relay listen --json --ca cert.pem wss://localhost:8443 news chat | jq .text

"""

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that may control a terminal. Tabs and line feeds are not among them."""


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands, "listen", "print the messages of channels", DESCRIPTION, EXAMPLES
    )
    parser.add_argument(
        "channels",
        nargs="*",
        metavar="CHANNEL",
        help="name of a channel (default: that of the URL)",
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
        "--count", type=positive_int, default=math.inf, metavar="N", help="end after N messages"
    )
    parser.add_argument(
        "--exit", action="store_true", help="end when the messages of the past are printed"
    )
    add_reconnect_arguments(parser, "after one attempt at the start, later never")

    def run_listen(options: Namespace) -> int:
        def shift(channel: str) -> bool:
            options.channels.insert(0, channel)
            return True

        return run_with_url(parser, options, listen, shift)

    parser.set_defaults(run=run_listen)


async def listen(options: Namespace) -> int:
    """Print messages, up to --count; return the exit status."""
    print_event = event_printer(options)
    is_subscribed = False

    def on_event(event: Connected | Disconnected) -> None:
        if is_subscribed or isinstance(event, Disconnected):
            print_event(event)

    relay = new_client(options, on_event)
    channels = dict.fromkeys(options.channels or [relay.channel])
    printer = MessagePrinter(options, names_channel=len(channels) > 1)
    async with _broken_pipe_ends_it(), relay, AsyncExitStack() as stack:
        subscriptions = [
            relay.subscribe(
                channel, since=options.since, history=options.history, follow=not options.exit
            )
            for channel in channels
        ]
        for subscription in subscriptions:
            await stack.enter_async_context(subscription)
        is_subscribed = True
        print_event(Connected(is_resumed=False))
        await printer.print_all(subscriptions)
    return 0


class MessagePrinter:
    """Write messages to standard output.

    Args:
        options: of the command.
        names_channel: whether to write the channel of each message.
    """

    def __init__(self, options: Namespace, *, names_channel: bool) -> None:
        self._remaining = options.count
        self._subscriptions: Sequence[Subscription] = ()
        self._quiet = options.quiet
        self._names_channel = names_channel
        if options.json:
            self._write = self._write_json
        elif sys.stdout.isatty():
            self._write = self._write_to_terminal
        else:
            self._write = self._write_raw

    async def print_all(self, subscriptions: Sequence[Subscription]) -> None:
        """Print the messages of all subscriptions until they end, or --count is reached."""
        self._subscriptions = subscriptions
        tasks = [asyncio.create_task(self._print(each)) for each in subscriptions]
        try:
            await asyncio.gather(*tasks)
        finally:
            await cancel_until_done(*tasks)

    async def _print(self, subscription: Subscription) -> None:
        async for message in subscription:
            if message.after_gap and not self._quiet:
                print_notice(f"{message.channel}: messages are missing before the next one")
            self._write(message)
            self._remaining -= 1
            if not self._remaining:
                for each in self._subscriptions:
                    each.unsubscribe()
            if not subscription.unread:
                sys.stdout.flush()

    def _write_json(self, message: Message) -> None:
        fields: dict[str, object] = {"channel": message.channel} if self._names_channel else {}
        fields["position"] = message.position
        if isinstance(message.data, str):
            fields["text"] = message.data
        else:
            fields["base64"] = base64.b64encode(message.data).decode()
        if message.after_gap:
            fields["after_gap"] = True
        print(json.dumps(fields, ensure_ascii=False))

    def _prefix(self, message: Message) -> str:
        return f"{message.channel}: " if self._names_channel else ""

    def _write_to_terminal(self, message: Message) -> None:
        data = message.data
        if isinstance(data, bytes):
            shown = f"[{len(data)} bytes]"
        else:
            shown = CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", data)
        print(f"{self._prefix(message)}{shown}")

    def _write_raw(self, message: Message) -> None:
        data = message.data
        line = data if isinstance(data, bytes) else data.encode() + b"\n"
        sys.stdout.buffer.write(self._prefix(message).encode() + line)


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
