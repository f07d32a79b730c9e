"""Encode what the backend is asked about a client; read its answer. Knows no connection."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from websocket_relay.admission.credentials import find_token
from websocket_relay.admission.permissions import Permissions, is_info
from websocket_relay.admission.policy import Action, AdmissionRequest, RequestSource
from websocket_relay.identity import MAX_USER_CHARACTERS
from websocket_relay.outcomes import RelayError
from websocket_relay.strict_json import RepeatedKeyError, decode

AUTHORIZATION = "authorization"

NEVER_S = 10.0 * 366 * 86_400
"""Permissions that last longer do not expire: no connection does."""


class HookAnswerError(RelayError):
    """The backend's answer is not what it has to be. The message names the field."""


def encode_question(
    request: AdmissionRequest, action: Action, forwarded_headers: Sequence[str]
) -> bytes:
    """Return the question about a request, as JSON.

    Args:
        request: of the client.
        action: what the client wants to do with the channel.
        forwarded_headers: the names of the headers that are passed on, in lower case.

    Raises:
        RefusedError: there is more than one Authorization line, and it would be passed on.
    """
    channel = request.channels[0] if len(request.channels) == 1 else None
    headers = _headers_of(request.headers, forwarded_headers)
    if AUTHORIZATION in forwarded_headers:
        # Browsers can't set headers of a WebSocket: a token may be elsewhere.
        token = find_token(request.authorization, request.query, request.subprotocols)
        if token is not None and AUTHORIZATION not in headers:
            headers[AUTHORIZATION] = f"Bearer {token}"
    query = request.query.decode("latin-1")
    return _encode(channel, action, RequestSource(request.host, request.origin), headers, query)


def encode_renewal(source: RequestSource, token: str) -> bytes:
    """Return the question about a client that is connected and has a new token."""
    headers = {AUTHORIZATION: f"Bearer {token}"}
    return _encode(None, Action.SUBSCRIBE, source, headers, "")


def _encode(
    channel: str | None,
    action: Action,
    source: RequestSource,
    headers: Mapping[str, str],
    query: str,
) -> bytes:
    question = {
        "channel": channel,
        "action": action.value,
        "address": source.address,
        "origin": source.origin,
        "headers": headers,
        "query": query,
    }
    return json.dumps(question, separators=(",", ":")).encode()


def _headers_of(lines: Sequence[tuple[bytes, bytes]], names: Sequence[str]) -> dict[str, str]:
    """Return the headers with some names; several lines of one are joined."""
    found: dict[str, str] = {}
    for name, value in lines:
        key = name.decode("latin-1")
        if key in names:
            text = value.decode("latin-1")
            separator = "; " if key == "cookie" else ", "  # RFC 9113 8.2.3, RFC 9110 5.3
            found[key] = f"{found[key]}{separator}{text}" if key in found else text
    return found


def parse_answer(body: bytes) -> Permissions:
    """Return the permissions in an answer. Fields that are absent or null permit nothing.

    Raises:
        HookAnswerError: it is not valid.
    """
    try:
        answer = decode(body.decode())
    except RepeatedKeyError:
        raise HookAnswerError("a key is repeated") from None
    except (ValueError, RecursionError):
        raise HookAnswerError("not JSON") from None
    if not isinstance(answer, dict):
        raise HookAnswerError("not a JSON object")
    is_admin = _flag(answer, "admin")
    return Permissions(
        subscribe=_patterns(answer, "subscribe"),
        publish=_patterns(answer, "publish"),
        expires_at=_expiry(answer.get("expires_in_s")),
        stats=_flag(answer, "stats") or is_admin,
        user=_user(answer.get("user")),
        info=_info(answer.get("info")),
        admin=is_admin,
    )


def _user(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_USER_CHARACTERS:
        raise HookAnswerError(f"user is no text of at most {MAX_USER_CHARACTERS} characters")
    return value


def _patterns(answer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    patterns = answer.get(name)
    if patterns is None:  # Go, for example, encodes an empty list so
        return ()
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        raise HookAnswerError(f"{name} is no list of texts")
    return tuple(patterns)


def _flag(answer: Mapping[str, Any], name: str) -> bool:
    value = answer.get(name)
    if value is not None and not isinstance(value, bool):
        raise HookAnswerError(f"{name} is neither true nor false")
    return value is True


def _expiry(seconds: object) -> float | None:
    """Return when permissions expire, in seconds since 1970; None: never."""
    if seconds is None:
        return None
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if is_number and 0 < (lasts_s := cast(float, seconds)) < math.inf:
        return time.time() + lasts_s if lasts_s < NEVER_S else None
    raise HookAnswerError("expires_in_s is no number above 0")


def _info(value: object) -> Any:
    if not is_info(value):
        raise HookAnswerError("info is larger than 1 KiB")
    return value
