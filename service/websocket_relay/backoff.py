"""Compute the delays between attempts. Knows nothing of what is attempted."""

import random
from collections.abc import Iterator


def backoff(first_s: float, longest_s: float) -> Iterator[float]:
    """Yield the delay after each failure, in seconds: it doubles up to `longest_s`.

    Each is randomly reduced by up to a half, so that replicas and clients that failed together do
    not try again together.
    """
    while True:
        yield first_s * random.uniform(0.5, 1)
        first_s = min(2 * first_s, longest_s)
