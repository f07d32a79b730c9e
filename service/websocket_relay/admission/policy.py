"""Decide who may come in. Knows no HTTP framework; a refusal is a fact for others to tell."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from websocket_relay.admission.credentials import find_token
from websocket_relay.admission.ip_counter import IpCounter, network_of
from websocket_relay.admission.permissions import Permissions
from websocket_relay.lifecycle import Lifecycle
from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem
from websocket_relay.token_bucket import TokenBucket
from websocket_relay.wire.publish_policy import PublishPolicy

if TYPE_CHECKING:
    from websocket_relay.admission.verifier import TokenVerifier

CHANNEL_NAME = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._:-]{1,128}")
"""Not . and .., which browsers take out of a path before they ask for it."""

DEFAULT_CHANNEL = "default"

MESSAGE_BURST_S = 2
"""So many seconds' worth of messages a client may send at once."""


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What a client says that asks to be let in.

    Attributes:
        channel: the name in the path.
        headers: by their names in lower case.
        query: what stands behind the question mark in the path.
        subprotocols: what it offers.
        host: the address it comes from; trusted proxies may have said which.
        authorization: what its Authorization header says; several texts where there are several.
    """

    channel: str
    headers: Mapping[str, str]
    query: bytes
    subprotocols: Sequence[str]
    host: str | None
    authorization: Sequence[str] = ()


class AdmittedClient(Protocol):
    """What can be asked of a connection."""

    def allow(self, allowance: PublishPolicy) -> None:
        """Hold the client to what it may send."""

    def expire_in(self, seconds: float) -> None:
        """Close the client after so many seconds."""

    def when_lost(self, act: Callable[[], None]) -> None:
        """Call `act` once, when the TCP connection has ended."""


@dataclass(frozen=True, slots=True)
class Grant:
    """On what terms a client is let in.

    Attributes:
        may_publish: whether it may send messages.
        expires_in_s: how long it may stay; None: as long as it likes.
        network: where it comes from, as the limit per address counts.
    """

    may_publish: bool
    expires_in_s: float | None
    network: str


class AdmissionPolicy:
    """The checks before an upgrade, in the order in which a client hears of them.

    Args:
        allowed_origins: what browsers may say in Origin; `*` lets all in.
        max_connections: clients at a time; 0 for no limit.
        max_connections_per_ip: clients at a time from one address; 0 for no limit.
        max_handshakes_per_s: upgrades asked for in a second; 0 for no limit.
        max_messages_per_s: what one client may send; 0 for no limit.
        tokens: checks tokens; None lets everybody in.
        connections: tells how many there are.
        has_descriptor: tells whether there is a file descriptor for another client.
        has_room: tells whether a channel may be joined.
        health: tells whether the relay stops.
    """

    def __init__(
        self,
        *,
        allowed_origins: Sequence[str],
        max_connections: int,
        max_connections_per_ip: int,
        max_handshakes_per_s: int,
        max_messages_per_s: int,
        tokens: "TokenVerifier | None",
        connections: Callable[[], int],
        has_descriptor: Callable[[], bool],
        has_room: Callable[[str], bool],
        health: Lifecycle,
    ) -> None:
        lowered = {origin.lower() for origin in allowed_origins}
        self._origins = None if "*" in lowered else lowered
        self._max_connections = max_connections
        self._addresses = IpCounter(max_connections_per_ip) if max_connections_per_ip else None
        self._handshakes = (
            TokenBucket(max_handshakes_per_s, max_handshakes_per_s)
            if max_handshakes_per_s
            else None
        )
        self._max_messages_per_s = max_messages_per_s
        self._tokens = tokens
        self._connections = connections
        self._has_descriptor = has_descriptor
        self._has_room = has_room
        self._health = health

    async def admit(self, upgrade: AdmissionRequest) -> Grant:
        """Let a client in.

        The limits are looked at last. Accept and count the client without awaiting anything that
        waits, or others come in meanwhile.

        Returns:
            On what terms.

        Raises:
            RefusedError: it may not come in.
        """
        self._look_at(upgrade)
        rights = await self._rights(upgrade) if self._tokens is not None else None
        network = network_of(upgrade.host) if self._addresses is not None else ""
        self._find_room(upgrade.channel, network)
        if rights is None:
            return Grant(may_publish=True, expires_in_s=None, network=network)
        return Grant(rights.may_publish(upgrade.channel), _time_left(rights), network)

    async def admit_publisher(self, upgrade: AdmissionRequest) -> None:
        """Let somebody publish who does not stay.

        Raises:
            RefusedError: it may not.
        """
        self._look_at_words(upgrade)
        if self._tokens is not None:
            rights = await self._checked(upgrade)
            if not rights.may_publish(upgrade.channel):
                raise RefusedError(Refusal.NO_RIGHT)
            _time_left(rights)
        self._see_whether_open()

    async def admit_viewer(self, upgrade: AdmissionRequest) -> None:
        """Let somebody see the relay's figures.

        Raises:
            RefusedError: it may not.
        """
        if self._tokens is not None:
            rights = await self._checked(upgrade)
            if not rights.stats:
                raise RefusedError(Refusal.NO_STATS)
            _time_left(rights)

    def bind(self, client: AdmittedClient, terms: Grant) -> None:
        """Hold a client to its terms, and count it until its connection has ended."""
        most = self._max_messages_per_s
        if most or not terms.may_publish:
            rate = TokenBucket(most, most * MESSAGE_BURST_S) if most else None
            client.allow(PublishPolicy(may_publish=terms.may_publish, rate=rate))
        if terms.expires_in_s is not None:
            client.expire_in(terms.expires_in_s)
        if self._addresses is not None:
            self._addresses.enter(terms.network)
            client.when_lost(partial(self._addresses.leave, terms.network))

    def _look_at(self, upgrade: AdmissionRequest) -> None:
        """Check what costs nothing."""
        self._look_at_words(upgrade)
        self._see_whether_open()
        if self._handshakes is not None and not self._handshakes.take(time.monotonic()):
            raise RefusedError(Refusal.HANDSHAKES)

    def _look_at_words(self, upgrade: AdmissionRequest) -> None:
        if not CHANNEL_NAME.fullmatch(upgrade.channel):
            raise RefusedError(Refusal.PATH)
        if self._origins is not None:
            origin = upgrade.headers.get("origin")  # only browsers send one, and they always do
            if origin is not None and origin.lower() not in self._origins:
                raise RefusedError(Refusal.ORIGIN)

    def _see_whether_open(self) -> None:
        if self._health.refusing:
            raise RefusedError(Refusal.DRAINING)
        if self._health.is_cut_off:
            raise RefusedError(Refusal.UNAVAILABLE)

    async def _rights(self, upgrade: AdmissionRequest) -> Permissions:
        rights = await self._checked(upgrade)
        if not rights.may_subscribe(upgrade.channel):
            raise RefusedError(Refusal.NO_RIGHT)
        return rights

    async def _checked(self, upgrade: AdmissionRequest) -> Permissions:
        assert self._tokens is not None
        token = find_token(upgrade.authorization, upgrade.query, upgrade.subprotocols)
        if token is None:
            raise RefusedError(Refusal.NO_TOKEN)
        return await self._tokens.rights(token)

    def _find_room(self, channel: str, network: str) -> None:
        self._see_whether_open()  # still, since the token was looked at
        if self._max_connections and self._connections() >= self._max_connections:
            raise RefusedError(Refusal.CONNECTIONS)
        if not self._has_descriptor():
            raise RefusedError(Refusal.DESCRIPTORS)
        if self._addresses is not None and not self._addresses.has_room(network):
            raise RefusedError(Refusal.CONNECTIONS_PER_IP)
        if not self._has_room(channel):
            raise RefusedError(Refusal.CHANNELS)


def _time_left(rights: Permissions) -> float | None:
    if rights.expires_at is None:
        return None
    left_s = rights.expires_at - time.time()
    if left_s <= 0:
        raise RefusedError(Refusal.BAD_TOKEN, TokenProblem.EXPIRED)
    return left_s
