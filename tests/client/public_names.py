# pyright: strict
"""A program that uses the public names only, for type checkers. It is not run."""

import ssl
from collections.abc import Mapping
from typing import assert_type

from websocket_relay import (
    Connected,
    Counted,
    Disconnected,
    InvalidUrlError,
    Joined,
    Left,
    Member,
    Message,
    RejectedError,
    Relay,
    RelayError,
    Subscription,
    SyncRelay,
    SyncSubscription,
    UnavailableError,
    UnconfirmedError,
)


async def fetch_token() -> str:
    return ""


def on_event(event: Connected | Disconnected) -> None:
    match event:
        case Connected(is_resumed=True):
            pass
        case Connected():
            assert_type(event.is_resumed, bool)
        case Disconnected():
            assert_type(event.reason, str)
            assert_type(event.retry_s, float)


def on_presence(event: Joined | Left | Counted) -> None:
    match event:
        case Counted():
            assert_type(event.count, int)
        case Joined(member) | Left(member):
            assert_type(member.user, str)
            assert_type(member.since, float | None)


async def use_relay() -> None:
    context = ssl.create_default_context()
    async with Relay(
        ["wss://a", "wss://b"], token=fetch_token, ssl=context, on_event=on_event
    ) as relay:
        assert_type(relay, Relay)
        assert_type(relay.channel, str)
        assert_type(await relay.publish("news", "text"), str)
        assert_type(await relay.publish("news", b"binary"), str)
        subscription = relay.subscribe("news", since="1-0-0", history=1, echo=False, follow=False)
        assert_type(subscription, Subscription)
        async with subscription as entered:
            assert_type(entered, Subscription)
            assert_type(await anext(entered), Message)
            async for message in entered:
                assert_type(message.data, str | bytes)
                assert_type(message.channel, str)
                assert_type(message.position, str)
                assert_type(message.after_gap, bool)
        assert_type(subscription.unread, int)
        subscription.unsubscribe()
        team = relay.subscribe("team.1", presence=True, on_presence=on_presence)
        assert_type(team.members, Mapping[str, Member] | None)
        assert_type(team.count, int | None)
        await relay.renew_token()
        await relay.wait_closed()
        await relay.close(timeout_s=1)


def use_sync_relay() -> None:
    with SyncRelay("ws://a", token=lambda: "", patience_s=1, max_unread_bytes=1) as relay:
        assert_type(relay.publish("news", "text"), str)
        with relay.subscribe("news", history=1) as subscription:
            assert_type(subscription, SyncSubscription)
            assert_type(next(subscription), Message)
            for message in subscription:
                assert_type(message, Message)
            assert_type(subscription.members, dict[str, Member] | None)
            assert_type(subscription.count, int | None)
        relay.renew_token()
        relay.close(timeout_s=1)


def errors() -> list[RelayError]:
    try:
        return [RejectedError("a"), InvalidUrlError("a")]
    except UnavailableError as error:
        assert_type(error.retry_after_s, float | None)
        assert_type(error.code, int)
    except UnconfirmedError as error:
        assert_type(error, UnconfirmedError)
    return []
