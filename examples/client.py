"""Print what a channel relays, and send every line of standard input.

python examples/client.py [ws://localhost:8443/channels/news]

A relay with auth.mode jwt wants a token. It comes from the environment variable RELAY_TOKEN, for
everybody on the machine sees the arguments of programs, and addresses stand in logs.
"""

import os
import sys
from contextlib import suppress
from queue import Queue
from threading import Thread

from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

DEFAULT_URL = "ws://localhost:8443/"


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


def main(url: str, token: str) -> int:
    unheard: Queue[str] = Queue()  # what was sent and has not come back yet
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with connect(url, additional_headers=headers) as websocket:
            Thread(target=send_lines, args=(websocket, unheard), daemon=True).start()
            print_messages(websocket, unheard)
    except (OSError, WebSocketException) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    print(f"closed: {websocket.close_code} {websocket.close_reason}".rstrip(), file=sys.stderr)
    return 0


if __name__ == "__main__":
    address = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_URL
    sys.exit(main(address, os.environ.get("RELAY_TOKEN", "").strip()))
