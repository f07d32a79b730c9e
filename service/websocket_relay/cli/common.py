"""The parts that the client commands share: arguments, token, TLS, notices, exit status.

Exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted by Ctrl-C. An error is one line on
standard error, never a traceback. Knows no server code.
"""

import asyncio
import math
import os
import signal
import ssl
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from websocket_relay.client import Connected, Disconnected, InvalidUrlError, RejectedError, Relay
from websocket_relay.client.url import EXAMPLE_URL, RelayUrl
from websocket_relay.outcomes import FAILED, INTERRUPTED, WRONG_USAGE, RelayError
from websocket_relay.redaction import redacted
from websocket_relay.trust import verifying_context

TOKEN_VARIABLE, URL_VARIABLE = "RELAY_TOKEN", "RELAY_URL"
URL_SCHEMES = ("ws://", "wss://")
UNTRUSTED = "certificate not trusted"

EPILOG = f"""\
The token is read from --token-file or from the environment variable {TOKEN_VARIABLE}. It is never
an argument: every user of the machine can see those. Exit status: 0 done, 1 failed, 2 bad usage,
130 interrupted by Ctrl-C."""


class UsageError(RelayError):
    """An argument, or the file that it names, is invalid."""


def add_command(
    commands: Any,
    name: str,
    summary: str,
    description: str,
    examples: str,
    *,
    url_count: str = "?",
) -> ArgumentParser:
    """Add a command with the arguments for the relay's URL, the token and the certificate.

    Args:
        commands: argparse's subparsers.
        name: of the command.
        summary: one line, for the list of all commands.
        description, examples: for its own help.
        url_count: argparse's `nargs` of the URL.
    """
    parser: ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples + EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "url",
        nargs=url_count,
        metavar="URL",
        help=f"the relay's URL: {EXAMPLE_URL} (default: {URL_VARIABLE})",
    )
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the token; read again before every connection",
    )
    group.add_argument(
        "--ca", type=Path, metavar="FILE", help="PEM file with the authorities to trust for wss://"
    )
    group.add_argument(
        "--no-proxy",
        action="store_true",
        help="connect directly, without the proxy of https_proxy or http_proxy",
    )
    return parser


def add_reconnect_arguments(parser: ArgumentParser, default: str) -> None:
    """Add the arguments of the commands that reconnect.

    Args:
        parser: of the command.
        default: the default of --patience, for the help.
    """
    parser.add_argument(
        "--patience",
        type=non_negative_seconds,
        metavar="S",
        help=f"give up after S seconds without a connection (default: {default})",
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print errors only, no connection notices"
    )


def run_with_url(
    parser: ArgumentParser,
    options: Namespace,
    main: Callable[[Namespace], Coroutine[Any, Any, int]],
    shift: Callable[[str], bool] = lambda _: False,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Run a command with the URL of its arguments or of the environment; return the exit status.

    Args:
        parser: of the command.
        options: its arguments.
        main: the command.
        shift: takes the first argument where it is not the URL; returns whether it could.
        loop_factory: creates the event loop; None: asyncio's.
    """
    default, urls = os.environ.get(URL_VARIABLE, ""), urls_of(options)
    if not urls or (default and not urls[0].startswith(URL_SCHEMES)):
        if not default:
            parser.error("the following arguments are required: URL")
        if urls and not shift(urls[0]):
            parser.error(f"unrecognized arguments: {urls[0]}")
        options.url = default
    return run(main, options, loop_factory)


def non_negative_seconds(text: str) -> float:
    """Parse a number of seconds, 0 or more."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ArgumentTypeError("must be 0 or more")
    return value


def positive_int(text: str) -> int:
    """Parse a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError("must be 1 or more")
    return value


def new_client(
    options: Namespace,
    on_event: Callable[[Connected | Disconnected], None],
    *,
    urls: Sequence[str] = (),
    patience_s: float = math.inf,
) -> Relay:
    """Return a client with the arguments of a command.

    Args:
        options: the arguments.
        on_event: called when the state of the connection changes.
        urls: of the relay; empty: those in the arguments.
        patience_s: how long to try to reconnect, where --patience is not given.
    """
    given_s: float | None = getattr(options, "patience", None)
    return Relay(
        urls or urls_of(options),
        token=token_source(options),
        ssl=tls_context(options),
        uses_proxy=not options.no_proxy,
        start_patience_s=given_s or 0.0,
        patience_s=patience_s if given_s is None else given_s,
        on_event=on_event,
    )


def token_source(options: Namespace) -> Callable[[], str]:
    """Return a function that reads the token again at each call."""
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
        raise UsageError(f"{file}: contains no token")
    return token


def tls_context(options: Namespace) -> ssl.SSLContext | None:
    """Return the context that trusts the authorities of --ca; None: the system's authorities."""
    file: Path | None = options.ca
    if file is None:
        return None
    if not all(RelayUrl.parse(url).is_secure for url in urls_of(options)):
        raise UsageError("--ca requires a wss:// URL")
    try:
        return verifying_context(file)
    except OSError as error:  # ssl.SSLError is a subclass
        is_tls_error = isinstance(error, ssl.SSLError)
        reason = "contains no certificate" if is_tls_error else error.strerror
        raise UsageError(f"{file}: {reason}") from None


def print_notice(text: str) -> None:
    """Print a line to standard error."""
    print(f"websocket-relay: {text}", file=sys.stderr, flush=True)


def urls_of(options: Namespace) -> list[str]:
    """Return the URLs of a command."""
    return [options.url] if isinstance(options.url, str) else options.url or []


def shown_url(options: Namespace) -> str:
    """Return the URL or URLs as they may be shown."""
    return ", ".join(map(redacted, urls_of(options)))


def show_progress(line: str) -> None:
    """Replace the previous line of progress; cut a line that would not fit the terminal."""
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
    print(f"\r\033[K{line[: columns - 1]}", end="", file=sys.stderr, flush=True)


def event_printer(options: Namespace) -> Callable[[Connected | Disconnected], None]:
    """Return the function that prints a notice for each connect and disconnect."""
    url = shown_url(options)

    def print_event(event: Connected | Disconnected) -> None:
        match event:
            case Connected():
                print_notice(f"connected to {url}")
            case Disconnected():
                print_notice(f"{event.reason}; retrying in {event.retry_s:.1f} s")

    return (lambda _: None) if options.quiet else print_event


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
    except BrokenPipeError:  # the reader of standard output has exited: no failure
        _discard_output()
        return 0
    except (InvalidUrlError, UsageError) as error:
        print_notice(str(error))
        return WRONG_USAGE
    except RelayError as error:
        print_notice(f"{shown_url(options)}: {error}{_advice(error, options)}")
        return FAILED
    except OSError as error:  # of a file, or of standard output
        print_notice(f"{error.filename or 'standard output'}: {error.strerror}")
        _discard_output()
        return FAILED


async def _interruptible(command: Coroutine[Any, Any, int]) -> int:
    """Cancel a command on the first Ctrl-C; on the second, end the process wherever it hangs."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a script
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
    if "(via proxy " in str(error):
        return "; --no-proxy connects directly"
    is_untrusted = isinstance(error, RejectedError) and str(error).startswith(UNTRUSTED)
    return "; trust its authority with --ca FILE" if is_untrusted and not options.ca else ""


def _discard_output() -> None:
    """Discard output that can't be written: Python would write it again at exit, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
