"""Know how many file descriptors the process may still open, and keep some for what matters most.

Knows no connection: others tell how many there are.
"""

import contextlib
import errno
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, thread_time

OF_METRICS = 32
"""What the metrics port may have: probes and Prometheus are answered whatever clients take."""

OF_REQUESTS = 32
"""What plain HTTP on the relay's port has at least: probes there, and clients that are refused."""

OF_ITS_OWN = 32
"""Connections to the broker, the issuer of keys and a collector; certificates; looking up names."""

RESERVED = OF_METRICS + OF_REQUESTS + OF_ITS_OWN
"""Clients may have all but these."""

AT_START = 32
"""What a relay without clients has open, libraries and listening sockets included."""

LOOK_FACTOR = 20
"""A look that took a millisecond is followed by 20 without one: a twentieth of the time."""

MAX_PAUSE_S = 1.0

OPEN_MAX = 10_240
"""What macOS allows a process where its hard limit says "unlimited" (sys/syslimits.h)."""

DIRECTORY = Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")


def most_possible() -> int:
    """Return how many descriptors the process may raise its limit to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        return hard
    return OPEN_MAX if soft == resource.RLIM_INFINITY else max(soft, OPEN_MAX)


def raise_limit() -> None:
    """Take all the descriptors there are: every client is one, and shells start with 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS may allow less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most_possible(), hard))


def count_open() -> int:
    """Return how many descriptors the process has open."""
    try:
        # Since Linux 6.2 the directory's size is their number; before, it has none.
        size = DIRECTORY.stat().st_size if sys.platform == "linux" else 0
        return size or len(list(DIRECTORY.iterdir())) - 1  # less the one that reads the directory
    except OSError as error:
        return sys.maxsize if error.errno in (errno.EMFILE, errno.ENFILE) else 0


class FileDescriptors:
    """The file descriptors of the process.

    To look how many are open takes milliseconds on some systems where they are many. So connections
    are counted, all else is what the last look found beside them, and a look is taken only where
    that sum comes near the limit.

    Args:
        connections: tells how many connections there are, of all kinds.
        of_requests: tells how many of them speak plain HTTP on the relay's port.
        of_metrics: tells how many the metrics port has.
    """

    def __init__(
        self,
        connections: Callable[[], int],
        of_requests: Callable[[], int],
        of_metrics: Callable[[], int],
    ) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = sys.maxsize if soft == resource.RLIM_INFINITY else soft
        self._connections = connections
        self._of_requests = of_requests
        self._of_metrics = of_metrics
        self._others = AT_START
        self._look_at = 0.0

    @property
    def free(self) -> int:
        """How many there are, as far as it is known."""
        self._look()
        return max(0, self._left())

    def fit_client(self) -> bool:
        """Tell whether one of the connections that speak HTTP may become a client."""
        return self._are_free(RESERVED - self._of_requests() - self._of_metrics())

    def fit_request(self) -> bool:
        """Tell whether the relay's port may have the HTTP connections that it has, and one more."""
        return self._are_free(OF_METRICS + OF_ITS_OWN + 1 - self._of_metrics())

    def _left(self) -> int:
        return self._limit - self._others - self._connections()

    def _are_free(self, count: int) -> bool:
        if self._left() < count + RESERVED:
            self._look()
        return self._left() >= count

    def _look(self) -> None:
        now = perf_counter()
        if now < self._look_at:
            return
        began = thread_time()  # what others take of the processor meanwhile does not count
        self._others = count_open() - self._connections()
        self._look_at = now + min((thread_time() - began) * LOOK_FACTOR, MAX_PAUSE_S)
