"""Start the command line: `websocket-relay`, or `python -m websocket_relay`."""

import sys

from websocket_relay.server import signals

OTHER_COMMANDS = frozenset({"check", "healthcheck", "dev-cert", "listen", "send", "bench"})
"""Commands that are not the relay: signals do there what they do by default."""


def main() -> int:
    """Run a command and return the exit status."""
    # Before the imports that take time, so that a signal is received meanwhile.
    stop = None
    if OTHER_COMMANDS.intersection(sys.argv):
        signals.unblock()
    elif signals.CAN_BLOCK:
        stop = signals.Stop()
    from websocket_relay.cli.main import main as run

    return run(stop=stop)


if __name__ == "__main__":
    sys.exit(main())
