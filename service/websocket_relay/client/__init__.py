"""Talk to a relay from Python: hear a channel without a gap, send to it, and come back by itself.

    async with Relay("ws://localhost:8443/channels/news") as relay:
        await relay.send("hello, everybody")
        async for message in relay:
            print(message.data)

Knows the relay by what it promises to its clients (README), and nothing of how it is made.
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
