"""Assert whether clients are admitted or refused, with a token or without."""

from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from tests.support.issuer import SECRET
from tests.support.relay_process import RelayProcess, receive

HMAC_ALGORITHMS = ["HS256", "HS384", "HS512"]


async def refusal_answer(attempt: connect) -> Response:
    """Assert that a client is refused; return the HTTP answer."""
    with pytest.raises(InvalidStatus) as refusal:
        async with attempt:
            pass
    return refusal.value.response


def jwt_settings(**jwt: Any) -> dict[str, Any]:
    """Return the settings `auth` of a relay that requires tokens.

    Args:
        jwt: settings of `auth.jwt` that differ.
    """
    return {"mode": "jwt", "jwt": {"secret": SECRET, "algorithms": HMAC_ALGORITHMS} | jwt}


def connect_with_token(relay: RelayProcess, channel: str | None, token: str) -> connect:
    """Connect with a token in the Authorization header."""
    return relay.client(channel, additional_headers={"Authorization": f"Bearer {token}"})


async def assert_admitted(attempt: connect) -> None:
    """Assert that a client is admitted, may publish, and receives its message."""
    async with attempt as client:
        await client.send("hello")
        assert await receive(client) == "hello"


def assert_invalid_token(answer: Response, detail: str) -> None:
    """Assert that an answer is the documented one to an invalid token."""
    assert answer.status_code == 401
    assert bytes(answer.body or b"").decode() == f"invalid token: {detail}\n"
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
