"""Who is in a channel: what clients learn of each other, on one relay."""

import json
from contextlib import AsyncExitStack
from typing import Any

import pytest
from websockets.asyncio.client import connect

from tests.support.accounting import assert_counters_add_up_at_rest
from tests.support.admission import jwt_settings, refusal_answer
from tests.support.events_client import subscribe_events
from tests.support.http_requests import TEXT_TYPE, publish_by_post
from tests.support.issuer import sign_token
from tests.support.relay_process import RelayProcess, StartRelay, eventually
from tests.support.relay_v1 import RELAY_V1, Notice, RelayV1Client, connect_relay_v1, open_relay_v1

LOBBY = "chat.1"
GRACE_S = 0.3


@pytest.fixture
def relay(relay_with: StartRelay) -> RelayProcess:
    return relay_with(presence={"channels": ["chat.*"], "grace_s": GRACE_S})


async def who(relay: RelayProcess, channel: str = LOBBY, token: str = "") -> dict[str, Any]:
    """Return who is in a channel."""
    response = await relay.get(f"/channels/{channel}/presence", token)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def watch(client: RelayV1Client, channel: str = LOBBY) -> list[str]:
    """Subscribe with presence; return the ids of the clients that are there."""
    number = await client.send("subscribe", channel=channel, presence=True)
    assert (await client.next_notice("subscribed"))["id"] == number
    found = await client.next_notice("presence")
    assert (found["id"], found["count"]) == (number, len(found["clients"]))
    return [each["client"] for each in found["clients"]]


def upgrade_with_presence(relay: RelayProcess, channel: str, **options: Any) -> connect:
    """Connect with relay.v1 to a channel and its presence."""
    path = f"/channels/{channel}?presence=true"
    return relay.client(path=path, subprotocols=[RELAY_V1], **options)


def brief(notice: Notice) -> tuple[str, str]:
    """Return the type of a notice, and the client."""
    return notice["type"], notice["client"]


async def next_change(client: RelayV1Client) -> tuple[str, str]:
    """Return the next notice, of a client that joined or left."""
    return brief(await client.next_notice())


async def test_a_watcher_learns_who_is_here_and_then_who_joins_and_leaves(
    relay: RelayProcess,
) -> None:
    async with open_relay_v1(relay) as watcher, open_relay_v1(relay) as other:
        own = watcher.welcome["client"]
        await other.subscribe(LOBBY)
        here = await watch(watcher)
        assert sorted(here) == sorted([own, other.welcome["client"]])
        async with connect_relay_v1(relay, LOBBY) as third:
            joined = ("joined", third.welcome["client"])
            assert await next_change(watcher) == joined
            assert await relay.metric("websocket_presence_clients") == 3
        assert await next_change(watcher) == ("left", third.welcome["client"])
        assert await relay.metric("websocket_presence_clients") == 2
        for change, count in (("joined", 3), ("left", 1)):
            name = "websocket_presence_changes_total"
            assert await relay.metric(name, change=change) == count
        await other.send("unsubscribe", channel=LOBBY)
        assert await next_change(watcher) == ("left", other.welcome["client"])
        await watcher.send("presence", channel=LOBBY)
        found = await watcher.next_notice("presence")
        assert [each["client"] for each in found["clients"]] == [own]
        assert found["count"] == 1


async def test_notices_of_a_storm_precede_the_messages_and_lists_that_follow(
    relay: RelayProcess,
) -> None:
    async with AsyncExitStack() as stack:
        watcher, *others = [
            await stack.enter_async_context(open_relay_v1(relay)) for _ in range(12)
        ]
        await watch(watcher)
        for other in others:
            await other.send("subscribe", channel=LOBBY)
            await other.publish(other.welcome["client"], channel=LOBBY)
            await watcher.send("presence", channel=LOBBY)
        joined: list[str] = []
        answers = messages = 0
        while min(answers, messages) < len(others):
            notice, message = await watcher.receive()
            kind = notice.get("type")
            if kind == "joined":
                joined.append(notice["client"])
            elif kind == "presence":
                answers += 1
                assert notice["count"] == len(joined) + 1
            elif kind is None:
                messages += 1
                assert message in joined
        assert joined == [other.welcome["client"] for other in others]


