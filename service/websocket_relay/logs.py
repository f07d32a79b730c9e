"""Configure logging: one event a line, constant text, facts as fields; no payload and no token.

Lines are written in a thread: a reader that stalls blocks nothing. Knows no event.
"""

import asyncio
import logging
import os
import re
import select
import sys
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
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

MAX_PENDING_BYTES = 1_048_576
"""Lines that wait for the reader of standard error; further ones are dropped."""

FLUSH_S = 0.2
"""At its end the process waits so long for the reader of standard error."""


class LineWriter(logging.Handler):
    """Write lines in a thread of its own, in their order.

    Args:
        descriptor: the file, pipe, socket or terminal to write to.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._pending: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        # Each number is written by one thread: these under the handler's lock, the others by the
        # thread that writes.
        self._queued_bytes = self._rejected = 0
        self._written_bytes = self._failed = 0
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    @property
    def dropped(self) -> int:
        """The number of lines that could not be written, or did not fit into the queue."""
        return self._rejected + self._failed

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, or drop it; never block."""
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # noqa: BLE001 - a line that can't be formatted must not fail its caller
            self._rejected += 1
            return
        if self._queued_bytes - self._written_bytes + len(line) > MAX_PENDING_BYTES:
            self._rejected += 1
            return
        self._queued_bytes += len(line)
        self._pending.put(line)

    def flush(self) -> None:
        """Wait until all lines so far are written, FLUSH_S at most."""
        written = threading.Event()
        self._pending.put(written)
        written.wait(FLUSH_S)

    def _write_lines(self) -> None:
        reported = 0
        while True:
            # All that wait at once: to get the interpreter's lock takes longer than to write.
            items = [self._pending.get()]
            while not self._pending.empty():
                items.append(self._pending.get())
            lines = [item for item in items if isinstance(item, bytes)]
            is_written = self._write(b"".join(lines))
            if not is_written:
                self._failed += len(lines)
            self._written_bytes += sum(map(len, lines))
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            if is_written and lines and (dropped := self.dropped) > reported:
                log.warning("log lines dropped", extra={"count": dropped - reported})
                reported = dropped

    def _write(self, data: bytes) -> bool:
        """Write all bytes; return whether that was possible."""
        unsent = memoryview(data)
        while unsent:
            try:
                unsent = unsent[os.write(self._descriptor, unsent) :]
            except BlockingIOError:  # another process has made the shared pipe non-blocking
                select.select([], [self._descriptor], [])
            except OSError:  # the reader has ended, or the disk is full
                return False
        return True


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
    handler = LineWriter(sys.stderr.fileno())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(settings.level)
    logging.captureWarnings(True)
    sys.excepthook = _log_crash


def set_level(level: str) -> None:
    """Log from this level on, and libraries from their own where it is higher."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    for name, quiet in QUIET.items():
        logging.getLogger(name).setLevel(max(quiet, root.level))


class LogLevel:
    """The minimum level, which may differ from that of the settings for a time.

    Args:
        configured: the level of the settings.
    """

    def __init__(self, configured: str) -> None:
        self._configured = configured
        self._revert: asyncio.TimerHandle | None = None

    def configure(self, level: str) -> None:
        """Log from a level of the settings on; while another one is set, after its end."""
        self._configured = level
        if self._revert is None:
            set_level(level)

    def set_for(self, level: str, seconds: float) -> None:
        """Log from another level on for some seconds. It replaces the one before."""
        if self._revert is not None:
            self._revert.cancel()
        self._revert = asyncio.get_running_loop().call_later(seconds, self._end)
        set_level(level)

    def _end(self) -> None:
        self._revert = None
        set_level(self._configured)


def metrics() -> dict[str, int]:
    """Return the values of the metrics of the log."""
    handlers = logging.getLogger().handlers
    writers = (handler for handler in handlers if isinstance(handler, LineWriter))
    return {"log_lines_dropped": sum(writer.dropped for writer in writers)}


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
