"""The log hears of limits that keep clients out, and is not flooded by them."""

import logging
from typing import Any

import pytest
from websocket_relay.admission import refusal_log
from websocket_relay.outcomes import Refusal

from tests.support.admission import bearing, refused
from tests.support.issuer import OTHER_SECRET, SECRET, KeyServer, key_set, signer, token
from tests.support.raw_client import upgrade_request
from tests.support.relay_process import Relay, StartRelay, eventually, path_of

MANY = 20
NAME = "a-name-of-the-clients-choice"
SOON = {"spread_s": 0, "timeout_s": 3}

LIMITS: list[Any] = [
    ("connections", "limits.max_connections"),
    ("connections_per_ip", "limits.max_connections_per_ip"),
    ("handshakes", "limits.max_handshakes_per_s"),
    ("channels", "channels.max_channels"),
]


async def refuse_many(relay: Relay, reason: str, **headers: str) -> None:
    """Ask to be let in until that was refused many times."""
    while await relay.metric("websocket_refusals_total", reason=reason) < MANY:
        async with await relay.tcp() as raw:
            await raw.send(upgrade_request(f"{path_of(NAME)}?a={NAME}", **headers))
            await raw.response()


async def assert_told_once(relay: Relay, reason: str, setting: str) -> None:
    """Insist on one warning, that of the first refusal, which names the setting."""
    assert await relay.stop() == 0
    warnings = [event for event in relay.log_events if event["level"] == "warning"]
    told = [(event["event"], event["reason"], event["count"]) for event in warnings]
    assert told == [("clients refused", reason, 1)]
    assert warnings[0]["setting"] == setting
    assert NAME not in "".join(relay.log_lines)


@pytest.mark.parametrize(("reason", "setting"), LIMITS)
async def test_a_limit_that_is_hit_is_told_once_and_not_for_each_client(
    relay_with: StartRelay, channel: str, reason: str, setting: str
) -> None:
    section, name = setting.split(".")
    relay = relay_with(**{section: {name: 1}}, shutdown=SOON)
    async with relay.client(channel):
        await refuse_many(relay, reason)
    await assert_told_once(relay, reason, setting)


async def test_an_outage_of_the_issuer_is_told_once_and_not_for_each_client(
    relay_with: StartRelay,
) -> None:
    known, new = (signer("ES256", f"key-{number}", number) for number in (1, 2))
    with KeyServer(key_set(known)) as server:
        jwt = {"jwks_url": server.url, "algorithms": ["ES256"]}
        relay = relay_with(auth={"mode": "jwt", "jwt": jwt}, shutdown=SOON)
    brought = new.token()
    await refuse_many(relay, "keys", Authorization=f"Bearer {brought}")
    await assert_told_once(relay, "keys", "auth.jwt.jwks_url")
    assert brought not in "".join(relay.log_lines)


async def test_what_is_a_clients_own_fault_is_not_told(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}}, shutdown=SOON)
    await refused(relay.client(channel))
    await refused(bearing(relay, channel, token(OTHER_SECRET)))
    await refused(bearing(relay, channel, token(relay={})))
    await refused(bearing(relay, "no%20name", token()))
    assert await relay.stop() == 0
    assert [event["level"] for event in relay.log_events if event["level"] != "info"] == []


@pytest.mark.fast
async def test_refusals_of_the_same_minute_are_told_at_its_end_as_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In this process, for a minute is too long to wait."""
    monkeypatch.setattr(refusal_log, "INTERVAL_S", 0.1)
    limits = refusal_log.RefusalLog()

    def told(reason: str) -> list[int]:
        events = [vars(record) for record in caplog.records]
        return [event["count"] for event in events if event["reason"] == reason]

    async def wait_until_told(reason: str, counts: list[int]) -> None:
        async def look() -> tuple[bool, object]:
            return told(reason) == counts, told(reason)

        await eventually(look, f"{reason} told as {counts}")

    with caplog.at_level(logging.WARNING, "websocket_relay.admission.refusal_log"):
        for _ in range(8):
            limits.record_refusal(Refusal.HANDSHAKES)
        limits.record_refusal(Refusal.CHANNELS)
        limits.record_refusal(Refusal.NO_TOKEN)
        assert (told("handshakes"), told("channels")) == ([1], [1])
        await wait_until_told("handshakes", [1, 7])
        assert told("channels") == [1], "told again though nothing happened"
        assert told("no_token") == []
