"""What the commands have in common: how they are told of a relay, and how they end.

Exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted by Ctrl-C. One line on standard error
says why; there is never a traceback.
"""

import asyncio
import os
import signal
import ssl
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from websocket_relay.client import (
    Connected,
    Disconnected,
    InvalidUrlError,
    RejectedError,
    Unconfirmed,
)
from websocket_relay.client.url import EXAMPLE, ChannelUrl
from websocket_relay.outcomes import RelayError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
TOKEN_VARIABLE = "RELAY_TOKEN"
UNTRUSTED = "its certificate is not trusted"

EPILOG = f"""\
A token comes from --token-file or from the environment variable {TOKEN_VARIABLE}, never from an
argument: those are seen by everybody on the machine. Exit status: 0 done, 1 failed, 2 bad usage,
130 interrupted by Ctrl-C."""


class UsageError(RelayError):
    """What was typed, or what it names, can't be used."""


def add_target(parser: ArgumentParser) -> None:
    """Add the arguments that say where the relay is and how it is come to."""
    parser.add_argument("url", metavar="URL", help=f"the channel's address: {EXAMPLE}")
    group = parser.add_argument_group("to come in")
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="has the token; read again before every connection",
    )
    group.add_argument(
        "--ca", type=Path, metavar="FILE", help="PEM file with the authorities to trust for wss://"
    )


def add_patience(parser: ArgumentParser, otherwise: str) -> None:
    """Add the arguments of those who come back by themselves."""
    parser.add_argument(
        "--patience",
        type=seconds,
        metavar="S",
        help=f"give up after S seconds without a connection (default: {otherwise})",
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="no notes on standard error, only errors"
    )


def seconds(text: str) -> float:
    """Read a time that is not negative."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ArgumentTypeError("must be 0 or more")
    return value


def count(text: str) -> int:
    """Read a number of things: one or more."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError("must be 1 or more")
    return value


def token_of(options: Namespace) -> Callable[[], str]:
    """Return what gives the token, fresh each time."""
    file: Path | None = options.token_file
    return lambda: os.environ.get(TOKEN_VARIABLE, "").strip() if file is None else _read(file)


def _read(file: Path) -> str:
    try:
        token = file.read_text("ascii").strip()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        token = ""
    if not token:
        raise UsageError(f"{file}: there is no token in it")
    return token


def trust_of(options: Namespace) -> ssl.SSLContext | None:
    """Return how the relay's certificate is checked; None: as is usual on this machine."""
    file: Path | None = options.ca
    if file is None:
        return None
    if not ChannelUrl.parse(options.url).is_secure:
        raise UsageError("--ca is for addresses that begin with wss://")
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:  # ssl.SSLError is one
        words = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise UsageError(f"{file}: {words}") from None


def note(text: str) -> None:
    """Print a line for whoever watches."""
    print(f"websocket-relay: {text}", file=sys.stderr, flush=True)


def notes_of(options: Namespace) -> Callable[[Connected | Disconnected | Unconfirmed], None]:
    """Return what tells of a connection's ups and downs."""
    where = ChannelUrl.parse(options.url).shown

    def tell(event: Connected | Disconnected | Unconfirmed) -> None:
        match event:
            case Connected(is_recovered=True):
                note(f"connected to {where}")
            case Connected():
                note(f"connected to {where}; some messages were missed")
            case Disconnected():
                note(f"{event.reason}; again in {event.retry_s:.1f} s")
            case Unconfirmed():
                pass  # the command's last line says so

    return (lambda _: None) if options.quiet else tell


def run(
    main: Callable[[Namespace], Coroutine[Any, Any, int]],
    options: Namespace,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Run a command to its end; return the exit status."""
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_interruptible(main(options)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has had enough of it
        _forget_output()
        return 0
    except (InvalidUrlError, UsageError) as error:
        note(str(error))
        return WRONG_USAGE
    except RelayError as error:
        note(f"{ChannelUrl.parse(options.url).shown}: {error}{_advice(error, options)}")
        return FAILED
    except OSError as error:  # a file, or what is printed to
        note(f"{error.filename or 'standard output'}: {error.strerror}")
        _forget_output()
        return FAILED


async def _interruptible(command: Coroutine[Any, Any, int]) -> int:
    """Have Ctrl-C cancel a command, and a second one end it at once, wherever it hangs."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background, say
        return await command
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def cancel(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        loop.call_soon_threadsafe(task.cancel)

    signal.signal(signal.SIGINT, cancel)
    try:
        return await command
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _advice(error: RelayError, options: Namespace) -> str:
    is_untrusted = isinstance(error, RejectedError) and str(error).startswith(UNTRUSTED)
    return "; --ca FILE names another authority" if is_untrusted and not options.ca else ""


def _forget_output() -> None:
    """Throw away what could not be written: at exit Python would try once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
