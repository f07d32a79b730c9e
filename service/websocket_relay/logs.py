"""Configure logging: one event a line, constant text, facts as fields; no payload and no token.

Knows no event.
"""

import logging
import re
import sys
from collections.abc import Callable, Mapping
from types import TracebackType

import structlog

from websocket_relay.config.model import LoggingSettings

log = logging.getLogger(__name__)

QUIET = {
    # uvicorn logs "started", "listening" and the like; the relay has its own events for these.
    "uvicorn.error": logging.ERROR,
    "uvicorn.access": logging.ERROR,
    "websockets.server": logging.ERROR,
    "asyncio": logging.ERROR,
    # One line for every fetch of keys, and at debug level all of its headers.
    "httpx2": logging.WARNING,
    "httpcore2": logging.WARNING,
    # The same for every export of traces.
    "urllib3": logging.WARNING,
    # One line for every malformed traceparent: any client could flood the log.
    "opentelemetry.trace": logging.ERROR,
    # It logs the malformed parts of OTEL_EXPORTER_OTLP_HEADERS, which contains tokens.
    "opentelemetry.util.re": logging.CRITICAL,
}

OWN_LOGGERS = "websocket_relay."

URL_SECRETS = re.compile(r"(?<=://)[^/\s@]+@|\?[^\s'\")]+")
"""User, password and query: libraries log the full URL of a collector."""


def configure(settings: LoggingSettings) -> None:
    """Send all logs to standard error, with the format and minimum level of the settings."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _mark_foreign,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(default=str)
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_event_to=0,
            # The default formatter prints local variables, which include payloads.
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
    sys.excepthook = _log_crash


def add_facts(facts: Callable[[], Mapping[str, object]]) -> None:
    """Add the result of `facts`, at the time of each line, to the fields of the line."""

    def add(record: logging.LogRecord) -> bool:
        record.__dict__.update(facts())
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(add)


def _mark_foreign(
    _: object, __: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Add the logger's name to a line of a library, and redact the secrets of URLs in it."""
    name = event["_record"].name
    if not name.startswith(OWN_LOGGERS):
        event["logger"] = name
        event["event"] = URL_SECRETS.sub("", event["event"])
    return event


def _log_crash(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("crashed", exc_info=(kind, error, trace))
