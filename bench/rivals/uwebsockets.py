"""uWebSockets (C++) through socketify, with its own publish. Knows nothing of the relay.

usage: uwebsockets.py PORT
"""
# mypy: disable-error-code="import-not-found,import-untyped"

import sys
from typing import Any

from socketify import App, OpCode

TOPIC = "all"
MAX_BACKPRESSURE_BYTES = 1 << 28  # generous: uWebSockets drops what is over it

app = App()


def opened(client: Any) -> None:
    """Subscribe a new client."""
    client.subscribe(TOPIC)


def received(client: Any, message: str | bytes, opcode: OpCode) -> None:
    """Publish to all, the sender included."""
    app.publish(TOPIC, message, opcode)


def main(port: int) -> None:
    """Serve until the process is ended.

    libuv's own loop runs here, not socketify's, which polls it from asyncio in turns: that costs
    CPU time and latency which are not uWebSockets'.
    """
    app.ws(
        "/",
        {
            "open": opened,
            "message": received,
            "compression": 0,
            "idle_timeout": 0,
            "max_lifetime": 0,
            "max_payload_length": 1 << 20,
            "max_backpressure": MAX_BACKPRESSURE_BYTES,
        },
    )
    app.listen({"host": "127.0.0.1", "port": port}, lambda _: print("ready", flush=True))
    app.loop.uv_loop.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
