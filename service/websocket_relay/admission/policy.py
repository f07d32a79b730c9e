"""Decide which clients are admitted, publish or read stats.

Knows no HTTP framework: a refusal is an exception, which others turn into a response.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from websocket_relay.admission.credentials import find_token
from websocket_relay.admission.ip_counter import IpCounter, network_key
from websocket_relay.admission.permissions import Permissions
from websocket_relay.lifecycle import Lifecycle
from websocket_relay.origins import AllowedOrigins
from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem
from websocket_relay.token_bucket import TokenBucket
from websocket_relay.wire.publish_policy import PublishPolicy

if TYPE_CHECKING:
    from websocket_relay.admission.verifier import TokenVerifier

MESSAGE_BURST_S = 2
"""A client may send the messages of this many seconds in one burst."""


class AdmissionRequest(NamedTuple):
    """The parts of a request that admission depends on.

    Attributes:
        channels: the names of the channels that are subscribed to, or published to.
        origin: the value of the Origin header, which browsers always send; None: there is none.
        authority: the value of the Host header.
        query: the part of the URL after the question mark.
        subprotocols: the offered subprotocols.
        host: the client's address; a trusted proxy may have forwarded it.
        scheme: of the URL that the client used: http, https, ws or wss; likewise.
        authorization: the values of all Authorization header lines.
    """

    channels: Sequence[str]
    origin: str | None
    authority: str
    query: bytes
    subprotocols: Sequence[str]
    host: str | None
    scheme: str = ""
    authorization: Sequence[str] = ()


class AdmittedClient(Protocol):
    """The part of a connection that admission uses."""

    publish_policy: PublishPolicy | None

    def start_expiry_timer(self, seconds: float | None) -> None:
        """Close the client after a number of seconds; None: never."""

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the TCP connection has ended."""


