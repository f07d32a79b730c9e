"""Match the names of channels with patterns. Knows no channel."""

from collections.abc import Iterable


def matches(pattern: str, channel: str) -> bool:
    """Return whether a name matches a pattern; a `*` at its end stands for any rest.

    Anywhere else it is a literal character, which no channel name contains.
    """
    if pattern.endswith("*"):
        return channel.startswith(pattern[:-1])
    return channel == pattern


def matches_any(patterns: Iterable[str], channel: str) -> bool:
    """Return whether a name matches one of several patterns."""
    return any(matches(pattern, channel) for pattern in patterns)
