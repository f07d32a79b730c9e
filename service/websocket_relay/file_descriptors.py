"""Own the budget of file descriptors: how many are free, and how many are reserved.

Knows no connection: callbacks return how many there are.
"""

import contextlib
import errno
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, thread_time

OF_METRICS = 32
"""Reserved for the metrics port, and its maximum: probes and Prometheus are always answered."""

RESERVED_FOR_REQUESTS = 32
"""Minimum for plain HTTP on the relay's port: probes there, and clients that are refused."""

RESERVED_FOR_BACKENDS = 32
"""Reserved for connections to the broker, the issuer and the collector; for certificates; for name
resolution."""

RESERVED = OF_METRICS + RESERVED_FOR_REQUESTS + RESERVED_FOR_BACKENDS
"""Descriptors that are not available to clients, besides those for calls."""

CALLS_PART = 4
"""A quarter of the limit at most is reserved for calls: fewer clients are better than none."""

AT_START = 32
"""Descriptors that a relay without clients has open, libraries and listening sockets included."""

SCAN_PAUSE_FACTOR = 20
"""A scan that took 1 ms is followed by 20 ms without one: scans take a twentieth of the time."""

MAX_PAUSE_S = 1.0

OPEN_MAX = 10_240
"""What macOS allows a process whose hard limit is "unlimited" (sys/syslimits.h)."""

DIRECTORY = Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")


def highest_limit() -> int:
    """Return the highest limit that the process may set."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        return hard
    return OPEN_MAX if soft == resource.RLIM_INFINITY else max(soft, OPEN_MAX)


def raise_limit() -> None:
    """Raise the limit to the maximum: each client needs one, and the shell's default is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS may allow less than it reports
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest_limit(), hard))


def count_open() -> int:
    """Return the number of descriptors that the process has open."""
    try:
        # Since Linux 6.2 the directory's size is the number of descriptors; before, it is 0.
        size = DIRECTORY.stat().st_size if sys.platform == "linux" else 0
        return size or len(list(DIRECTORY.iterdir())) - 1  # minus the one that reads the directory
    except OSError as error:
        return sys.maxsize if error.errno in (errno.EMFILE, errno.ENFILE) else 0


class FileDescriptors:
    """The file descriptors of the process.

    On some systems, scanning many open descriptors takes milliseconds. So the estimate is the
    number of connections plus the other descriptors that the last scan found. A scan is made only
    if the estimate is close to the limit.

    Args:
        of_clients: returns the number of clients, and of those that become one.
        of_requests: returns the number of plain HTTP connections on the relay's port.
        of_metrics: returns the number of connections on the metrics port.
        max_calls: how many connections the hook and the webhooks have at most. As many descriptors
            are reserved for them, beside those that they have open.
    """

    def __init__(
        self,
        of_clients: Callable[[], int],
        of_requests: Callable[[], int],
        of_metrics: Callable[[], int],
        max_calls: int = 0,
    ) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = sys.maxsize if soft == resource.RLIM_INFINITY else soft
        self._for_calls = min(max_calls, self._limit // CALLS_PART)
        self._of_clients = of_clients
        self._of_requests = of_requests
        self._of_metrics = of_metrics
        self._others = AT_START
        self._look_at = 0.0

    @property
    def free(self) -> int:
        """The estimated number of free descriptors."""
        self._scan()
        return max(0, self._estimated_free())

    def metrics(self) -> dict[str, int]:
        """Return the values of the metrics of file descriptors."""
        return {"free_descriptors": self.free}

    def can_accept_client(self) -> bool:
        """Return whether an HTTP connection may become a client."""
        reserved = RESERVED + self._for_calls
        return self._are_free(reserved - self._of_requests() - self._of_metrics())

    def can_accept_request(self) -> bool:
        """Return whether the relay's port may accept one more HTTP connection."""
        reserved = OF_METRICS + RESERVED_FOR_BACKENDS + self._for_calls
        return self._are_free(reserved + 1 - self._of_metrics())

    def _connections(self) -> int:
        return self._of_clients() + self._of_requests() + self._of_metrics()

    def _estimated_free(self) -> int:
        return self._limit - self._others - self._connections()

    def _are_free(self, count: int) -> bool:
        free = self._estimated_free()
        if free < count + RESERVED + self._for_calls:
            self._scan()
            free = self._estimated_free()
        return free >= count

    def _scan(self) -> None:
        now = perf_counter()
        if now < self._look_at:
            return
        started_at = thread_time()  # excludes the time that other processes take
        self._others = count_open() - self._connections()
        self._look_at = now + min((thread_time() - started_at) * SCAN_PAUSE_FACTOR, MAX_PAUSE_S)
