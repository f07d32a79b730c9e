"""The log of refusals: one line for each limit, not for each client, and no client's own errors."""

import logging
from typing import Any

import pytest
from websocket_relay import refusal_log
from websocket_relay.outcomes import Refusal

from tests.support.admission import connect_with_token, refusal_answer
from tests.support.issuer import OTHER_SECRET, SECRET, KeyServer, key_set, make_signer, sign_token
from tests.support.raw_client import upgrade_request
from tests.support.relay_process import RelayProcess, StartRelay, eventually, path_of

REFUSALS = 20
CHANNEL = "a-name-of-the-clients-choice"
QUICK_STOP = {"spread_s": 0, "timeout_s": 3}

LIMITS: list[Any] = [
    ("connections", "limits.max_connections"),
    ("connections_per_ip", "limits.max_connections_per_ip"),
    ("handshakes", "limits.max_handshakes_per_s"),
    ("channels", "channels.max_channels"),
]

REFUSED_REQUESTS = [
    (b"nonsense\r\n\r\n", "invalid_request"),
    (b"GET /" + b"x" * 70_000, "head_too_large"),
    (b"GET / HTTP/1.1\r\n", "handshake_timeout"),
    (upgrade_request(drop="Sec-WebSocket-Key"), "invalid_handshake"),
    (upgrade_request("/nowhere"), "no_such_channel"),
    (b"GET /events?since=x HTTP/1.1\r\nHost: a\r\n\r\n", "invalid_query"),
    (
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
        "content_coding",
    ),
]


async def refuse_many(relay: RelayProcess, reason: str, **headers: str) -> None:
    """Send handshakes until many were refused for a reason.

    Some may be admitted: a token bucket refills.
    """
    count = 0
    while count < REFUSALS:
        async with await relay.connect_tcp() as raw:
            await raw.send(upgrade_request(f"{path_of(CHANNEL)}?a={CHANNEL}", **headers))
            count += (await raw.read_response()).status != 101
    assert await relay.metric("websocket_refusals_total", reason=reason) == REFUSALS


async def assert_logged_once(relay: RelayProcess, reason: str, setting: str) -> None:
    """Assert that there is one warning, for the first refusal, with the setting."""
    assert await relay.stop() == 0
    (warning,) = (event for event in relay.log_events if event["level"] == "warning")
    assert (warning["event"], warning["reason"]) == ("clients refused", reason)
    assert (warning["count"], warning["setting"]) == (1, setting)
    assert CHANNEL not in "".join(relay.log_lines)


@pytest.mark.parametrize(("reason", "setting"), LIMITS)
async def test_a_limit_that_refuses_clients_is_logged_once_and_not_for_each_client(
    relay_with: StartRelay, channel: str, reason: str, setting: str
) -> None:
    section, name = setting.split(".")
    relay = relay_with(**{section: {name: 1}}, shutdown=QUICK_STOP)
    async with relay.client(channel):
        await refuse_many(relay, reason)
    await assert_logged_once(relay, reason, setting)


async def test_unavailable_signing_keys_are_logged_once_and_not_for_each_client(
    relay_with: StartRelay,
) -> None:
    known, unknown = (make_signer("ES256", f"key-{number}", number) for number in (1, 2))
    with KeyServer(key_set(known)) as server:
        jwt = {"jwks_url": server.url, "algorithms": ["ES256"]}
        relay = relay_with(auth={"mode": "jwt", "jwt": jwt}, shutdown=QUICK_STOP)
    presented = unknown.token()
    await refuse_many(relay, "signing_keys", Authorization=f"Bearer {presented}")
    await assert_logged_once(relay, "signing_keys", "auth.jwt.jwks_url")
    assert presented not in "".join(relay.log_lines)


async def test_a_refusal_by_an_error_of_the_client_is_not_logged(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}}, shutdown=QUICK_STOP)
    await refusal_answer(relay.client(channel))
    await refusal_answer(connect_with_token(relay, channel, sign_token(OTHER_SECRET)))
    await refusal_answer(connect_with_token(relay, channel, sign_token(relay={})))
    await refusal_answer(connect_with_token(relay, "no%20name", sign_token()))
    assert await relay.stop() == 0
    assert [event["level"] for event in relay.log_events if event["level"] != "info"] == []


async def test_each_refusal_has_one_debug_line_whatever_is_refused(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(
        logging={"level": "debug"}, limits={"handshake_timeout_s": 1}, shutdown=QUICK_STOP
    )
    for request, reason in REFUSED_REQUESTS:
        async with await relay.connect_tcp() as raw:
            await raw.send(request)
            response = await raw.read_response()
            assert response.status >= 400, reason
        await relay.await_metric("websocket_refusals_total", 1, reason=reason)
    assert await relay.stop() == 0
    logged = [event["reason"] for event in relay.log_events if event["event"] == "refused"]
    assert logged == [reason for _, reason in REFUSED_REQUESTS]


@pytest.mark.fast
async def test_further_refusals_are_logged_as_one_line_at_the_end_of_the_interval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The interval is 0.1 s here instead of a minute."""
    monkeypatch.setattr(refusal_log, "INTERVAL_S", 0.1)
    refusals = refusal_log.RefusalLog()

    def logged_counts(reason: str) -> list[int]:
        events = [vars(record) for record in caplog.records]
        return [event["count"] for event in events if event["reason"] == reason]

    async def wait_for_counts(reason: str, counts: list[int]) -> None:
        async def look() -> tuple[bool, object]:
            return logged_counts(reason) == counts, logged_counts(reason)

        await eventually(look, f"{reason} logged as {counts}")

    with caplog.at_level(logging.WARNING, "websocket_relay.refusal_log"):
        for _ in range(8):
            refusals.record_refusal(Refusal.HANDSHAKES)
        refusals.record_refusal(Refusal.CHANNELS)
        refusals.record_refusal(Refusal.TOKEN_REQUIRED)
        assert (logged_counts("handshakes"), logged_counts("channels")) == ([1], [1])
        await wait_for_counts("handshakes", [1, 7])
        assert logged_counts("channels") == [1], "logged again without another refusal"
        assert logged_counts("token_required") == []
