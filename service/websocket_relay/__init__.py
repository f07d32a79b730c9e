"""A WebSocket relay, and a Python client for it.

    from websocket_relay import Relay

    async with Relay("ws://localhost:8443") as relay:
        await relay.publish("news", "hello")
        async for message in relay.subscribe("news", history=20):
            print(message.data)

The names of the client are imported on first use: the relay and its commands do not need them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from websocket_relay.client import (
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

__version__: str

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
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use; reading the version takes longer than all else here."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("websocket-relay")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    if name in __all__:
        from websocket_relay import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
