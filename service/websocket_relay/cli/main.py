"""The entry point of the command line: argument parsing, and the commands of the operator.

Exit status: 0 clean stop, 1 failure at run time, 2 bad usage or settings. For `listen`, `send`,
`bench` and `verify` see `cli/common`: the same, and 130 after Ctrl-C.

Slow modules are imported when they are needed: `send` does not wait for the server's imports, and
Ctrl-C during an import ends the process without a traceback.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from websocket_relay.outcomes import (
    FAILED,
    INTERRUPTED,
    WRONG_USAGE,
    ListenError,
    SettingsError,
    StartError,
    UnhealthyError,
    UnusableSettingError,
)
from websocket_relay.server.signals import CAN_BLOCK, Stop, flush_log, leave

if TYPE_CHECKING:
    from websocket_relay.config.model import Settings

CLIENT_COMMANDS = frozenset({"listen", "send", "bench", "verify"})
"""Commands that need the client's dependencies only."""

OPTIONS = {
    "--host": ("server.host", "H"),
    "--port": ("server.port", "P"),
    "--log-level": ("logging.level", "L"),
}
"""Options that replace a setting, and the names of their values in the help."""

CONFIG_HELP = "YAML file with settings (default: config.yaml if it exists)"


def main(arguments: Sequence[str] | None = None, *, stop: Stop | None = None) -> int:
    """Run a command and return the exit status; `serve` ends the process instead.

    Args:
        arguments: of the command line; None: those of this process.
        stop: receives signals already; None: `serve` makes a new one.
    """
    try:
        options = _parser().parse_args(arguments)
        if options.command in (None, "serve") and CAN_BLOCK:
            _serve_and_exit(options, stop or Stop())
        return _run(options)
    except KeyboardInterrupt:  # outside of a command, for example during an import
        return INTERRUPTED


def _serve_and_exit(options: argparse.Namespace, stop: Stop) -> NoReturn:
    try:
        status = _run(options, stop)
    except Exception:  # noqa: BLE001 - the process must end by leave(): signals are blocked
        sys.excepthook(*cast(Any, sys.exc_info()))
        status = FAILED
    leave(status)


def _require_server() -> None:
    """Check that the relay's dependencies are installed; the client needs few of them.

    Raises:
        StartError: they are not.
    """
    if find_spec("pydantic") is None:  # without importing it: `dev-cert` does not need it
        raise StartError(
            "this command needs the extra `server`: pip install 'websocket-relay[server]'"
        )


def _run(options: argparse.Namespace, stop: Stop | None = None) -> int:
    try:
        if options.command in CLIENT_COMMANDS:
            client_status: int = options.run(options)
            return client_status
        _require_server()
        match options.command:
            case None | "serve" | "check" if not CAN_BLOCK:
                raise StartError("the relay runs on Linux and macOS, its client also on Windows")
            case "check":
                _check(_loader(options))
            case "healthcheck":
                _healthcheck(_loader(options), "/readyz" if options.ready else "/healthz")
            case "dev-cert":
                _dev_cert(options.directory)
            case _:
                assert stop is not None
                _serve(_loader(options), stop)
    except SettingsError as error:
        _print_errors(*error.problems)
        return WRONG_USAGE
    except (UnusableSettingError, ListenError) as error:
        from websocket_relay.config import loader

        source = loader.where(error.setting, options.config_file, os.environ, _given(options))
        _print_errors(f"{source}: {error}")
        return WRONG_USAGE if isinstance(error, UnusableSettingError) else FAILED
    except (StartError, UnhealthyError) as error:
        _print_errors(str(error))
        return FAILED
    return 0


def _print_errors(*errors: str) -> None:
    """Print lines after those of the log."""
    flush_log()
    for error in errors:
        print(f"websocket-relay: {error}", file=sys.stderr)


def _given(options: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Return the options that replace settings, for `config.loader`."""
    values = ((name, getattr(options, name[2:].replace("-", "_"))) for name in OPTIONS)
    return {OPTIONS[name][0]: (name, value) for name, value in values if value is not None}


def _loader(options: argparse.Namespace) -> "Callable[..., Settings]":
    """Return `config.loader.load` for these options; its argument `again` is left."""
    from websocket_relay.config import loader

    # A default file that is found now may not be missing at a reload.
    file = options.config_file or (loader.DEFAULT_FILE if loader.DEFAULT_FILE.exists() else None)
    return partial(loader.load, file, os.environ, _given(options))


def _serve(load: "Callable[..., Settings]", stop: Stop) -> None:
    from websocket_relay import logs
    from websocket_relay.server import run

    loaded = load()
    logs.configure(loaded.logging)
    failure: BaseException | None = None
    try:
        run.run(loaded, stop, partial(load, again=True))
    except* StartError as group:
        failure = group.exceptions[0]  # Python before 3.11.4 wraps what is raised here in a group
    if failure is not None:
        raise failure


def _check(load: "Callable[[], Settings]") -> None:
    from websocket_relay.app import Replica
    from websocket_relay.config import render
    from websocket_relay.server import run

    loaded = load()
    Replica(loaded)
    for warning in run.startup_warnings(loaded):
        print(f"websocket-relay: warning: {warning}", file=sys.stderr)
    print(render.render(loaded), end="")


def _healthcheck(load: "Callable[[], Settings]", path: str) -> None:
    from websocket_relay.cli import healthcheck

    healthcheck.check_health(load(), path=path)


def _dev_cert(directory: Path) -> None:
    from websocket_relay import tls

    for file in tls.write_dev_pair(directory):
        print(file)


def _parser() -> argparse.ArgumentParser:
    from websocket_relay import __version__
    from websocket_relay.cli import listen, send
    from websocket_relay.cli.bench import run as bench
    from websocket_relay.cli.verify import run as verify

    parser = argparse.ArgumentParser(
        prog="websocket-relay",
        description="A WebSocket relay: every client of a channel receives what one of them sends.",
        epilog="Every setting can also come from the environment: server.port is"
        " RELAY__SERVER__PORT.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_settings_options(parser, default=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in (
        ("serve", "run the relay (the default)"),
        ("check", "validate the settings and print the effective ones"),
        ("healthcheck", "check that the relay with these settings is alive"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        # Before the command, the same options belong to the program: they must not be overwritten.
        _add_settings_options(command, default=argparse.SUPPRESS)
        if name == "healthcheck":
            command.add_argument(
                "--ready", action="store_true", help="check that it accepts clients, too"
            )
    dev_cert = commands.add_parser(
        "dev-cert",
        help="write a self-signed cert.pem and key.pem for localhost",
        description="Write a self-signed cert.pem and key.pem for localhost, 127.0.0.1 and ::1.",
    )
    dev_cert.add_argument(
        "--directory",
        type=Path,
        metavar="D",
        default=Path(),
        help="output directory (default: the current one)",
    )
    for module in (listen, send, bench, verify):
        module.add_to(commands)
    return parser


def _add_settings_options(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    parser.add_argument("--config-file", type=Path, metavar="F", default=default, help=CONFIG_HELP)
    for name, (setting, value) in OPTIONS.items():
        parser.add_argument(name, metavar=value, default=default, help=f"instead of {setting}")
