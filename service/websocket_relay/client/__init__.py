"""Receive a channel without gaps, send to it, and reconnect automatically.

    async with Relay("ws://localhost:8443/channels/news") as relay:
        await relay.send("hello")
        async for message in relay:
            print(message.data)

Knows the relay's public protocol, and no server code.
"""

from websocket_relay.client.errors import (
    InvalidUrlError,
    RejectedError,
    UnavailableError,
    UnconfirmedError,
)
from websocket_relay.client.events import Connected, Disconnected, Message, Unconfirmed
from websocket_relay.client.relay import MAX_MESSAGE_BYTES, Relay
from websocket_relay.outcomes import RelayError

__all__ = [
    "MAX_MESSAGE_BYTES",
    "Connected",
    "Disconnected",
    "InvalidUrlError",
    "Message",
    "RejectedError",
    "Relay",
    "RelayError",
    "UnavailableError",
    "Unconfirmed",
    "UnconfirmedError",
]
