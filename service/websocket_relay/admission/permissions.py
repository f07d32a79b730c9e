"""Read what a token allows. Knows no signature."""

from dataclasses import dataclass
from typing import Any

CLAIM = "relay"


@dataclass(frozen=True, slots=True)
class Permissions:
    """Patterns of channels, and until when they count.

    A `*` at a pattern's end matches the rest; anywhere else it is a letter, which no channel has.

    Attributes:
        expires_at: seconds since 1970; None: never.
        stats: whether the relay's figures may be seen.
    """

    subscribe: tuple[str, ...]
    publish: tuple[str, ...]
    expires_at: float | None
    stats: bool = False

    @classmethod
    def of(cls, claims: dict[str, Any], expires_at: float | None) -> "Permissions":
        """Return the rights that the claim `relay` gives: none where it is not as it should be."""
        claim = claims.get(CLAIM)
        if not isinstance(claim, dict):
            return cls((), (), expires_at)
        subscribe, publish = _patterns(claim.get("subscribe")), _patterns(claim.get("publish"))
        return cls(subscribe, publish, expires_at, stats=claim.get("stats") is True)

    def may_subscribe(self, channel: str) -> bool:
        """Tell whether the channel may be joined."""
        return any(_matches(pattern, channel) for pattern in self.subscribe)

    def may_publish(self, channel: str) -> bool:
        """Tell whether messages may be sent to the channel."""
        return any(_matches(pattern, channel) for pattern in self.publish)


def _patterns(claim: object) -> tuple[str, ...]:
    if not isinstance(claim, list):
        return ()
    return tuple(pattern for pattern in claim if isinstance(pattern, str))


def _matches(pattern: str, channel: str) -> bool:
    if pattern.endswith("*"):
        return channel.startswith(pattern[:-1])
    return channel == pattern