async def test_who_begins_to_watch_in_a_storm_gets_a_list_and_then_what_changes(
    relay: RelayProcess,
) -> None:
    async with AsyncExitStack() as stack:
        watchers = [await stack.enter_async_context(open_relay_v1(relay)) for _ in range(12)]
        for watcher in watchers:
            await watcher.send("subscribe", channel=LOBBY, presence=True)
        everyone = {watcher.welcome["client"] for watcher in watchers}
        for watcher in watchers:
            await watcher.next_notice("subscribed")
            listed = await watcher.next_notice("presence")
            known = [each["client"] for each in listed["clients"]]
            assert watcher.welcome["client"] in known
            while len(known) < len(everyone):
                kind, client = await next_change(watcher)
                assert (kind, client in known) == ("joined", False)
                known.append(client)
            assert set(known) == everyone
    await assert_counters_add_up_at_rest(relay)


async def test_a_stream_has_events_of_who_is_here_and_who_joins_and_leaves(
    relay: RelayProcess,
) -> None:
    async with (
        connect_relay_v1(relay, LOBBY) as client,
        subscribe_events(relay, LOBBY, "?presence=true") as events,
    ):
        first = await events.next_event()
        assert first.name == "presence"
        found = json.loads(first.data)
        assert (found["channel"], found["count"]) == (LOBBY, 2)
        await client.send("unsubscribe", channel=LOBBY)
        left = await events.next_event()
        assert left.name == "left"
        assert json.loads(left.data) == {
            "type": "left",
            "channel": LOBBY,
            "client": client.welcome["client"],
            "user": "",
        }
        await client.subscribe(LOBBY)
        assert (await events.next_event()).name == "joined"


async def test_a_stream_of_several_channels_names_the_channel_of_each_change(
    relay: RelayProcess,
) -> None:
    query = "?channel=chat.a&channel=chat.b&channel=other&presence=true"
    async with subscribe_events(relay, None, query) as events, open_relay_v1(relay) as client:
        first = [json.loads((await events.next_event()).data) for _ in range(2)]
        assert [(each["channel"], each["count"]) for each in first] == [
            ("chat.a", 1),
            ("chat.b", 1),
        ]
        await client.subscribe("other")
        await client.subscribe("chat.b")
        joined = json.loads((await events.next_event()).data)
        assert (joined["type"], joined["channel"]) == ("joined", "chat.b")


async def test_clients_of_all_kinds_are_here_and_plain_ones_are_not_notified(
    relay: RelayProcess,
) -> None:
    async with (
        relay.client(LOBBY) as plain,
        subscribe_events(relay, LOBBY),
        connect_relay_v1(relay, LOBBY),
    ):
        found = await who(relay)
        assert found["count"] == len({each["client"] for each in found["clients"]}) == 3
        async with relay.client(LOBBY):
            assert (await who(relay))["count"] == 4
        await publish_by_post(relay, LOBBY, b"message", TEXT_TYPE)
        assert await plain.recv() == "message"
    await await_empty(relay)
    await assert_counters_add_up_at_rest(relay)


async def await_empty(relay: RelayProcess) -> None:
    """Wait until no client is in the chat."""

    async def check() -> tuple[bool, object]:
        found = await who(relay)
        return found == {"count": 0, "clients": []}, found

    await eventually(check, "an empty lobby")


async def test_changes_and_messages_are_in_one_order(relay: RelayProcess) -> None:
    async with open_relay_v1(relay) as watcher:
        await watch(watcher)
        for number in range(5):
            async with connect_relay_v1(relay, LOBBY) as client:
                await client.publish(str(number))
                await client.next_notice("published")
            assert await next_change(watcher) == ("joined", client.welcome["client"])
            assert (await watcher.receive())[1] == str(number)
            assert await next_change(watcher) == ("left", client.welcome["client"])


