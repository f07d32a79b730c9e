"""Say what a client may send, once it is connected: whether at all, and how often."""

from time import monotonic

from websocket_relay.outcomes import Close
from websocket_relay.token_bucket import TokenBucket


class PublishPolicy:
    """What one client may send.

    Args:
        may_publish: False closes it with its first message.
        rate: how often; None: as it likes.
    """

    __slots__ = ("_may_publish", "_rate")

    def __init__(self, *, may_publish: bool, rate: TokenBucket | None) -> None:
        self._may_publish = may_publish
        self._rate = rate

    def objection(self) -> Close | None:
        """Return why the client may not send the message that it just sent, or None."""
        if not self._may_publish:
            return Close.NOT_ALLOWED
        if self._rate is not None and not self._rate.take(monotonic()):
            return Close.RATE_LIMIT
        return None

    def excuse(self, seconds: float) -> None:
        """Take note that the relay did not read the client for so long."""
        if self._rate is not None:
            self._rate.excuse(seconds)
