"""Read the permissions in a token's claims. Knows no signature."""

from dataclasses import dataclass
from typing import Any

CLAIM = "relay"


@dataclass(frozen=True, slots=True)
class Permissions:
    """Patterns of channel names, and when they expire.

    A trailing `*` in a pattern matches any rest. Anywhere else it is a literal character, which no
    channel name contains.

    Attributes:
        expires_at: seconds since 1970; None: never.
        stats: whether the holder may read the relay's stats.
    """

    subscribe: tuple[str, ...]
    publish: tuple[str, ...]
    expires_at: float | None
    stats: bool = False

    @classmethod
    def of(cls, claims: dict[str, Any], expires_at: float | None) -> "Permissions":
        """Return the permissions in the claim `relay`; none if the claim is malformed."""
        claim = claims.get(CLAIM)
        if not isinstance(claim, dict):
            return cls((), (), expires_at)
        subscribe, publish = _patterns(claim.get("subscribe")), _patterns(claim.get("publish"))
        return cls(subscribe, publish, expires_at, stats=claim.get("stats") is True)

    def may_subscribe(self, channel: str) -> bool:
        """Return whether the holder may subscribe to the channel."""
        return any(_matches(pattern, channel) for pattern in self.subscribe)

    def may_publish(self, channel: str) -> bool:
        """Return whether the holder may publish to the channel."""
        return any(_matches(pattern, channel) for pattern in self.publish)


def _patterns(claim: object) -> tuple[str, ...]:
    if not isinstance(claim, list):
        return ()
    return tuple(pattern for pattern in claim if isinstance(pattern, str))


def _matches(pattern: str, channel: str) -> bool:
    if pattern.endswith("*"):
        return channel.startswith(pattern[:-1])
    return channel == pattern
