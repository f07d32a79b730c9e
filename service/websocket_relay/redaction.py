"""Redact the secrets in a URL, and in texts that may contain them. Knows no broker and no relay."""

import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, unquote

from websocket_relay.outcomes import UnusableSettingError

HIDDEN = "***"

CREDENTIALS = re.compile(r"(?<=://)[^/?#]*@")
"""Up to the last @, because a password may contain one."""

SCHEME = re.compile(r"[A-Za-z+]+://")
AMBIGUOUS = re.compile(r"[/?#].*@", re.DOTALL)
"""The @ may end a password that was not percent-encoded. Then everything before it is secret."""

SHORTEST_SECRET = 3
"""Minimum length of a secret that is searched for in texts: a shorter one matches inside words."""


def redacted(url: str) -> str:
    """Return a URL as it may be logged or shown: the address without credentials and query."""
    if "://" not in url:
        return HIDDEN  # not a URL: any part may be secret
    if is_ambiguous(url):
        return f"{url.partition('://')[0]}://{HIDDEN}"
    return CREDENTIALS.sub(f"{HIDDEN}@", url.partition("?")[0])


def is_ambiguous(url: str) -> bool:
    """Return whether it is unclear if the URL has a password that was not percent-encoded."""
    return bool(AMBIGUOUS.search(SCHEME.sub("", url)))


def secrets_of(url: str, *others: str) -> Sequence[str]:
    """Return the secrets in a URL, encoded and decoded, and others; the longest first."""
    found: set[str] = set(others)
    for credentials in CREDENTIALS.findall(url):
        for server in credentials[:-1].split(","):
            found.update(part.partition(":")[2] or part for part in server.split("@"))
    found |= {value for name, value in parse_qsl(url.partition("?")[2]) if "pass" in name}
    found |= {unquote(secret) for secret in found}
    long_enough = (secret for secret in found if len(secret) >= SHORTEST_SECRET)
    return sorted(long_enough, key=len, reverse=True)


def redact(secrets: Sequence[str], text: str) -> str:
    """Return a text on one line, with the secrets replaced."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return " ".join(text.split())


def unusable_url(url: str, reason: str) -> UnusableSettingError:
    """Return the error for an invalid backplane.url."""
    return UnusableSettingError("backplane.url", f"{redacted(url)!r}: {reason}")
