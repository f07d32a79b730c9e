"""Read the permissions in a token's claims. Knows no signature.

They are an object, `{"subscribe": [...], "publish": [...]}`, the same as JSON text, or scopes such
as `relay:subscribe:news`: identity providers differ in the types that a claim may have.
"""

import json
from typing import Any, NamedTuple

from websocket_relay.identity import MAX_USER_CHARACTERS
from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem
from websocket_relay.patterns import matches_any

CLAIM = "relay"
SCOPE_PREFIX = "relay:"

MAX_INFO_BYTES = 1024
"""Of `info`, as compact JSON in UTF-8. It is sent to all who watch a channel with its holder in
it."""


class Permissions(NamedTuple):
    """Patterns of channel names, and when they expire.

    A trailing `*` in a pattern matches any rest. Anywhere else it is a literal character, which no
    channel name contains.

    Attributes:
        expires_at: seconds since 1970; None: never.
        stats: whether the holder may read the relay's stats.
        user: the holder, by the claim `sub`; empty: the token names none.
        info: what others are shown of the holder, any JSON value; None: nothing.
        admin: whether the holder may use the server API.
    """

    subscribe: tuple[str, ...]
    publish: tuple[str, ...]
    expires_at: float | None
    stats: bool = False
    user: str = ""
    info: Any = None
    admin: bool = False

    @classmethod
    def of(
        cls, claims: dict[str, Any], expires_at: float | None, path: str = CLAIM
    ) -> "Permissions":
        """Return the permissions in a claim; none if it is absent or malformed.

        Args:
            path: as for `find_claim`.

        Raises:
            RefusedError: the holder's name is too long, or the info too large.
        """
        claim = _parsed(find_claim(claims, path))
        subject = claims.get("sub")
        user = subject if isinstance(subject, str) else ""
        if len(user) > MAX_USER_CHARACTERS:
            raise RefusedError(Refusal.INVALID_TOKEN, TokenProblem.USER)
        if not isinstance(claim, dict):
            return cls((), (), expires_at, user=user)
        subscribe, publish = _patterns(claim.get("subscribe")), _patterns(claim.get("publish"))
        is_admin = claim.get("admin") is True
        stats = claim.get("stats") is True or is_admin
        info = claim.get("info")
        if not is_info(info):
            raise RefusedError(Refusal.INVALID_TOKEN, TokenProblem.INFO)
        return cls(subscribe, publish, expires_at, stats, user, info, is_admin)

    @property
    def is_empty(self) -> bool:
        """Whether they permit nothing."""
        return not (self.subscribe or self.publish or self.stats)

    def may_subscribe(self, channel: str) -> bool:
        """Return whether the holder may subscribe to the channel."""
        return matches_any(self.subscribe, channel)

    def may_publish(self, channel: str) -> bool:
        """Return whether the holder may publish to the channel."""
        return matches_any(self.publish, channel)


def is_info(value: object) -> bool:
    """Return whether others may be shown a value: it is JSON, and not too large."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        # Half of a surrogate pair is three bytes, too.
        return len(text.encode("utf-8", "surrogatepass")) <= MAX_INFO_BYTES
    except (ValueError, TypeError, RecursionError):
        return False


def find_claim(claims: object, path: str) -> object:
    """Return a claim, or None if there is none.

    Args:
        path: the name of the claim or, if there is none of this name, names joined by dots. A name
            may itself contain dots, as a URL does: the longest name that exists is taken.
    """
    if not isinstance(claims, dict):
        return None
    if path in claims:
        return claims[path]
    name, _, rest = path.rpartition(".")
    while name and name not in claims:
        name, _, part = name.rpartition(".")
        rest = f"{part}.{rest}"
    return find_claim(claims[name], rest) if name else None


def _parsed(claim: object) -> object:
    """Return a claim as an object, if it is JSON text or scopes."""
    if isinstance(claim, str) and claim.lstrip().startswith("{"):
        try:
            return json.loads(claim)
        except (ValueError, RecursionError):
            return None
    scopes = claim.split() if isinstance(claim, str) else claim
    return _of_scopes(scopes) if isinstance(scopes, list) else claim


def _of_scopes(scopes: list[Any]) -> dict[str, Any]:
    words = [scope for scope in scopes if isinstance(scope, str)]

    def channels(action: str) -> list[str]:
        prefix = f"{SCOPE_PREFIX}{action}:"
        return [word.removeprefix(prefix) for word in words if word.startswith(prefix)]

    return {
        "subscribe": channels("subscribe"),
        "publish": channels("publish"),
        "stats": f"{SCOPE_PREFIX}stats" in words,
        "admin": f"{SCOPE_PREFIX}admin" in words,
    }


def _patterns(claim: object) -> tuple[str, ...]:
    if not isinstance(claim, list):
        return ()
    return tuple(pattern for pattern in claim if isinstance(pattern, str))
