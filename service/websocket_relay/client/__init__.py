"""Talk to a relay from Python: hear a channel without a gap, send to it, and come back by itself.

    async with Relay("ws://localhost:8443/channels/news") as relay:
        await relay.send("hello, everybody")
        async for message in relay:
            print(message.data)

Knows the relay by what it promises to its clients (README), and nothing of how it is made.
"""

from websocket_relay.client.events import Abandoned, Connected, Disconnected, Message
from websocket_relay.client.faults import AddressError, AwayError, DeniedError, UnsentError
from websocket_relay.client.relay import MAX_MESSAGE_BYTES, Relay
from websocket_relay.errors import RelayError

__all__ = [
    "MAX_MESSAGE_BYTES",
    "Abandoned",
    "AddressError",
    "AwayError",
    "Connected",
    "DeniedError",
    "Disconnected",
    "Message",
    "Relay",
    "RelayError",
    "UnsentError",
]
