"""SIGHUP: settings that can change at run time do, others are named, and errors change nothing."""

from collections.abc import Mapping
from pathlib import Path
from signal import SIGHUP, SIGUSR1, SIGUSR2
from typing import Any

import httpx2
import pytest
from websocket_relay.config.changes import compare
from websocket_relay.config.model import AuthSettings, Settings

from tests.support.admission import (
    assert_admitted,
    assert_invalid_token,
    connect_with_token,
    jwt_settings,
    refusal_answer,
)
from tests.support.issuer import ALL_CHANNELS, OTHER_SECRET, SECRET, make_signer, sign_token
from tests.support.relay_process import NO_CA, RelayProcess, StartRelay, merged, receive

ORIGIN = {"Origin": "https://other.example"}
ALLOW_ORIGIN = "access-control-allow-origin"


async def reload(relay: RelayProcess, count: int = 1, **settings: Any) -> Mapping[str, Any]:
    """Change the settings of a relay; return the log event."""
    relay.change_settings(settings)
    relay.signal(SIGHUP)
    return await relay.await_log("settings reloaded", count=count)


async def test_limits_origins_and_the_log_level_change_and_clients_stay(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    async with relay.client("news") as client:
        for ignored in (SIGUSR1, SIGUSR2):
            relay.signal(ignored)
        event = await reload(
            relay,
            server={"allowed_origins": ["https://page.example"], "base_path": "/other"},
            limits={"max_connections": 2, "total_backlog_bytes": 65_536, "max_message_bytes": 9},
            logging={"level": "debug"},
        )
        assert event["level"] == "warning"
        assert event["changed"] == [
            "server.allowed_origins",
            "limits.max_connections",
            "limits.total_backlog_bytes",
            "logging.level",
        ]
        assert event["needs_restart"] == ["server.base_path", "limits.max_message_bytes"]
        page = await relay.metrics()
        assert page.value("websocket_connections_limit") == 2
        assert page.value("websocket_backlog_limit_bytes") == 65_536
        answer = await refusal_answer(relay.client("news", additional_headers=ORIGIN))
        assert answer.status_code == 403
        await relay.await_log("refused")  # at debug
        async with httpx2.AsyncClient(verify=NO_CA, trust_env=False) as http:
            response = await http.get(relay.http_url("/readyz"), headers=ORIGIN)
        assert ALLOW_ORIGIN not in response.headers
        async with relay.client("news"):
            assert (await refusal_answer(relay.client("news"))).status_code == 503
        await client.send("longer than nine bytes")
        assert await receive(client) == "longer than nine bytes"
        assert (await reload(relay, count=2))["level"] == "info"
        await assert_admitted(relay.client("news", additional_headers=ORIGIN))


async def test_keys_are_read_again_and_clients_stay(relay_with: StartRelay, tmp_path: Path) -> None:
    file, signers = tmp_path / "public.pem", [make_signer("ES256", number=n) for n in range(2)]
    secrets = [SECRET, OTHER_SECRET]

    def settings(number: int) -> dict[str, Any]:
        file.write_bytes(signers[number].public_pem)
        algorithms = ["HS256", "ES256"]
        keys = {"secret": secrets[number], "public_key_file": str(file), "algorithms": algorithms}
        return {"auth": {"mode": "jwt", "jwt": keys}}

    def tokens(number: int) -> tuple[str, str]:
        by_secret = sign_token(secrets[number], relay=ALL_CHANNELS)
        return by_secret, signers[number].token(relay=ALL_CHANNELS)

    relay = relay_with(**settings(0))
    async with connect_with_token(relay, "news", tokens(0)[0]) as client:
        event = await reload(relay, **settings(1))
        assert (event["changed"], event["needs_restart"]) == (["auth.jwt.secret"], [])
        for old, new in zip(tokens(0), tokens(1), strict=True):
            await assert_admitted(connect_with_token(relay, "other", new))
            answer = await refusal_answer(connect_with_token(relay, "other", old))
            assert_invalid_token(answer, "signature")
        await client.send("hello")
        assert await receive(client) == "hello"
    file.unlink()
    relay.signal(SIGHUP)
    event = await relay.await_log("settings not reloaded")
    assert event["problems"] == [f"auth.jwt.public_key_file: {file}: no such file"]
    await assert_admitted(connect_with_token(relay, "other", tokens(1)[1]))


async def test_invalid_settings_change_nothing_and_are_one_line(relay_with: StartRelay) -> None:
    relay = relay_with()
    rows: list[tuple[dict[str, Any], str]] = [
        ({"limits": {"max_connections": "many"}}, "limits.max_connections: 'many'"),
        ({"limits": {"max_connection": 1}}, "limits.max_connection: unknown key; did you"),
        ({"auth": {"mode": "jwt"}}, "auth: HS256 needs auth.jwt.secret"),
    ]
    for count, (settings, problem) in enumerate(rows, 1):
        limits = {"limits": {"max_connections": 1}}
        relay.change_settings(merged(limits, settings))
        relay.signal(SIGHUP)
        event = await relay.await_log("settings not reloaded", count=count)
        (text,) = event["problems"]
        assert f"relay.yaml: {problem}" in text
    assert await relay.metric("websocket_connections_limit") == 0


@pytest.mark.fast
def test_the_settings_of_tokens_change_together() -> None:
    """The new algorithms need the new URL, which needs a restart."""
    running = Settings(auth=AuthSettings.model_validate(jwt_settings()))
    jwt = {"jwks_url": "https://issuer.example/keys", "algorithms": ["RS256"]}
    loaded = Settings(auth=AuthSettings.model_validate({"mode": "jwt", "jwt": jwt}))
    changes = compare(running, loaded)
    assert changes.applied == []
    assert changes.needs_restart == ["auth.jwt.secret", "auth.jwt.jwks_url", "auth.jwt.algorithms"]
    assert changes.settings == running
