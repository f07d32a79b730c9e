"""Connect clients and their channels with presence: who enters and exits, and who is notified.

Knows no protocol and no broker.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from websocket_relay.outcomes import Close, Refusal, RefusedError
from websocket_relay.presence.presence import Presence
from websocket_relay.presence.roster import Change, Person
from websocket_relay.wire.connection import Connection

COUNTS_S = 1.0
"""Interval between two notices of how many clients are in a channel that has too many to list."""

MAX_ENCODED = 8
"""Lists of clients that are kept: each has `presence.max_clients` clients, and up to 1 MiB."""

FINAL = (
    Close.PROTOCOL_ERROR,
    Close.PUBLISH_NOT_ALLOWED,
    Close.DISCONNECTED,
)
"""After these a client does not resume its session: the relay has ended it."""

FINAL_OF_CLIENT = (1000, 1001)
"""Codes of a client that has ended its session. With another one it may resume it: relay.js closes
so when it needs another connection."""

Notify = Callable[[str, Mapping[str, object]], None]


class PresenceAttendance:
    """What presence learns of the clients here, and what they are notified of.

    Args:
        presence: of all replicas.
        max_listed: clients of one channel that are listed; of more only the number is sent.
        notify: writes a notice to the clients here that watch a channel.
    """

    def __init__(self, presence: Presence, max_listed: int, notify: Notify) -> None:
        self._presence = presence
        self._max_listed = max_listed
        # Else one client that comes and goes would have the whole list sent each second.
        self._listed_again = max(1, max_listed * 9 // 10)
        self._notify = notify
        # Channels with too many clients; whether their number has changed since it was sent.
        self._crowded: dict[str, bool] = {}
        self._encoded: dict[str, str] = {}  # by channel, since its last change
        self._changes = {"joined": 0, "left": 0}
        presence.listeners.append(self._on_change)

    async def run(self) -> None:
        """Send numbers of clients, until cancelled."""
        while True:
            await asyncio.sleep(COUNTS_S)
            for channel in [name for name, has_changed in self._crowded.items() if has_changed]:
                self._crowded[channel] = False
                fields = self._fields(channel, self._listed_again)
                if "clients" in fields:
                    del self._crowded[channel]  # they are listed again, and notified of one by one
                self._notify(channel, {"type": "presence", "channel": channel, **fields})

    def metrics(self) -> dict[str, Any]:
        """Return the values of the metrics of presence."""
        return {
            "presence_clients": len(self._presence.rosters),
            "presence_changes": dict(self._changes),
        }

    # Attendance

    def on_subscribed(self, names: Sequence[str], client: Connection) -> None:
        """Record that a client subscribes to channels."""
        identity = client.identity
        if identity is None:
            return
        since = round(time.time(), 3)
        for name in names:
            if self._presence.covers(name):
                person = Person(since, identity.client, identity.user, identity.info)
                self._presence.enter(name, person, client)

    def on_unsubscribed(self, names: Sequence[str], client: Connection) -> None:
        """Record that a client has left channels, or its connection ends."""
        identity = client.identity
        if identity is None:
            return
        code, may_return = 0, False
        if not client.is_member:  # its connection ends
            reason = client.close_reason or Close.CONNECTION_LOST
            code = client.close_code or reason.code
            is_final = code in FINAL_OF_CLIENT if reason is Close.CLIENT else reason in FINAL
            may_return = identity.may_return and not is_final
        for name in names:
            if self._presence.covers(name):
                self._presence.exit(name, identity.client, client, code=code, may_return=may_return)

    # Those who watch

    def check(self, channel: str) -> None:
        """Check that a channel has presence.

        Raises:
            RefusedError: it has none.
        """
        if not self._presence.covers(channel):
            raise RefusedError(Refusal.NO_PRESENCE)

    def covered(self, names: Sequence[str]) -> Sequence[str]:
        """Return those of some channels that have presence."""
        return [name for name in names if self._presence.covers(name)]

    def _fields(self, channel: str, max_listed: int) -> dict[str, Any]:
        """Return who is in a channel, as it is sent to a client: of too many, the number alone."""
        rosters = self._presence.rosters
        count = rosters.count(channel)
        if count > max_listed:
            return {"count": count}
        return {"count": count, "clients": [each.fields() for each in rosters.people(channel)]}

    def encoded(self, channel: str) -> str:
        """Return who is in a channel, as members of a JSON object, in ASCII.

        A client may ask as often as it likes, and many may begin to watch in one moment: this is
        computed once for each change of the roster.
        """
        if (known := self._encoded.get(channel)) is not None:
            return known
        if len(self._encoded) >= MAX_ENCODED:
            self._encoded.clear()
        text = json.dumps(self._fields(channel, self._max_listed), separators=(",", ":"))
        self._encoded[channel] = encoded = text[1:-1]
        return encoded

    def _on_change(self, change: Change) -> None:
        channel, person = change.channel, change.person
        kind = "joined" if change.joined else "left"
        self._changes[kind] += 1
        self._encoded.pop(channel, None)
        count = self._presence.rosters.count(channel)
        if channel in self._crowded or count > self._max_listed:
            self._crowded[channel] = True
            return
        fields: dict[str, object] = {
            "type": kind,
            "channel": channel,
            "client": person.client,
            "user": person.user,
        }
        if person.info is not None:
            fields["info"] = person.info
        self._notify(channel, fields)
