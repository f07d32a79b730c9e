"""Print the messages of a channel, and send every line of standard input.

python examples/client.py [ws://localhost:8443/channels/news]

A relay with auth.mode jwt requires a token. It is read from the environment variable RELAY_TOKEN:
every user of the machine can see the arguments of programs, and URLs are logged.
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


def send_lines(websocket: ClientConnection, unechoed: Queue[str]) -> None:
    # A second file object for standard input: the thread that waits for the keyboard would keep the
    # lock of sys.stdin, and Python waits for that lock at exit.
    with suppress(ConnectionClosed), open(0, encoding="utf-8", closefd=False) as lines:
        for line in lines:
            text = line.rstrip("\n")
            unechoed.put(text)
            websocket.send(text)
        unechoed.join()
        websocket.close()


def print_messages(websocket: ClientConnection, unechoed: Queue[str]) -> None:
    for message in websocket:
        print(message, flush=True)
        # The relay sends each message back to its publisher too, in order: the oldest comes first.
        if not unechoed.empty() and message == unechoed.queue[0]:
            unechoed.get()
            unechoed.task_done()


def run_session(websocket: ClientConnection) -> int:
    unechoed: Queue[str] = Queue()  # messages whose echo has not arrived yet
    Thread(target=send_lines, args=(websocket, unechoed), daemon=True).start()
    try:
        print_messages(websocket, unechoed)
    except KeyboardInterrupt:
        websocket.close()  # else the close code would be 1011, internal error
        raise
    except ConnectionClosedError:
        is_clean_close = False
    else:
        is_clean_close = True
    print_error(f"closed: {websocket.close_code} {websocket.close_reason}".rstrip())
    return 0 if is_clean_close else FAILED


def redacted(url: str) -> str:
    """Return a URL without user, password and query, which may contain a token."""
    parse_uri(url)
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def rejection(response: Response) -> str:
    """Return status and reason of a rejected handshake; the reason is the body's first line."""
    headers = response.headers
    is_text = any(kind.startswith("text/plain") for kind in headers.get_all("Content-Type"))
    body = (response.body or b"").decode(errors="replace") if is_text else ""
    reason = body.partition("\n")[0] or response.reason_phrase
    text = f"HTTP {response.status_code}, {reason}"
    for time in headers.get_all("Retry-After"):
        text += f"; retry after {time} s" if time.isdecimal() else f"; retry after {time}"
    return text


def error_text(error: Exception) -> str:
    # When a redirect can't be followed, websockets raises an error whose text has the whole URL;
    # its context is the InvalidStatus with the response.
    cause = error if isinstance(error, InvalidStatus) else error.__context__
    return rejection(cause.response) if isinstance(cause, InvalidStatus) else str(error)


def print_error(line: str) -> None:
    print(line, file=sys.stderr)


def main(url: str, token: str) -> int:
    try:
        shown_url = redacted(url)
    except (ValueError, InvalidURI):  # their texts repeat the URL
        print_error("not a channel URL such as ws://localhost:8443/channels/news")
        return WRONG_USAGE
    if not re.fullmatch(r"[\w.-]*", token, re.ASCII):
        print_error("RELAY_TOKEN: a token has letters, digits, dots, - and _ only")
        return WRONG_USAGE
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with connect(url, additional_headers=headers) as websocket:
            return run_session(websocket)
    except (OSError, UnicodeError, WebSocketException) as error:
        print_error(f"{shown_url}: {error_text(error)}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default=DEFAULT_URL, help=f"default: {DEFAULT_URL}")
    sys.exit(main(parser.parse_args().url, os.environ.get("RELAY_TOKEN", "").strip()))
