"""The clients in one channel, as the relay's notices describe them. Knows no connection."""

from collections.abc import Callable, Mapping
from typing import Any

from websocket_relay.client.events import Counted, Header, Joined, Left, Member, PresenceEvent


class Members:
    """The clients in a channel with presence.

    Args:
        on_presence: called after each change.

    Attributes:
        by_client: the clients by their ids; None: not received yet, or they are too many.
        count: the number of clients; None: not received yet.
    """

    def __init__(self, on_presence: Callable[[PresenceEvent], None]) -> None:
        self.by_client: dict[str, Member] | None = None
        self.count: int | None = None
        self._on_presence = on_presence

    def on_received(self, notice: Header) -> None:
        """Process a notice of the type `presence`, `joined` or `left`."""
        if notice["type"] == "presence":
            self._replace(notice["count"], notice.get("clients"))
            return
        member, has_joined = _member_of(notice), notice["type"] == "joined"
        if self.by_client is not None:
            if has_joined:
                self.by_client[member.client] = member
            else:
                self.by_client.pop(member.client, None)
            self.count = len(self.by_client)
        self._on_presence(Joined(member) if has_joined else Left(member))

    def _replace(self, count: int, clients: list[Header] | None) -> None:
        """Replace all; report what changed while there was no connection."""
        before, self.count = self.by_client, count
        after = None if clients is None else {each["client"]: _member_of(each) for each in clients}
        self.by_client = after
        if before is not None and after is not None:
            for each in before.values():
                if each.client not in after:
                    self._on_presence(Left(each))
            for each in after.values():
                if each.client not in before:
                    self._on_presence(Joined(each))
        self._on_presence(Counted(count))


def _member_of(fields: Mapping[str, Any]) -> Member:
    return Member(fields["client"], fields["user"], fields.get("info"), fields.get("since"))
