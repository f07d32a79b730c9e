"""Define a stream on a broker, and what its drivers and its users share. Knows no message.

A driver has a connection that appends and one that reads. It opens them when it needs them, and
closes one at once when anything fails there (`AbortOnFailure`). Its users repeat the call after a
pause (`Retries`).
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol

from websocket_relay.backoff import backoff
from websocket_relay.backplane.timings import Timings
from websocket_relay.outcomes import RelayError, UnusableSettingError
from websocket_relay.redaction import redact

log = logging.getLogger(__name__)

MAX_FAILURE_TEXTS = 8
"""Distinct errors that are logged of a streak of failures."""

RESET = struct.pack("ii", 1, 0)
"""Value of SO_LINGER: unsent bytes are discarded."""

Id = tuple[int, int]
"""Id of an entry: epoch and offset of its positions."""


class BrokerError(RelayError):
    """The broker is unavailable, or rejected a request. A retry may succeed."""


class StreamEntry(NamedTuple):
    """An entry of a stream.

    Attributes:
        entry_id: id of the entry.
        data: bytes of the entry.
        follows: whether the stream never held another entry between this one and the one that was
            read before.
    """

    entry_id: Id
    data: bytes
    follows: bool


class StreamRead(NamedTuple):
    """The result of a read.

    Attributes:
        entries: in the order of the stream.
        is_last: whether the stream held no further entries.
    """

    entries: Sequence[StreamEntry]
    is_last: bool = True


class Retention(NamedTuple):
    """The limits beyond which a stream drops its oldest entries, approximately."""

    max_bytes: int
    max_age_s: float


class Stream(Protocol):
    """A stream on a broker. The ids of its entries only grow."""

    @property
    def max_entry_bytes(self) -> int:
        """The size limit of an entry, as far as is known."""

    async def open_writer(self) -> None:
        """Connect for `append`, unless the connection is open. This has time limits of its own.

        Raises:
            BrokerError: the broker can't be reached.
        """

    async def append(self, data: bytes, timeout_s: float) -> None:
        """Append an entry. Call `open_writer` right before.

        Args:
            data: bytes of the entry.
            timeout_s: time limit of the broker's response.

        Raises:
            BrokerError: the append is unconfirmed; the entry may be in the stream.
        """

    async def read(self, after: Id, *, must_reconnect: bool = False) -> StreamRead:
        """Return the next entries after an id; wait for about a second if there are none.

        Args:
            after: id of the entry that was read last.
            must_reconnect: open a new connection, to a new primary if there is one.

        Raises:
            BrokerError: the stream can't be read now.
        """

    async def close(self) -> None:
        """Close the connections to the broker."""


class AbortOnFailure:
    """Abort a connection after a failure in the block, and raise a BrokerError: one line of text.

    After a cancellation the response would be read as that of the next request. After an error
    response, the server may be a replica that was the primary before.

    Args:
        abort: aborts the connection.
        secrets: returns what a text of the broker may contain and an error may not.
        library_error: the error that the broker's library documents. A malformed response of the
            broker may raise any other.
    """

    def __init__(
        self,
        abort: Callable[[], Awaitable[None]],
        secrets: Callable[[], Sequence[str]],
        library_error: type[Exception],
    ) -> None:
        self._abort = abort
        self._secrets = secrets
        self._library_error = library_error

    async def __aenter__(self) -> None:
        """Do nothing."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Abort the connection if the block failed.

        Raises:
            BrokerError: it failed, and was not cancelled.
        """
        if error is None:
            return
        await self._abort()
        if not isinstance(error, Exception):
            return
        text = str(error) or "not answered in time"
        expected = (BrokerError, UnusableSettingError, OSError, self._library_error)
        if isinstance(error, RuntimeError):  # raised by uvloop for a closed transport
            text = "connection lost"
        elif not isinstance(error, expected):
            text = f"unexpected error: {type(error).__name__}: {text}"
        raise BrokerError(redact(self._secrets(), text)) from None


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    """Make an abort of a connection reset it at once, and discard its unsent bytes.

    Otherwise the kernel keeps the connection until the broker has received those bytes, which a
    frozen broker never does. Call it right after connecting: a closed transport does not return
    its socket.

    Raises:
        BrokerError: the connection is closed already.
    """
    connected = writer.get_extra_info("socket")
    if connected is None:
        raise BrokerError("connection lost")
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


class Retries:
    """The pauses between attempts of one action, and the log lines of a streak of failures.

    Args:
        action: its name in the log.
        address: address of the broker, without secrets; it is logged.
        timings: the pauses.
    """

    def __init__(self, action: str, address: str, timings: Timings) -> None:
        self._action = action
        self._address = address
        self._pause_limits = timings.first_pause_s, timings.longest_pause_s
        self._pauses = backoff(*self._pause_limits)
        self._texts: set[str] = set()

    async def pause_after(self, error: BrokerError) -> None:
        """Log a failure, unless the streak has logged it already; sleep before the next attempt."""
        text = str(error)
        if text not in self._texts and len(self._texts) < MAX_FAILURE_TEXTS:
            self._texts.add(text)
            fields = {"broker": self._address, "action": self._action, "error": text}
            log.warning("backplane failed", extra=fields)
        await asyncio.sleep(next(self._pauses))

    def record_success(self) -> None:
        """End the streak of failures, if there is one."""
        if self._texts:
            self._texts.clear()
            self._pauses = backoff(*self._pause_limits)
            log.info("backplane recovered", extra={"action": self._action})
