"""Carry out what the server API asks of a replica: about its clients and its channels.

Each responder does its work in slices, see `cluster.questions`. Knows no HTTP and no broker.
"""

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.cluster.blocks import Blocks
from websocket_relay.cluster.control_log import ControlEntry
from websocket_relay.cluster.questions import Answer, Work
from websocket_relay.identity import ClientIdentity
from websocket_relay.outcomes import Close
from websocket_relay.wire.connection import Connection

log = logging.getLogger(__name__)

MAX_LISTED = 1000
"""Channels, and clients, in one answer of a replica."""

MAX_CHANNELS_LISTED = 128
"""Channels that are listed for one client."""

ORDERS: Mapping[str, Callable[[tuple[str, int, int]], int]] = {
    "clients": lambda usage: usage[1],
    "messages": lambda usage: usage[2],
}
"""What the busiest channels have most of."""


class Operations:
    """What replicas do and answer for the server API.

    Args:
        broadcaster: owns the channels.
        blocks: the users that are blocked.
        replica: name of this replica.
    """

    def __init__(self, broadcaster: Broadcaster, blocks: Blocks, replica: str) -> None:
        self._broadcaster = broadcaster
        self._blocks = blocks
        self._replica = replica

    def disconnect(self, entry: ControlEntry) -> Work:
        """Disconnect the clients that an order names, and block their user if it asks for that.

        Answers:
            Their number.
        """
        of = entry.fields["of"]
        if of["blocked_until"] is not None:
            self._blocks.decide(of["user"], of["blocked_until"], entry.position)
        return self._disconnect(self._clients_of(of), of["code"], of["reason"])

    def disconnect_user(self, user: str) -> None:
        """Disconnect the clients of a user."""
        clients = self._clients_of({"user": user})
        work = self._disconnect(clients, Close.DISCONNECTED.code, Close.DISCONNECTED.reason)
        self._broadcaster.schedule(work)

    def busiest_channels(self, entry: ControlEntry) -> Work:
        """Find the channels that have most clients, or most messages.

        Answers:
            For each its name, its clients here, and its messages.
        """
        of = entry.fields["of"]
        found = []
        for name in self._broadcaster.channel_names():
            if name.startswith(of["prefix"]):
                found.append((name, *self._broadcaster.usage_of(name)))
            yield
        top = heapq.nlargest(MAX_LISTED, found, key=ORDERS[of["order"]])
        return Answer(top, is_truncated=len(found) > MAX_LISTED)

    def list_clients(self, entry: ControlEntry) -> Work:
        """Find the clients of a channel, of a user or of both; or all.

        Answers:
            What is known of each of those that have been connected longest.
        """
        of = entry.fields["of"]
        found: list[tuple[ClientIdentity, Connection]] = []
        for client in self._clients_of(of):
            if client is not None and client.identity is not None and client.is_open:
                found.append((client.identity, client))
            yield
        first = heapq.nsmallest(of["limit"], found, key=lambda each: each[0].since)
        described = [self._describe(*each) for each in first]
        return Answer(described, is_truncated=len(found) > of["limit"])

    def _disconnect(self, clients: Iterable[Connection | None], code: int, reason: str) -> Work:
        disconnected = 0
        for client in clients:
            if client is not None:
                disconnected += client.disconnect(code, reason)
            yield
        if disconnected:
            log.info("clients disconnected", extra={"clients": disconnected, "code": code})
        return Answer([disconnected])

    def _clients_of(self, of: Mapping[str, Any]) -> Iterator[Connection | None]:
        """Yield the clients to which all fields apply; None for each of the others."""
        user, client_id, channel = of.get("user"), of.get("client"), of.get("channel")
        connections: Iterable[Connection] = self._broadcaster.shared.clients
        if channel is not None:
            connections = list(self._broadcaster.clients_of(channel))
        for client in connections:
            identity = client.identity
            is_meant = identity is not None and (
                (user is None or identity.user == user)
                and (client_id is None or identity.client == client_id)
            )
            yield client if is_meant else None

    def _describe(self, identity: ClientIdentity, client: Connection) -> dict[str, Any]:
        return {
            "client": identity.client,
            "user": identity.user,
            "address": identity.address,
            "since": identity.since,
            "channels": list(client.channel_names)[:MAX_CHANNELS_LISTED],
            "backlog": client.backlog_bytes,
            "replica": self._replica,
        }
