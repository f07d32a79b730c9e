"""Who is in a channel, on several replicas: alike on all, also if some stop, die or stand still."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

from tests.support.brokers import Broker
from tests.support.relay_process import RelayProcess, StartReplicas, eventually
from tests.support.relay_v1 import Notice, RelayV1Client, open_relay_v1

LOBBY = "lobby"
GRACE_S = 4
PRESENCE = {"channels": ["lobby*"], "grace_s": GRACE_S}
STOP = {"spread_s": 0.2, "timeout_s": 3}


async def who(relay: RelayProcess) -> dict[str, Any]:
    """Return who is in the lobby, as one replica knows it."""
    response = await relay.get(f"/channels/{LOBBY}/presence")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def await_alike(relays: Sequence[RelayProcess], clients: set[str]) -> None:
    """Wait until all replicas know that exactly these clients are in the chat."""

    async def check() -> tuple[bool, object]:
        found = [await who(relay) for relay in relays]
        ids = [{person["client"] for person in each["clients"]} for each in found]
        return ids == [clients] * len(relays) and found == found[:1] * len(relays), found

    await eventually(check, f"{len(clients)} clients in the lobby")


@asynccontextmanager
async def watching(relay: RelayProcess) -> AsyncIterator[RelayV1Client]:
    """Connect a client that watches the lobby, and wait until it is there itself."""
    async with open_relay_v1(relay) as watcher:
        await watcher.send("subscribe", channel=LOBBY, presence=True)
        await watcher.next_notice("subscribed")
        found = await watcher.next_notice("presence")
        own = watcher.welcome["client"]
        if own not in {each["client"] for each in found["clients"]}:
            assert (await watcher.next_notice("joined"))["client"] == own
        yield watcher


@asynccontextmanager
async def in_lobby(relay: RelayProcess, session: str = "") -> AsyncIterator[RelayV1Client]:
    """Connect a client that is in the chat."""
    async with open_relay_v1(relay, f"/?session={session}" if session else "/") as client:
        await client.subscribe(LOBBY)
        yield client


async def next_change(watcher: RelayV1Client) -> tuple[str, str]:
    """Return the next notice, of a client that joined or left."""
    notice: Notice = await watcher.next_notice()
    return notice["type"], notice["client"]


async def test_all_replicas_know_who_is_here_and_notify_watchers_in_one_order(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2, presence=PRESENCE)
    async with watching(one) as first, watching(two) as second:
        watchers = {first.welcome["client"], second.welcome["client"]}
        assert await next_change(first) == ("joined", second.welcome["client"])
        async with AsyncExitStack() as clients:
            names = []
            for number in range(10):
                relay = (one, two)[number % 2]
                client = await clients.enter_async_context(in_lobby(relay))
                names.append(client.welcome["client"])
            await await_alike([one, two], watchers | set(names))
        notified = [[await next_change(watcher) for _ in range(20)] for watcher in (first, second)]
        assert notified[0] == notified[1]
        assert {change for change in notified[0] if change[0] == "joined"} == {
            ("joined", name) for name in names
        }
        await await_alike([one, two], watchers)


async def test_a_replica_that_starts_knows_who_is_here_before_it_is_ready(
    replicas_with: StartReplicas,
) -> None:
    (one,) = replicas_with(1, presence=PRESENCE)
    async with in_lobby(one) as first, in_lobby(one) as second:
        await await_alike([one], {first.welcome["client"], second.welcome["client"]})
        (two,) = await asyncio.to_thread(replicas_with, 1, presence=PRESENCE)
        found = await who(two)
        assert (found, found["count"]) == (await who(one), 2)
        async with watching(two) as watcher:
            await first.connection.close()
            assert await next_change(watcher) == ("left", first.welcome["client"])


async def test_clients_of_a_killed_replica_leave_unless_they_resume_elsewhere(
    replicas_with: StartReplicas,
) -> None:
    one, two, three = replicas_with(3, presence=PRESENCE)
    async with watching(two) as second, watching(three) as third:
        assert await next_change(second) == ("joined", third.welcome["client"])
        async with AsyncExitStack() as lost:
            clients = [await lost.enter_async_context(in_lobby(one)) for _ in range(4)]
            plain = await lost.enter_async_context(one.client(LOBBY))
            for watcher in (second, third):
                assert {(await next_change(watcher))[0] for _ in range(5)} == {"joined"}
            one.signal(SIGKILL)
            await plain.wait_closed()
            async with AsyncExitStack() as back:
                for client in clients[:2]:
                    session = client.welcome["session"]
                    again = await back.enter_async_context(in_lobby(two, session))
                    assert again.welcome["client"] == client.welcome["client"]
                left = [[await next_change(each) for _ in range(3)] for each in (second, third)]
                assert left[0] == left[1]
                gone = {name for kind, name in left[0] if kind == "left"}
                assert {client.welcome["client"] for client in clients[2:]} < gone
                assert not {client.welcome["client"] for client in clients[:2]} & gone
                staying = {client.welcome["client"] for client in (*clients[:2], second, third)}
                await await_alike([two, three], staying)


async def test_a_rolling_update_is_no_change_for_the_others(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2, presence=PRESENCE, shutdown=STOP)
    async with watching(two) as watcher, AsyncExitStack() as back:
        async with AsyncExitStack() as leaving:
            clients = [await leaving.enter_async_context(in_lobby(one)) for _ in range(20)]
            for _ in clients:
                assert (await next_change(watcher))[0] == "joined"
            one.signal()
            for client in clients:
                await client.connection.wait_closed()
                session = client.welcome["session"]
                await back.enter_async_context(in_lobby(two, session))
        assert await one.exit_code() == 0
        (three,) = await asyncio.to_thread(replicas_with, 1, presence=PRESENCE)
        names = {client.welcome["client"] for client in (*clients, watcher)}
        await await_alike([two, three], names)
        await asyncio.sleep(GRACE_S + 4)  # the end of the replica is declared by then
        await await_alike([two, three], names)
        await watcher.publish("message", channel=LOBBY)
        assert await watcher.next_message() == "message"
        assert watcher.notices == [], "no join or leave before it"


async def test_clients_of_a_replica_that_stands_still_leave_and_are_back(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2, presence=PRESENCE)
    async with watching(two) as watcher, in_lobby(one) as client:
        name = client.welcome["client"]
        assert await next_change(watcher) == ("joined", name)
        one.signal(SIGSTOP)
        assert await next_change(watcher) == ("left", name)
        one.signal(SIGCONT)
        assert await next_change(watcher) == ("joined", name)
        await await_alike([one, two], {name, watcher.welcome["client"]})


async def test_after_an_outage_of_the_broker_all_replicas_know_who_is_here(
    replicas_with: StartReplicas, broker: Broker
) -> None:
    one, two = replicas_with(2, presence=PRESENCE)
    async with in_lobby(one) as first, in_lobby(two) as second, in_lobby(two) as third:
        names = {client.welcome["client"] for client in (first, second, third)}
        await await_alike([one, two], names)
        broker.kill()
        await third.connection.close()
        await broker.start()
        await await_alike([one, two], names - {third.welcome["client"]})
