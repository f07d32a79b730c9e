"""Clients that come in or are refused, with a token or without."""

from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from tests.support.issuer import SECRET
from tests.support.relay_process import RelayProcess, receive

HMAC_ALGORITHMS = ["HS256", "HS384", "HS512"]


async def refusal_answer(attempt: connect) -> Response:
    """Insist that a client is not let in; return the answer."""
    with pytest.raises(InvalidStatus) as refusal:
        async with attempt:
            pass
    return refusal.value.response


def jwt_settings(**of_jwt: Any) -> dict[str, Any]:
    """Return the settings of a relay that wants tokens."""
    return {"mode": "jwt", "jwt": {"secret": SECRET, "algorithms": HMAC_ALGORITHMS} | of_jwt}


def connect_with_token(relay: RelayProcess, channel: str | None, brought: str) -> connect:
    """Connect with a token in the Authorization header."""
    return relay.client(channel, additional_headers={"Authorization": f"Bearer {brought}"})


async def assert_admitted(attempt: connect) -> None:
    """Insist that a client is let in and may send and receive."""
    async with attempt as client:
        await client.send("hello")
        assert await receive(client) == "hello"


def assert_invalid_token(answer: Response, detail: str) -> None:
    """Insist on the documented answer to a token that is not accepted."""
    assert answer.status_code == 401
    assert bytes(answer.body or b"").decode() == f"invalid token: {detail}\n"
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
