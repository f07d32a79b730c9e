"""Who is notified of joins and leaves in a channel, without a connection."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from websocket_relay.channels.channel import Channel
from websocket_relay.wire.delivery_format import PLAIN_FORMAT

pytestmark = pytest.mark.fast


class Host:
    """What the channel requires of its broadcaster; a delayed call is kept."""

    def __init__(self) -> None:
        self.shared: Any = SimpleNamespace(
            publish_limits=(), pending_fan_out=SimpleNamespace(bytes=0)
        )
        self.delayed: list[Callable[[], None]] = []

    def schedule(self, work: object) -> None:
        """Write nothing."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Keep a call."""
        self.delayed.append(callback)

    def on_left(self, channel: Channel, client: object) -> None:
        """Record nothing."""


class Member:
    """A connection that is subscribed to the channel."""

    is_lagging = False
    protocol = None


def test_a_member_that_ends_before_it_is_notified_for_the_first_time_watches_no_more() -> None:
    host = Host()
    channel: Any = Channel(
        "news",
        ["news"],
        host,  # type: ignore[arg-type]
        pending_limit_bytes=1000,
        batch_limit_bytes=1000,
        deflate_from_bytes=1000,
    )
    first, second, third, fourth = (Member() for _ in range(4))
    added = list[Member]()

    def end_third() -> None:
        added.append(second)
        channel.remove_member(third, PLAIN_FORMAT)

    for member in (first, second, third, fourth):
        channel.add_member(member, PLAIN_FORMAT)
    channel.add_watcher(first, PLAIN_FORMAT, lambda: None)
    for _ in range(2):  # the second one is held for a moment
        channel.notify_watchers({"type": "joined"})
    channel.add_watcher(second, PLAIN_FORMAT, end_third)
    channel.add_watcher(third, PLAIN_FORMAT, lambda: added.append(third))
    channel.add_watcher(fourth, PLAIN_FORMAT, lambda: added.append(fourth))
    assert not added
    (write_notices,) = host.delayed
    write_notices()
    assert added == [second, fourth]
