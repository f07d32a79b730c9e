"""Set up logging: one event a line, stable text, facts as fields. Never a payload or a token."""

import logging
import re
import sys
from collections.abc import Callable, Mapping
from types import TracebackType

import structlog

from websocket_relay.config.model import LoggingSettings

log = logging.getLogger(__name__)

QUIET = {
    # uvicorn says "started", "listening" and the like; the relay says it in its own words.
    "uvicorn.error": logging.ERROR,
    "uvicorn.access": logging.ERROR,
    "websockets.server": logging.ERROR,
    "asyncio": logging.ERROR,
    # A line for every fetch of keys, and at debug level all of its headers.
    "httpx2": logging.WARNING,
    "httpcore2": logging.WARNING,
    # The same of traces that are sent.
    "urllib3": logging.WARNING,
    # A line for every broken traceparent: any client could fill the log.
    "opentelemetry.trace": logging.ERROR,
    # Writes what it can't read of OTEL_EXPORTER_OTLP_HEADERS, where the collector's tokens are.
    "opentelemetry.util.re": logging.CRITICAL,
}

OURS = "websocket_relay."

ADDRESS_S_SECRETS = re.compile(r"(?<=://)[^/\s@]+@|\?[^\s'\")]+")
"""User, password and query: libraries write the address of a collector whole."""


def configure(settings: LoggingSettings) -> None:
    """Send all logs to standard error, in the format and from the level of the settings."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _introduce_others,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(default=str)
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_event_to=0,
            # The pretty one shows local variables, and with them payloads.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    final: list[structlog.typing.Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
    ]
    if settings.format == "json":
        final.append(structlog.processors.format_exc_info)
    final.append(renderer)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(max(level, root.level))
    logging.captureWarnings(True)
    sys.excepthook = _tell_crash


def add_facts(facts: Callable[[], Mapping[str, object]]) -> None:
    """Have every line from now on carry what `facts` says when it is written."""

    def add(record: logging.LogRecord) -> bool:
        record.__dict__.update(facts())
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(add)


def _introduce_others(
    _: object, __: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Say which library wrote a line that is not the relay's, and leave out what is secret."""
    name = event["_record"].name
    if not name.startswith(OURS):
        event["logger"] = name
        event["event"] = ADDRESS_S_SECRETS.sub("", event["event"])
    return event


def _tell_crash(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("crashed", exc_info=(kind, error, trace))
