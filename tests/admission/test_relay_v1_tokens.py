"""Tokens of relay.v1 clients: permissions of each channel, renewal, expiry, users of sessions."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from tests.support.admission import jwt_settings
from tests.support.issuer import (
    OTHER_SECRET,
    KeyServer,
    key_set,
    make_signer,
    sign_token,
)
from tests.support.relay_process import RelayProcess, StartRelay, await_close, receive
from tests.support.relay_v1 import (
    Notice,
    RelayV1Client,
    connect_relay_v1,
    open_relay_v1,
    path_with_query,
)

ALL: dict[str, Any] = {"subscribe": ["*"], "publish": ["*"]}
NOT_AUTHORIZED = {"status": 403, "reason": "not authorized for this channel"}


@pytest.fixture(scope="module")
def shared_guarded_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path_factory.mktemp("guarded"), {"auth": jwt_settings()}) as relay:
        yield relay


@pytest.fixture
async def jwt_relay(shared_guarded_relay: RelayProcess) -> AsyncIterator[RelayProcess]:
    """A relay that requires tokens signed with the secret."""
    await shared_guarded_relay.await_metric("websocket_connected_clients", 0)
    yield shared_guarded_relay
    assert shared_guarded_relay.unexpected_lines == []


def bearer(token: str) -> dict[str, Any]:
    """Return the options of a client that connects with a token."""
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


def open_with(
    relay: RelayProcess, token: str, path: str = "/"
) -> AbstractAsyncContextManager[RelayV1Client]:
    return open_relay_v1(relay, path, **bearer(token))


def token_of(*, sub: str | None = "ann", exp: float | None = None, **permissions: Any) -> str:
    """Sign a token of a user with permissions."""
    claims: dict[str, Any] = {"exp": int(exp)} if exp is not None else {}
    return sign_token(sub=sub, relay=permissions, **claims)


async def renew(client: RelayV1Client, token: str) -> Notice:
    """Replace the token; return the answer, which may follow notices of lost channels."""
    number = await client.send("token", token=token)
    while True:
        header, _ = await client.receive()
        if header.get("type") in {"token", "error"}:
            assert header["id"] == number
            return header
        if header.get("type") == "unsubscribed":
            client.notices.append(header)


async def test_each_subscription_and_each_publish_needs_its_permission(
    jwt_relay: RelayProcess, channel: str
) -> None:
    token = token_of(subscribe=[f"{channel}.in*"], publish=[f"{channel}.out"])
    before = await jwt_relay.metric("websocket_refusals_total", reason="not_authorized")
    async with (
        open_with(jwt_relay, token) as client,
        open_with(jwt_relay, sign_token()) as other,
    ):
        for name, answer in (
            (f"{channel}.in", "subscribed"),
            (f"{channel}.in.more", "subscribed"),
            (f"{channel}.out", "error"),
            (channel, "error"),
        ):
            received = await client.subscribe(name)
            assert received["type"] == answer
            if answer == "error":
                number = client.last_id
                assert received == {"type": "error", "id": number, **NOT_AUTHORIZED}
            else:
                await client.next_notice("live")
        await other.subscribe(f"{channel}.out")
        for name in (f"{channel}.in", channel, f"{channel}.out"):
            await client.publish(f"to {name}", channel=name)
        errors = [await client.next_notice("error") for _ in range(2)]
        assert [(each["status"], each["reason"]) for each in errors] == [
            (403, "not authorized for this channel")
        ] * 2
        assert (await client.next_notice("published"))["id"] == client.last_id
        assert await other.next_message() == f"to {channel}.out"
    after = await jwt_relay.metric("websocket_refusals_total", reason="not_authorized")
    assert after == before + 4


async def test_a_client_whose_token_permits_no_channel_opens_a_connection_on_the_root_path(
    jwt_relay: RelayProcess, channel: str
) -> None:
    async with open_with(jwt_relay, sign_token(relay={})) as client:
        assert (await client.subscribe("default"))["status"] == 403
        await client.publish("message", channel="default")
        assert (await client.next_notice("error"))["status"] == 403
        assert (await renew(client, sign_token()))["type"] == "token"
        assert (await client.subscribe(channel))["type"] == "subscribed"


async def test_a_path_needs_the_permission_of_its_channel(
    jwt_relay: RelayProcess, channel: str
) -> None:
    async with await jwt_relay.connect_tcp() as raw:
        await raw.send(
            upgrade_with_token(f"/channels/{channel}", token_of(subscribe=[f"{channel}.other"]))
        )
        assert (await raw.read_response()).status == 403


def upgrade_with_token(path: str, token: str) -> bytes:
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: relay.v1",
        f"Authorization: Bearer {token}",
    ]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


async def test_without_a_token_a_client_of_relay_v1_is_refused(jwt_relay: RelayProcess) -> None:
    async with await jwt_relay.connect_tcp() as raw:
        await raw.send(upgrade_with_token("/", ""))
        assert (await raw.read_response()).status == 401


# Renewal


async def test_permissions_of_a_new_token_count_at_once_and_lost_channels_end(
    jwt_relay: RelayProcess, channel: str
) -> None:
    kept, lost = f"{channel}.kept", f"{channel}.lost"
    async with (
        connect_relay_v1(jwt_relay, lost, **bearer(token_of(**ALL))) as client,
        open_with(jwt_relay, sign_token()) as other,
    ):
        await client.next_notice("live")
        await client.subscribe(kept)
        await client.next_notice("live")
        assert (await renew(client, token_of(subscribe=[kept], publish=[])))["type"] == "token"
        assert client.notices == [{"type": "unsubscribed", "channel": lost, **NOT_AUTHORIZED}]
        for name in (lost, kept):
            await other.publish(f"to {name}", channel=name)
        assert await client.next_message() == f"to {kept}"
        await client.publish("not permitted any more", channel=kept)
        assert (await client.next_notice("error"))["status"] == 403
        assert (await client.subscribe(lost))["status"] == 403
        assert (await renew(client, token_of(**ALL)))["type"] == "token"
        assert (await client.subscribe(lost, history=1))["type"] == "subscribed"
        client.position = ""  # the replayed message is older than the last one
        assert await client.next_message() == f"to {lost}"


async def test_tokens_are_renewed_again_and_again_and_the_expiry_moves(
    jwt_relay: RelayProcess, channel: str
) -> None:
    expiry = time.time() + 2
    async with (
        open_with(jwt_relay, token_of(exp=expiry, **ALL)) as renewed,
        open_with(jwt_relay, token_of(exp=expiry, **ALL)) as expiring,
    ):
        for _ in range(5):
            assert (await renew(renewed, token_of(exp=time.time() + 60, **ALL)))["type"] == "token"
        assert await await_close(expiring.connection) == (3000, "token expired")
        await renewed.send("publish", "after the first expiry", channel=channel)
        await renewed.next_notice("published")
        shortened = int(time.time()) + 2
        assert (await renew(renewed, token_of(exp=shortened, **ALL)))["type"] == "token"
        assert await await_close(renewed.connection) == (3000, "token expired")
        assert time.time() >= shortened


async def test_an_invalid_token_is_refused_and_the_one_before_still_counts(
    jwt_relay: RelayProcess, channel: str
) -> None:
    before = await jwt_relay.metric("websocket_refusals_total", reason="invalid_token")
    cases = {
        "": "malformed",
        "x": "malformed",
        "\ud800": "malformed",
        "\ud800.\udfff.\ud800": "malformed",
        "ä.b.c": "malformed",
        "x" * 30_000: "malformed",
        sign_token(OTHER_SECRET, sub="ann"): "signature",
        token_of(exp=time.time() - 5, **ALL): "expired",
    }
    async with connect_relay_v1(jwt_relay, channel, **bearer(token_of(**ALL))) as client:
        await client.next_notice("live")
        for token, problem in cases.items():
            number = await client.send("token", token=token)
            assert await client.next_notice() == {
                "type": "error",
                "id": number,
                "status": 401,
                "reason": f"invalid token: {problem}",
            }, token[:40]
        await client.publish("still permitted")
        assert await client.next_message() == "still permitted"
    after = await jwt_relay.metric("websocket_refusals_total", reason="invalid_token")
    assert after == before + len(cases)


async def test_a_token_of_another_user_is_refused(jwt_relay: RelayProcess, channel: str) -> None:
    async with open_with(jwt_relay, token_of(subscribe=[channel])) as client:
        for user in ("bob", "", None, "Ann"):
            answer = await renew(client, token_of(sub=user, **ALL))
            assert (answer["status"], answer["reason"]) == (401, "invalid token: other user")
        await client.publish("not permitted", channel=channel)
        assert (await client.next_notice("error"))["status"] == 403
        assert (await client.subscribe(channel))["type"] == "subscribed"


async def test_a_client_without_a_user_renews_with_a_token_without_one(
    jwt_relay: RelayProcess,
) -> None:
    async with open_with(jwt_relay, token_of(sub=None, **ALL)) as client:
        assert (await renew(client, token_of(sub=None, **ALL)))["type"] == "token"
        assert (await renew(client, token_of(sub="ann", **ALL)))["status"] == 401


async def test_a_user_with_a_lone_surrogate_in_the_name_has_a_session_like_others(
    jwt_relay: RelayProcess, channel: str
) -> None:
    """JSON has an escape for it, UTF-8 has no bytes."""
    token = token_of(sub="\ud800", **ALL)
    async with open_with(jwt_relay, token) as client:
        await client.send("publish", "message", channel=channel)
        await client.next_notice("published")
    path = path_with_query(channel, session=client.welcome["session"])
    async with open_with(jwt_relay, token, path) as resumed:
        assert resumed.welcome["resumed"] is True


async def test_a_token_is_verified_with_keys_that_are_fetched_first(
    relay_with: StartRelay, channel: str
) -> None:
    """Other commands are carried out in the meantime, and a second token is refused."""
    first, second = make_signer("ES256", "first"), make_signer("ES256", "second", 1)
    claims: dict[str, Any] = {"sub": "ann", "relay": ALL}
    with KeyServer(key_set(first)) as server:
        jwt = {"jwks_url": server.url, "algorithms": ["ES256"]}
        relay = relay_with(auth={"mode": "jwt", "jwt": jwt})
        async with open_with(relay, first.token(**claims)) as client:
            server.body = key_set(first, second)
            server.may_answer.clear()
            renewal = await client.send("token", token=second.token(**claims))
            other = await client.send("token", token=second.token(**claims))
            refused = await client.next_notice("error")
            assert (refused["id"], refused["status"]) == (other, 400)
            await client.send("publish", "meanwhile", channel=channel)
            await client.next_notice("published")
            server.may_answer.set()
            assert await client.next_notice() == {"type": "token", "id": renewal}
            assert (await renew(client, first.token(**claims)))["type"] == "token"


async def test_a_client_that_disconnects_while_its_token_is_verified_leaves_nothing(
    relay_with: StartRelay,
) -> None:
    first, second = make_signer("ES256", "first"), make_signer("ES256", "second", 1)
    with KeyServer(key_set(first)) as server:
        jwt = {"jwks_url": server.url, "algorithms": ["ES256"]}
        relay = relay_with(auth={"mode": "jwt", "jwt": jwt})
        async with open_with(relay, first.token(relay=ALL)) as client:
            server.body = key_set(first, second)
            server.may_answer.clear()
            await client.send("token", token=second.token(relay=ALL, exp=int(time.time()) + 1))
            await client.send("ping")
            await client.next_notice("pong")
            client.connection.transport.abort()
        await relay.await_metric("websocket_connected_clients", 0)
        server.may_answer.set()
        async with open_with(relay, second.token(relay=ALL)) as client:
            await client.send("ping")
            await client.next_notice("pong")
        assert [event for event in relay.log_events if event["level"] == "error"] == []


async def test_a_channel_that_is_lost_during_its_replay_ends_with_a_notice(
    jwt_relay: RelayProcess, channel: str
) -> None:
    async with open_with(jwt_relay, token_of(**ALL)) as client:
        await client.send("subscribe", channel=channel, since="99999999999999-0-0")
        assert (await renew(client, token_of(subscribe=[])))["type"] == "token"
        notices = [each for each in client.notices if each["type"] == "unsubscribed"]
        assert notices == [{"type": "unsubscribed", "channel": channel, **NOT_AUTHORIZED}]


# Expiry, and the users of sessions


async def test_a_client_is_closed_when_its_token_expires(
    jwt_relay: RelayProcess, channel: str
) -> None:
    expiry = int(time.time()) + 2
    token = token_of(exp=expiry, **ALL)
    async with connect_relay_v1(jwt_relay, channel, **bearer(token)) as client:
        await client.publish("in time")
        assert await client.next_message() == "in time"
        assert await await_close(client.connection) == (3000, "token expired")
        assert time.time() >= expiry


async def test_a_session_is_resumed_with_another_token_of_its_user_only(
    jwt_relay: RelayProcess, channel: str
) -> None:
    async with open_with(jwt_relay, token_of(sub="ann", **ALL)) as client:
        await client.publish("message", channel=channel)
        position = (await client.next_notice("published"))["position"]
    session = client.welcome["session"]
    path = f"/?session={session}"
    for user in ("bob", "", None):
        async with open_with(jwt_relay, token_of(sub=user, **ALL), path) as other:
            assert other.welcome["resumed"] is False
            assert other.welcome["session"] != session
            await other.publish("of another session", id=1, channel=channel)
            assert (await other.next_notice("published"))["position"] != position
    permissions: dict[str, Any] = {"subscribe": [], "publish": [channel]}
    async with open_with(jwt_relay, token_of(sub="ann", **permissions), path) as resumed:
        assert resumed.welcome["resumed"] is True
        assert resumed.welcome["session"] == session
        await resumed.publish("message", id=1, channel=channel)
        assert (await resumed.next_notice("published"))["position"] == position


async def test_another_user_does_not_close_the_connection_of_a_session(
    jwt_relay: RelayProcess,
) -> None:
    async with open_with(jwt_relay, token_of(sub="ann", **ALL)) as client:
        path = f"/?session={client.welcome['session']}"
        async with open_with(jwt_relay, token_of(sub="bob", **ALL), path) as other:
            assert other.welcome["resumed"] is False
            for each in (client, other):
                await each.send("ping")
                await each.next_notice("pong")
        async with open_with(jwt_relay, token_of(sub="ann", **ALL), path):
            closed = await await_close(client.connection)
            assert closed == (1008, "session resumed elsewhere")


async def test_a_repeat_is_answered_without_the_permission_and_a_new_message_is_refused(
    jwt_relay: RelayProcess, channel: str
) -> None:
    """The message was permitted when it was relayed."""
    async with open_with(jwt_relay, token_of(**ALL)) as client:
        path = f"/?session={client.welcome['session']}"
        await client.publish("message", channel=channel)
        position = (await client.next_notice("published"))["position"]
    async with open_with(jwt_relay, token_of(subscribe=["*"]), path) as resumed:
        assert resumed.welcome["resumed"] is True
        await resumed.publish("message", id=1, channel=channel)
        assert (await resumed.next_notice("published"))["position"] == position
        await resumed.publish("new", id=2, channel=channel)
        assert (await resumed.next_notice("error"))["status"] == 403
        assert (await resumed.subscribe(channel, history=9))["type"] == "subscribed"
        assert await resumed.next_message() == "message"
        await resumed.next_notice("live")


async def test_permissions_of_plain_clients_are_not_those_of_relay_v1(
    jwt_relay: RelayProcess, channel: str
) -> None:
    """A plain client without the permission to publish is closed, one of relay.v1 is not."""
    token = token_of(subscribe=[channel])
    async with (
        connect_relay_v1(jwt_relay, channel, **bearer(token)) as client,
        jwt_relay.client(channel, **bearer(token)) as plain,
        jwt_relay.client(channel, **bearer(sign_token())) as publisher,
    ):
        await client.next_notice("live")
        await client.publish("not permitted")
        assert (await client.next_notice("error"))["status"] == 403
        await plain.send("not permitted")
        assert await await_close(plain) == (1008, "not allowed to publish")
        await publisher.send("permitted")
        assert await client.next_message() == await receive(publisher) == "permitted"
