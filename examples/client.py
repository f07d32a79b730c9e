"""Print what a channel relays, and send every line of standard input.

python examples/client.py [ws://localhost:8443/channels/news]

A relay with auth.mode jwt wants a token. It comes from the environment variable RELAY_TOKEN, for
everybody on the machine sees the arguments of programs, and addresses stand in logs.
"""

import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from queue import Queue
from threading import Thread
from urllib.parse import urlsplit

from websockets.exceptions import (
    ConnectionClosed,
    ConnectionClosedError,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.http11 import Response
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

DEFAULT_URL = "ws://localhost:8443/"
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def send_lines(websocket: ClientConnection, unheard: Queue[str]) -> None:
    # A file object of its own: at exit Python would wait for the lock of sys.stdin, which a
    # thread that waits for the keyboard holds.
    with suppress(ConnectionClosed), open(0, encoding="utf-8", closefd=False) as lines:
        for line in lines:
            text = line.rstrip("\n")
            unheard.put(text)
            websocket.send(text)
        unheard.join()
        websocket.close()


def print_messages(websocket: ClientConnection, unheard: Queue[str]) -> None:
    for message in websocket:
        print(message, flush=True)
        # The relay sends to everybody, in one order: what was sent first comes back first.
        if not unheard.empty() and message == unheard.queue[0]:
            unheard.get()
            unheard.task_done()


def talk(websocket: ClientConnection) -> int:
    unheard: Queue[str] = Queue()  # what was sent and has not come back yet
    Thread(target=send_lines, args=(websocket, unheard), daemon=True).start()
    try:
        print_messages(websocket, unheard)
    except KeyboardInterrupt:
        websocket.close()  # or it would go as an internal error
        raise
    except ConnectionClosedError:
        closed_well = False
    else:
        closed_well = True
    say(f"closed: {websocket.close_code} {websocket.close_reason}".rstrip())
    return 0 if closed_well else FAILED


def without_secrets(url: str) -> str:
    """Return an address without its user, password and query, where a token may be."""
    parse_uri(url)
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def refusal(response: Response) -> str:
    """Say what the relay answered instead of connecting: the first line of the body has why."""
    headers = response.headers
    is_text = any(kind.startswith("text/plain") for kind in headers.get_all("Content-Type"))
    body = (response.body or b"").decode(errors="replace") if is_text else ""
    why = body.partition("\n")[0] or response.reason_phrase
    said = f"HTTP {response.status_code}, {why}"
    for when in headers.get_all("Retry-After"):
        said += f"; come back in {when} s" if when.isdecimal() else f"; come back at {when}"
    return said


def reason(error: Exception) -> str:
    # Where a redirect could not be followed, the error shows the whole address and stands before
    # the answer.
    answer = error if isinstance(error, InvalidStatus) else error.__context__
    return refusal(answer.response) if isinstance(answer, InvalidStatus) else str(error)


def say(line: str) -> None:
    print(line, file=sys.stderr)


def main(url: str, token: str) -> int:
    try:
        address = without_secrets(url)
    except (ValueError, InvalidURI):  # their texts repeat it
        say("that is not an address such as ws://localhost:8443/channels/news")
        return WRONG_USAGE
    if not re.fullmatch(r"[\w.-]*", token, re.ASCII):
        say("RELAY_TOKEN: a token has letters, digits, dots, - and _ only")
        return WRONG_USAGE
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with connect(url, additional_headers=headers) as websocket:
            return talk(websocket)
    except (OSError, UnicodeError, WebSocketException) as error:
        say(f"{address}: {reason(error)}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default=DEFAULT_URL, help=f"default: {DEFAULT_URL}")
    sys.exit(main(parser.parse_args().url, os.environ.get("RELAY_TOKEN", "").strip()))