class Grant(NamedTuple):
    """The conditions under which a client is admitted.

    Attributes:
        permissions: of its token; None: it may do all.
        expires_in_s: seconds until its token expires; None: never.
        network: its key for the limit per address.
    """

    permissions: Permissions | None
    expires_in_s: float | None
    network: str

    def may_publish(self, channel: str) -> bool:
        """Return whether the client may publish to a channel."""
        return self.permissions is None or self.permissions.may_publish(channel)


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What clients are admitted by, besides tokens.

    Attributes:
        allowed_origins: the accepted origins.
        max_connections: concurrent clients; 0: no limit.
        max_connections_per_ip: concurrent clients from one address; 0: no limit.
        max_handshakes_per_s: upgrade requests per second; 0: no limit.
        max_messages_per_s: messages per second from one client; 0: no limit.
    """

    allowed_origins: AllowedOrigins
    max_connections: int
    max_connections_per_ip: int
    max_handshakes_per_s: int
    max_messages_per_s: int


class AdmissionPolicy:
    """The checks before an upgrade; the first one that fails determines the refusal.

    Args:
        limits: origins and limits.
        tokens: verifies tokens; None: no token is required.
        connections: returns the number of clients.
        has_descriptor: returns whether a file descriptor is free for another client.
        has_capacity: returns whether the channel of these names exists or may be created.
        health: the phase of the relay and the state of its backplane.
    """

    def __init__(
        self,
        limits: AdmissionLimits,
        tokens: "TokenVerifier | None",
        *,
        connections: Callable[[], int],
        has_descriptor: Callable[[], bool],
        has_capacity: Callable[[Sequence[str]], bool],
        health: Lifecycle,
    ) -> None:
        self._addresses: IpCounter | None = None
        self._connections = connections
        self._has_descriptor = has_descriptor
        self._has_capacity = has_capacity
        self._health = health
        self._tokens = tokens
        self.configure(limits)

    def configure(self, limits: AdmissionLimits, tokens: "TokenVerifier | None" = None) -> None:
        """Replace the settings. Admitted clients keep their grants.

        Addresses are counted while they are limited: clients that were admitted before the first
        limit do not count.

        Args:
            limits: as above.
            tokens: a new verifier; None: keep the present one.
        """
        self.limits = limits
        self._tokens = tokens or self._tokens
        if not limits.max_connections_per_ip:
            self._addresses = None
        elif self._addresses is None:
            self._addresses = IpCounter(limits.max_connections_per_ip)
        else:
            self._addresses.limit = limits.max_connections_per_ip
        rate = limits.max_handshakes_per_s
        self._handshakes = TokenBucket(rate, rate) if rate else None

    def metrics(self) -> dict[str, int]:
        """Return the values of the metrics of admission."""
        return {"connections_limit": self.limits.max_connections}

    async def admit(self, request: AdmissionRequest) -> Grant:
        """Admit a subscriber.

        The limits are checked last. Invariant: the caller accepts and counts the client without
        an await that suspends; otherwise other clients are admitted in between and exceed them.

        Returns:
            The conditions of the admission.

        Raises:
            RefusedError: a check failed.
        """
        self._check_cheaply(request)
        permissions = (
            await self._authorize_subscriber(request) if self._tokens is not None else None
        )
        network = network_key(request.host) if self._addresses is not None else ""
        self._check_limits(network)
        self._check_capacity(request.channels)
        if permissions is None:
            return Grant(None, expires_in_s=None, network=network)
        return Grant(permissions, _remaining_s(permissions), network)

    async def admit_publisher(self, request: AdmissionRequest) -> str:
        """Admit a publisher that makes one request and does not subscribe.

        Returns:
            The user of its token; empty: it has none.

        Raises:
            RefusedError: a check failed.
        """
        self._check_origin(request)
        user = ""
        if self._tokens is not None:
            permissions = await self._authenticate(request)
            user = permissions.user
            if not all(map(permissions.may_publish, request.channels)):
                raise RefusedError(Refusal.NOT_AUTHORIZED)
            _remaining_s(permissions)
        self._check_availability()
        return user

    async def admit_reader(self, request: AdmissionRequest) -> None:
        """Admit a reader of who is in channels, who needs the permission to subscribe to them.

        Raises:
            RefusedError: a check failed.
        """
        self._check_origin(request)
        if self._tokens is not None:
            _remaining_s(await self._authorize_subscriber(request))
        self._check_availability()

    async def admit_viewer(self, request: AdmissionRequest) -> None:
        """Admit a reader of the relay's stats.

        Raises:
            RefusedError: a check failed.
        """
        if self._tokens is not None:
            permissions = await self._authenticate(request)
            if not permissions.stats:
                raise RefusedError(Refusal.STATS_NOT_AUTHORIZED)
            _remaining_s(permissions)

    def access_of(self, grant: Grant) -> "ConnectionAccess":
        """Return what an admitted client of relay.v1 may do, and may be granted later."""
        return ConnectionAccess(self, grant.permissions)

    def enforce_grant(self, client: AdmittedClient, grant: Grant, *, may_publish: bool) -> None:
        """Enforce a grant on a client, and count the client until its connection has ended.

        Args:
            client: the client.
            grant: the conditions under which it was admitted.
            may_publish: False: its first message closes it.
        """
        per_s = self.limits.max_messages_per_s
        if per_s or not may_publish:
            rate = TokenBucket(per_s, per_s * MESSAGE_BURST_S) if per_s else None
            client.publish_policy = PublishPolicy(may_publish=may_publish, rate=rate)
        if grant.expires_in_s is not None:
            client.start_expiry_timer(grant.expires_in_s)
        if self._addresses is not None:
            self._addresses.add_client(grant.network)
            client.when_lost(partial(self._addresses.remove_client, grant.network))

    def _check_cheaply(self, request: AdmissionRequest) -> None:
        """Make the checks that need no cryptography."""
        self._check_origin(request)
        self._check_availability()
        if self._handshakes is not None and not self._handshakes.take(time.monotonic()):
            raise RefusedError(Refusal.HANDSHAKES)

    def _check_origin(self, request: AdmissionRequest) -> None:
        if request.origin is not None and not self.limits.allowed_origins.admit(
            request.origin, request.scheme, request.authority
        ):
            raise RefusedError(Refusal.ORIGIN_NOT_ALLOWED)

    def _check_availability(self) -> None:
        if self._health.refuses_upgrades:
            raise RefusedError(Refusal.DRAINING)
        if self._health.is_backplane_down:
            raise RefusedError(Refusal.BACKPLANE_UNAVAILABLE)

    async def _authorize_subscriber(self, request: AdmissionRequest) -> Permissions:
        permissions = await self._authenticate(request)
        if not all(map(permissions.may_subscribe, request.channels)):
            raise RefusedError(Refusal.NOT_AUTHORIZED)
        return permissions

    async def _authenticate(self, request: AdmissionRequest) -> Permissions:
        assert self._tokens is not None
        token = find_token(request.authorization, request.query, request.subprotocols)
        if token is None:
            raise RefusedError(Refusal.TOKEN_REQUIRED)
        return await self._tokens.verify(token)

    async def verify(self, token: str) -> Permissions | None:
        """Return the permissions of another token of an admitted client; None: it needs none.

        Raises:
            RefusedError: the token is invalid, or the keys are unavailable now.
        """
        return await self._tokens.verify(token) if self._tokens is not None else None

    def check_subscription(self, channel: str) -> None:
        """Check that an admitted client may create a channel now.

        Raises:
            RefusedError: it may not.
        """
        self._check_availability()
        self._check_capacity((channel,))

    def _check_capacity(self, channels: Sequence[str]) -> None:
        if not self._has_capacity(channels):
            raise RefusedError(Refusal.CHANNELS)

    def _check_limits(self, network: str) -> None:
        self._check_availability()  # again: it may have changed while the token was verified
        if self.limits.max_connections and self._connections() >= self.limits.max_connections:
            raise RefusedError(Refusal.CONNECTIONS)
        if not self._has_descriptor():
            raise RefusedError(Refusal.DESCRIPTORS)
        if self._addresses is not None and not self._addresses.is_below_limit(network):
            raise RefusedError(Refusal.CONNECTIONS_PER_IP)


class ConnectionAccess:
    """What the client of one connection may do: see `channels.relay_v1.ChannelAccess`.

    Args:
        policy: decides about tokens and limits.
        permissions: of the client's token; None: it may do all.
    """

    __slots__ = ("_permissions", "_policy")

    def __init__(self, policy: AdmissionPolicy, permissions: Permissions | None) -> None:
        self._policy = policy
        self._permissions = permissions

    @property
    def user(self) -> str:
        """The user of the client's token; empty: there is none."""
        return self._permissions.user if self._permissions is not None else ""

    @property
    def info(self) -> Any:
        """What others are shown of the client, any JSON value; None: nothing."""
        return self._permissions.info if self._permissions is not None else None

    def check_subscribe(self, channel: str) -> None:
        """Check that the client may subscribe to a channel now."""
        if not self.may_subscribe(channel):
            raise RefusedError(Refusal.NOT_AUTHORIZED)
        self._policy.check_subscription(channel)

    def check_publish(self, channel: str) -> None:
        """Check that the client may publish to a channel."""
        permissions = self._permissions
        if permissions is not None and not permissions.may_publish(channel):
            raise RefusedError(Refusal.NOT_AUTHORIZED)

    def may_subscribe(self, channel: str) -> bool:
        """Return whether the client has the permission to subscribe to a channel."""
        return self._permissions is None or self._permissions.may_subscribe(channel)

    async def renew(self, token: str) -> float | None:
        """Replace the token; return the seconds until it expires, None: never.

        Raises:
            RefusedError: it is invalid, or another user's.
        """
        permissions = await self._policy.verify(token)
        if permissions is None:
            return None
        remaining_s = _remaining_s(permissions)
        if permissions.user != self.user:
            raise RefusedError(Refusal.INVALID_TOKEN, TokenProblem.OTHER_USER)
        self._permissions = permissions
        return remaining_s


def _remaining_s(permissions: Permissions) -> float | None:
    """Return the seconds until the permissions expire; None: never.

    Raises:
        RefusedError: they have expired.
    """
    if permissions.expires_at is None:
        return None
    remaining_s = permissions.expires_at - time.time()
    if remaining_s <= 0:
        raise RefusedError(Refusal.INVALID_TOKEN, TokenProblem.EXPIRED)
    return remaining_s
