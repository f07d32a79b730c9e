"""Start the command line: `websocket-relay`, or `python -m websocket_relay`."""

import os
import sys

from websocket_relay.server import signals

OTHER_COMMANDS = frozenset(
    {"check", "healthcheck", "dev-cert", "listen", "send", "bench", "verify"}
)
"""Commands that are not the relay: signals do there what they do by default."""


def main() -> int:
    """Run a command and return the exit status."""
    _replace_closed_streams()
    # Before the imports that take time, so that a signal is received meanwhile.
    stop = None
    if OTHER_COMMANDS.intersection(sys.argv):
        signals.unblock()
    elif signals.CAN_BLOCK:
        stop = signals.Stop()
    from websocket_relay.cli.main import main as run

    return run(stop=stop)


def _replace_closed_streams() -> None:
    """Open the null device as each standard stream that the parent process has closed.

    Otherwise a connection gets the descriptor, and is sent what is written to the stream.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


if __name__ == "__main__":
    sys.exit(main())
