"""Publish to channels, subscribe to them, and reconnect automatically.

    async with Relay("ws://localhost:8443") as relay:
        await relay.publish("news", "hello")
        async for message in relay.subscribe("news", history=20):
            print(message.data)

Knows the relay's public protocol, and no server code.
"""

from websocket_relay.client.errors import (
    InvalidUrlError,
    RejectedError,
    UnavailableError,
    UnconfirmedError,
)
from websocket_relay.client.events import (
    Connected,
    Counted,
    Disconnected,
    Joined,
    Left,
    Member,
    Message,
)
from websocket_relay.client.relay import Relay
from websocket_relay.client.subscription import Subscription
from websocket_relay.client.sync import SyncRelay, SyncSubscription
from websocket_relay.outcomes import RelayError

__all__ = [
    "Connected",
    "Counted",
    "Disconnected",
    "InvalidUrlError",
    "Joined",
    "Left",
    "Member",
    "Message",
    "RejectedError",
    "Relay",
    "RelayError",
    "Subscription",
    "SyncRelay",
    "SyncSubscription",
    "UnavailableError",
    "UnconfirmedError",
]
