"""Take a broker's URL apart without ever showing what is secret in it. Knows no broker."""

import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, unquote

from websocket_relay.outcomes import UnusableSettingError

HIDDEN = "***"

CREDENTIALS = re.compile(r"(?<=://)[^/?#]*@")
"""Up to the last @: a password may hold some, too."""

SCHEME = re.compile(r"[A-Za-z]+://")
AMBIGUOUS = re.compile(r"[/?#].*@", re.DOTALL)
"""Where the @ ends a password that should have been percent-encoded, all before it is secret."""

SHORTEST_SECRET = 3
"""A shorter one is not looked for in texts: it would be found in every word."""


def redacted(url: str) -> str:
    """Return a URL as it may be logged: where to, and not as whom."""
    if "://" not in url:
        return HIDDEN  # who knows what it is
    if is_ambiguous(url):
        return f"{url.partition('://')[0]}://{HIDDEN}"
    return CREDENTIALS.sub(f"{HIDDEN}@", url.partition("?")[0])


def is_ambiguous(url: str) -> bool:
    """Tell whether it can be read in two ways: a password that was not percent-encoded, or none."""
    return bool(AMBIGUOUS.search(SCHEME.sub("", url)))


def secrets_of(url: str) -> Sequence[str]:
    """Return what must not be shown of a URL, in all its spellings, the longest first."""
    found: set[str] = set()
    for credentials in CREDENTIALS.findall(url):
        for each in credentials[:-1].split(","):
            found.update(part.partition(":")[2] or part for part in each.split("@"))
    found |= {value for name, value in parse_qsl(url.partition("?")[2]) if "pass" in name}
    found |= {unquote(each) for each in found}
    return sorted((each for each in found if len(each) >= SHORTEST_SECRET), key=len, reverse=True)


def redact(secrets: Sequence[str], text: str) -> str:
    """Return a text, on one line, with the secrets left out."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return " ".join(text.split())


def unusable_url(url: str, reason: str) -> UnusableSettingError:
    """Return the error for a URL that no broker can be found by."""
    return UnusableSettingError("backplane.url", f"{redacted(url)!r}: {reason}")