async def test_a_client_that_resumes_its_session_in_time_was_not_away(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(presence={"channels": ["*"], "grace_s": 60})
    async with open_relay_v1(relay) as watcher:
        await watch(watcher)
        async with connect_relay_v1(relay, LOBBY) as client:
            first = client.welcome
            client.connection.transport.abort()
        assert await next_change(watcher) == ("joined", first["client"])
        await relay.await_metric("websocket_connected_clients", 1)
        async with open_relay_v1(relay, f"/?session={first['session']}") as again:
            assert again.welcome["resumed"] is True
            assert again.welcome["client"] == first["client"]
            await again.subscribe(LOBBY)
            await again.publish("here", channel=LOBBY)
            assert (await watcher.receive())[1] == "here"
            assert (await who(relay))["count"] == 2
        assert await next_change(watcher) == ("left", first["client"])


async def test_a_client_that_does_not_return_has_left_after_the_grace(
    relay: RelayProcess,
) -> None:
    async with open_relay_v1(relay) as watcher:
        await watch(watcher)
        async with connect_relay_v1(relay, LOBBY) as client:
            client.connection.transport.abort()
        name = client.welcome["client"]
        assert await next_change(watcher) == ("joined", name)
        assert await next_change(watcher) == ("left", name)
        async with open_relay_v1(relay, f"/?session={client.welcome['session']}") as again:
            await again.subscribe(LOBBY)
            assert await next_change(watcher) == ("joined", name)


async def test_a_client_may_resume_after_a_close_unless_its_code_is_final(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(presence={"channels": ["*"], "grace_s": 60})
    async with open_relay_v1(relay) as watcher:
        await watch(watcher)
        for code, is_final in ((4900, False), (1000, True), (4000, False), (1001, True)):
            async with connect_relay_v1(relay, LOBBY) as client:
                name, session = client.welcome["client"], client.welcome["session"]
                assert await next_change(watcher) == ("joined", name)
                await client.connection.close(code)
            await relay.await_metric("websocket_connected_clients", 1)
            if is_final:
                assert await next_change(watcher) == ("left", name)
            async with open_relay_v1(relay, f"/?session={session}") as again:
                await again.subscribe(LOBBY)
                if is_final:
                    assert await next_change(watcher) == ("joined", name)
                assert (await who(relay))["count"] == 2
            assert await next_change(watcher) == ("left", name)


async def test_a_client_without_a_session_has_left_at_once(relay_with: StartRelay) -> None:
    relay = relay_with(presence={"channels": ["*"], "grace_s": 60})
    async with open_relay_v1(relay) as watcher:
        await watch(watcher)
        async with relay.client(LOBBY) as plain:
            kind, name = await next_change(watcher)
            assert kind == "joined"
            plain.transport.abort()
        assert await next_change(watcher) == ("left", name)


async def test_the_user_and_the_info_of_its_token_are_shown_of_a_client(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(auth=jwt_settings(), presence={"channels": ["*"]})
    permissions = {"subscribe": ["*"], "info": {"name": "Ada", "color": [1, 2]}}
    token = sign_token(sub="ada", relay=permissions)
    other = sign_token(sub="bob", relay={"subscribe": ["*"]})
    async with (
        open_relay_v1(relay, additional_headers={"Authorization": f"Bearer {other}"}) as watcher,
    ):
        await watch(watcher)
        async with connect_relay_v1(
            relay, LOBBY, additional_headers={"Authorization": f"Bearer {token}"}
        ):
            joined = await watcher.next_notice("joined")
            assert (joined["user"], joined["info"]) == ("ada", permissions["info"])
            found = await who(relay, token=other)
            shown = {each["user"]: each.get("info") for each in found["clients"]}
            assert shown == {"ada": permissions["info"], "bob": None}
        assert (await watcher.next_notice("left"))["user"] == "ada"


async def test_a_user_with_a_lone_surrogate_in_the_name_is_shown_like_others(
    relay_with: StartRelay,
) -> None:
    """JSON has an escape for it, UTF-8 has no bytes."""
    relay = relay_with(auth=jwt_settings(), presence={"channels": ["*"]})
    token = sign_token(sub="\ud800", relay={"subscribe": ["*"]})
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        open_relay_v1(relay, additional_headers=headers) as client,
        subscribe_events(relay, LOBBY, "?presence=true", headers=headers) as events,
    ):
        await client.send("subscribe", channel=LOBBY, presence=True)
        await client.next_notice("subscribed")
        shown = [
            await client.next_notice("presence"),
            json.loads((await events.next_event()).data),
            await who(relay, token=token),
        ]
        assert {each["user"] for found in shown for each in found["clients"]} == {"\ud800"}


async def test_who_is_here_is_for_those_who_may_subscribe(relay_with: StartRelay) -> None:
    relay = relay_with(auth=jwt_settings(), presence={"channels": [LOBBY, "lobby"]})
    token = sign_token(relay={"subscribe": ["lobby"], "publish": ["*"]})
    headers = {"Authorization": f"Bearer {token}"}
    path = f"/channels/{LOBBY}/presence"
    for name in (LOBBY, "without-presence"):
        events = f"/channels/{name}/events?presence=true"
        assert (await relay.get(events)).status_code == 401
        assert (await relay.get(events, token)).status_code == 403
        for credentials, status in (({}, 401), (headers, 403)):
            upgrade = upgrade_with_presence(relay, name, additional_headers=credentials)
            assert (await refusal_answer(upgrade)).status_code == status
    assert (await relay.get(path)).status_code == 401
    assert (await relay.get(path, token)).status_code == 403
    assert (await relay.get("/channels/lobby/presence", token)).status_code == 200
    async with open_relay_v1(relay, additional_headers=headers) as client:
        await client.send("presence", channel=LOBBY)
        assert (await client.next_notice("error"))["status"] == 403


async def test_in_a_channel_without_presence_no_client_is_shown(relay: RelayProcess) -> None:
    response = await relay.get("/channels/lobby/presence")
    assert (response.status_code, response.text) == (404, "no presence in this channel\n")
    response = await relay.get("/channels/lobby/events?presence=true")
    assert (response.status_code, response.text) == (404, "no presence in this channel\n")
    response = await relay.get(f"/channels/{LOBBY}/events?presence=1")
    assert response.status_code == 400
    answer = await refusal_answer(upgrade_with_presence(relay, "lobby"))
    assert (answer.status_code, answer.body) == (404, b"no presence in this channel\n")
    async with open_relay_v1(relay, "/?presence=true") as client:  # it subscribes to none
        for kind, flags in (("presence", {}), ("subscribe", {"presence": True})):
            fields: dict[str, Any] = {"channel": "lobby", **flags}
            await client.send(kind, **fields)
            error = await client.next_notice("error")
            assert (error["status"], error["reason"]) == (404, "no presence in this channel")
        await client.send("subscribe", channel=LOBBY, presence=1)
        assert (await client.next_notice("error"))["status"] == 400
    assert await relay.metric("websocket_refusals_total", reason="no_presence") == 5


async def test_of_a_full_channel_only_the_number_of_clients_is_sent(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(presence={"channels": ["*"], "max_clients": 2})
    async with open_relay_v1(relay) as watcher:
        await watch(watcher)
        async with relay.client(LOBBY):
            assert (await watcher.next_notice())["type"] == "joined"
            async with relay.client(LOBBY), relay.client(LOBBY):
                number = await watcher.next_notice("presence")
                while number["count"] < 4:  # sent once a second
                    number = await watcher.next_notice("presence")
                assert "clients" not in number
                assert await who(relay) == {"count": 4}
            number = await watcher.next_notice("presence")
            while number["count"] > 2:
                number = await watcher.next_notice("presence")
            assert "clients" not in number, "nine tenths of the bound are less"
        listed = await watcher.next_notice("presence")
        assert (listed["count"], len(listed["clients"])) == (1, 1)
        async with relay.client(LOBBY):
            assert (await watcher.next_notice())["type"] == "joined"


async def test_a_channel_with_a_bound_of_one_client_is_listed_again(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(presence={"channels": ["*"], "max_clients": 1})
    async with open_relay_v1(relay) as watcher:
        await watch(watcher)
        async with relay.client(LOBBY):
            assert (await watcher.next_notice("presence"))["count"] == 2
        listed = await watcher.next_notice("presence")
        assert (listed["count"], len(listed["clients"])) == (1, 1)


async def test_a_client_that_subscribes_anew_was_not_away(relay: RelayProcess) -> None:
    async with open_relay_v1(relay) as watcher, open_relay_v1(relay) as other:
        await watch(watcher)
        await other.subscribe(LOBBY)
        joined = await next_change(watcher)
        for _ in range(3):
            await other.publish("message", channel=LOBBY)  # the fan-out may delay what follows
            await other.send("unsubscribe", channel=LOBBY)
            await other.send("subscribe", channel=LOBBY, history=1)
            assert (await watcher.receive())[1] == "message"
        await other.publish("last", channel=LOBBY)
        assert (await watcher.receive())[1] == "last"
        assert (await who(relay))["count"] == 2
        await other.send("unsubscribe", channel=LOBBY)
        assert await next_change(watcher) == ("left", joined[1])


async def test_two_connections_of_one_session_are_one_client(relay: RelayProcess) -> None:
    async with open_relay_v1(relay) as watcher, open_relay_v1(relay) as first:
        await first.subscribe(LOBBY)
        assert len(await watch(watcher)) == 2
        session = first.welcome["session"]
        async with open_relay_v1(relay, f"/?session={session}") as second:
            await second.subscribe(LOBBY)
            await second.publish("message", channel=LOBBY)
            assert (await watcher.receive())[1] == "message"
            assert (await who(relay))["count"] == 2
        assert await next_change(watcher) == ("left", first.welcome["client"])
