"""Set up logging: one event a line, stable text, facts as fields. Never a payload or a token."""

import logging
import sys

import structlog

from service.settings import Logging

QUIET = {
    # uvicorn says "started", "listening" and the like; the relay says it in its own words.
    "uvicorn.error": logging.ERROR,
    "uvicorn.access": logging.ERROR,
    "websockets.server": logging.ERROR,
    "asyncio": logging.ERROR,
    # A line for every fetch of keys, and at debug level all of its headers.
    "httpx2": logging.WARNING,
    "httpcore2": logging.WARNING,
}


def configure(settings: Logging) -> None:
    """Send all logs to standard error, in the format and from the level of the settings."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
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
