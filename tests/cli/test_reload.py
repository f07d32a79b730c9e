"""SIGHUP: settings that can change at run time do, others are named, and errors change nothing."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from signal import SIGHUP, SIGUSR1, SIGUSR2
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
from websocket_relay import logs
from websocket_relay.cancellation import cancel_until_done
from websocket_relay.config.changes import compare
from websocket_relay.config.model import AuthSettings, LimitsSettings, Settings
from websocket_relay.outcomes import SettingsError
from websocket_relay.server import reload as reload_module
from websocket_relay.server.reload import Reload
from websockets.exceptions import InvalidStatus

from tests.support.admission import (
    assert_admitted,
    assert_invalid_token,
    connect_with_token,
    jwt_settings,
    refusal_answer,
)
from tests.support.issuer import ALL_CHANNELS, OTHER_SECRET, SECRET, make_signer, sign_token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    NO_CA,
    RelayProcess,
    StartRelay,
    eventually,
    merged,
    receive,
)

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


async def test_keys_are_read_again_when_their_files_change_and_clients_stay(
    tmp_path: Path,
) -> None:
    file, signers = tmp_path / "public.pem", [make_signer("ES256", number=n) for n in range(2)]
    secret_file, secrets = tmp_path / "secret", [SECRET, OTHER_SECRET]
    jwt = {"public_key_file": str(file), "algorithms": ["HS256", "ES256"]}
    env = {"RELAY__AUTH__JWT__SECRET_FILE": str(secret_file)}

    def write_keys(number: int) -> None:
        contents = {file: signers[number].public_pem, secret_file: secrets[number].encode()}
        for path, content in contents.items():  # at once, as Kubernetes replaces them
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").replace(path)

    def tokens(number: int) -> tuple[str, str]:
        by_secret = sign_token(secrets[number], relay=ALL_CHANNELS)
        return by_secret, signers[number].token(relay=ALL_CHANNELS)

    write_keys(0)
    settings = {"auth": {"mode": "jwt", "jwt": jwt}}
    with RelayProcess(tmp_path, settings, env=env) as relay:
        async with connect_with_token(relay, "news", tokens(0)[0]) as client:
            write_keys(1)
            for old, new in zip(tokens(0), tokens(1), strict=True):

                async def is_replaced(new: str = new) -> tuple[bool, object]:
                    try:
                        await assert_admitted(connect_with_token(relay, "other", new))
                    except InvalidStatus as refusal:
                        return False, refusal.response.status_code
                    return True, None

                await eventually(is_replaced, "the new key is in use")
                answer = await refusal_answer(connect_with_token(relay, "other", old))
                assert_invalid_token(answer, "signature")
            await client.send("hello")
            assert await receive(client) == "hello"
        file.unlink()
        event = await relay.await_log("settings not reloaded")
        assert event["problems"] == [f"auth.jwt.public_key_file: {file}: no such file"]
        await assert_admitted(connect_with_token(relay, "other", tokens(1)[1]))


async def test_keys_are_read_again_once_an_invalid_source_is_valid() -> None:
    """Otherwise a secret that was replaced before would stay in use."""
    attempts, replaced = 0, AuthSettings.model_validate(jwt_settings(secret=OTHER_SECRET))

    def load() -> Settings:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise SettingsError(["relay.yaml: limits.max_connection: unknown key"])
        return Settings(auth=replaced)

    configured: asyncio.Queue[Settings] = asyncio.Queue()
    relay = SimpleNamespace(
        configure=lambda settings, _: configured.put_nowait(settings),
        load_tokens=lambda _: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload_module, "RETRY_S", 0.01)
        patch.setattr(logs, "set_level", lambda _: None)  # it is of the process
        reloading = Reload(
            running=Settings(auth=AuthSettings.model_validate(jwt_settings())),
            load=load,
            secret_files=(),
            warnings=lambda _: (),
            relay=cast(Any, relay),
        )
        running = asyncio.create_task(reloading.run())
        reloading.request()
        assert (await asyncio.wait_for(configured.get(), PATIENCE_S)).auth == replaced
        await cancel_until_done(running)


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
    assert changes.keeps_keys, "the key file of the running settings may be gone"


@pytest.mark.fast
def test_a_file_that_is_replaced_changes_only_keys() -> None:
    running = Settings(auth=AuthSettings.model_validate(jwt_settings()))
    replaced = AuthSettings.model_validate(jwt_settings(secret=OTHER_SECRET))
    loaded = Settings(auth=replaced, limits=LimitsSettings(max_connections=1))
    changes = compare(running, loaded, only_keys=True)
    assert (changes.applied, changes.needs_restart) == (["auth.jwt.secret"], [])
    assert changes.settings.limits == running.limits


async def test_a_file_that_is_empty_or_gone_changes_nothing(relay_with: StartRelay) -> None:
    relay = relay_with()
    relay.settings_file.write_text("")
    for count, reason in enumerate(("empty", "no such file"), 1):
        relay.signal(SIGHUP)
        event = await relay.await_log("settings not reloaded", count=count)
        assert event["problems"] == [f"{relay.settings_file}: {reason}"]
        relay.settings_file.unlink(missing_ok=True)
