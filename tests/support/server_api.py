"""Use the server API of a relay, with its key or with the token of an admin."""

import json
from collections.abc import Mapping
from typing import Any

import httpx2

from tests.support.admission import jwt_settings
from tests.support.issuer import ALL_CHANNELS, sign_token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import NO_CA, RelayProcess

KEY = "a key of the server API, long enough".replace(" ", "-")
WITH_KEY: Mapping[str, Any] = {"api": {"key": KEY}}
WITH_USERS: Mapping[str, Any] = {**WITH_KEY, "auth": jwt_settings()}
"""Settings of a relay whose clients have users, and that has a key of the API."""


async def request_api(
    relay: RelayProcess,
    method: str,
    path: str,
    body: object = None,
    *,
    secret: str = KEY,
    headers: Mapping[str, str] | None = None,
) -> httpx2.Response:
    """Send a request to the server API.

    Args:
        path: behind `/api`, with a query.
        body: bytes as they are, text in UTF-8, anything else as JSON; None: no body.
        secret: the bearer of the request; empty: none.
    """
    fields = {**({"Authorization": f"Bearer {secret}"} if secret else {}), **(headers or {})}
    content = body if isinstance(body, bytes | str | None) else json.dumps(body)
    tls = relay.tls_context or NO_CA
    async with httpx2.AsyncClient(verify=tls, trust_env=False, timeout=PATIENCE_S) as http:
        return await http.request(
            method, relay.http_url(f"/api{path}"), content=content, headers=fields
        )


async def ask_api(relay: RelayProcess, path: str) -> Any:
    """Return what the server API answers to a GET."""
    response = await request_api(relay, "GET", path)
    assert response.status_code == 200, response.text
    return response.json()


async def disconnect(relay: RelayProcess, **order: Any) -> Any:
    """Disconnect clients; return the answer."""
    response = await request_api(relay, "POST", "/disconnect", order)
    assert response.status_code == 200, response.text
    return response.json()


def bearer_of(user: str) -> dict[str, str]:
    """Return the header with the token of a user, who may do all but use the API."""
    return {"Authorization": f"Bearer {token_of(user)}"}


def token_of(user: str) -> str:
    """Return the token of a user, who may do all but use the API."""
    return sign_token(sub=user, relay=ALL_CHANNELS)
