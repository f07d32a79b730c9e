"""Own what one connected client may publish: whether, and at what rate. Knows no connection."""

from time import monotonic

from websocket_relay.outcomes import Close
from websocket_relay.token_bucket import TokenBucket


class PublishPolicy:
    """What one client may publish.

    Args:
        may_publish: False: the first message closes the connection.
        rate: the client's message rate; None: unlimited.
    """

    __slots__ = ("_may_publish", "_token_bucket")

    def __init__(self, *, may_publish: bool, rate: TokenBucket | None) -> None:
        self._may_publish = may_publish
        self._token_bucket = rate

    def violation(self) -> Close | None:
        """Return the close reason if the message that just arrived is not permitted, or None."""
        if not self._may_publish:
            return Close.PUBLISH_NOT_ALLOWED
        if self._token_bucket is not None and not self._token_bucket.take(monotonic()):
            return Close.RATE_LIMIT
        return None

    def credit_paused_time(self, seconds: float) -> None:
        """Credit the rate limit for time in which the relay did not read from the client."""
        if self._token_bucket is not None:
            self._token_bucket.credit_paused_time(seconds)
