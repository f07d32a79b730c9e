"""Decide which clients are admitted, publish, read stats or use the server API.

Knows no HTTP framework: a refusal is an exception, which others turn into a response.
"""

import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, Protocol

from websocket_relay.admission.client_counter import ClientCounter, network_key
from websocket_relay.admission.credentials import find_token
from websocket_relay.admission.permissions import Permissions
from websocket_relay.cluster.blocks import Blocks
from websocket_relay.lifecycle import Lifecycle
from websocket_relay.origins import AllowedOrigins
from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem
from websocket_relay.token_bucket import TokenBucket
from websocket_relay.wire.publish_policy import PublishPolicy

MESSAGE_BURST_S = 2
"""A client may send the messages of this many seconds in one burst."""


class Action(StrEnum):
    """What a client wants to do with a channel."""

    SUBSCRIBE = "subscribe"
    PUBLISH = "publish"


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
        headers: the names and values of all header lines.
        subject: the user that the client's certificate names; empty: it has none.
    """

    channels: Sequence[str]
    origin: str | None
    authority: str
    query: bytes
    subprotocols: Sequence[str]
    host: str | None
    scheme: str = ""
    authorization: Sequence[str] = ()
    headers: Sequence[tuple[bytes, bytes]] = ()
    subject: str = ""


class RequestSource(NamedTuple):
    """Where the request came from that opened a connection.

    Attributes:
        address: of the client.
        origin: the value of its Origin header; None: there was none.
    """

    address: str | None
    origin: str | None


class Authenticator(Protocol):
    """Finds out what clients may do: by their tokens, or by asking the backend."""

    async def authenticate(self, request: AdmissionRequest, action: Action) -> Permissions:
        """Return what the client of a request may do; raise a RefusedError if it is refused."""

    def source_of(self, request: AdmissionRequest) -> RequestSource | None:
        """Return what `renew` needs to know of a request; None: nothing."""

    async def renew(self, token: str, source: RequestSource | None) -> Permissions:
        """Return what a connected client may do by a new token; raise a RefusedError likewise."""


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
        permissions: of the client; None: it may do all.
        expires_in_s: seconds until the permissions expire; None: never.
        network: its key for the limit per address.
        user: who it is, by its permissions or its certificate; empty: not known.
        source: of its request, for a renewal.
    """

    permissions: Permissions | None
    expires_in_s: float | None
    network: str
    user: str
    source: RequestSource | None

    def may_publish(self, channel: str) -> bool:
        """Return whether the client may publish to a channel."""
        return self.permissions is None or self.permissions.may_publish(channel)


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What clients are admitted by, besides their permissions.

    Attributes:
        allowed_origins: the accepted origins.
        max_connections: concurrent clients; 0: no limit.
        max_connections_per_ip: concurrent clients from one address; 0: no limit.
        max_connections_per_user: concurrent clients of one user; 0: no limit.
        max_handshakes_per_s: upgrade requests per second; 0: no limit.
        max_messages_per_s: messages per second from one client; 0: no limit.
    """

    allowed_origins: AllowedOrigins
    max_connections: int
    max_connections_per_ip: int
    max_connections_per_user: int
    max_handshakes_per_s: int
    max_messages_per_s: int


class AdmissionPolicy:
    """The checks before an upgrade; the first one that fails determines the refusal.

    Args:
        limits: origins and limits.
        authenticator: finds out what clients may do; None: they may do all.
        connections: returns the number of clients.
        has_descriptor: returns whether a file descriptor is free for another client.
        has_capacity: returns whether the channel of these names exists or may be created.
        health: the phase of the relay and the state of its backplane.
        blocks: the users that are refused.
        api_key: see `configure`.
    """

    def __init__(
        self,
        limits: AdmissionLimits,
        authenticator: Authenticator | None,
        *,
        connections: Callable[[], int],
        has_descriptor: Callable[[], bool],
        has_capacity: Callable[[Sequence[str]], bool],
        health: Lifecycle,
        blocks: Blocks,
        api_key: str,
    ) -> None:
        self._addresses: ClientCounter | None = None
        self._users: ClientCounter | None = None
        self._connections = connections
        self._has_descriptor = has_descriptor
        self._has_capacity = has_capacity
        self._health = health
        self._authenticator = authenticator
        self._blocks = blocks
        self.configure(limits, api_key=api_key)

    def configure(
        self,
        limits: AdmissionLimits,
        authenticator: Authenticator | None = None,
        api_key: str = "",
    ) -> None:
        """Replace the settings. Admitted clients keep their grants.

        Addresses and users are counted while they are limited: clients that were admitted before
        the first limit do not count.

        Args:
            limits: as above.
            authenticator: a new one; None: keep the present one.
            api_key: of the server API; empty: none opens it.
        """
        self._api_key = api_key.encode()
        self.limits = limits
        self._authenticator = authenticator or self._authenticator
        self._addresses = _counter(self._addresses, limits.max_connections_per_ip)
        self._users = _counter(self._users, limits.max_connections_per_user)
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
        permissions, source = None, None
        if self._authenticator is not None:
            permissions = await self._authorize_subscriber(self._authenticator, request)
            source = self._authenticator.source_of(request)
        network = network_key(request.host) if self._addresses is not None else ""
        user = self._admitted_user(permissions, request)
        self._check_limits(network, user)
        self._check_capacity(request.channels)
        expires_in_s = _remaining_s(permissions) if permissions is not None else None
        return Grant(permissions, expires_in_s, network, user, source)

    async def admit_publisher(self, request: AdmissionRequest) -> str:
        """Admit a publisher that makes one request and does not subscribe.

        Returns:
            Its user; empty: not known.

        Raises:
            RefusedError: a check failed.
        """
        self._check_origin(request)
        permissions = None
        if self._authenticator is not None:
            permissions = await self._authenticator.authenticate(request, Action.PUBLISH)
            if not all(map(permissions.may_publish, request.channels)):
                raise RefusedError(Refusal.NOT_AUTHORIZED)
            _remaining_s(permissions)
        self.check_availability()
        return self._admitted_user(permissions, request)

    async def admit_reader(self, request: AdmissionRequest) -> None:
        """Admit a reader of who is in channels, who needs the permission to subscribe to them.

        Raises:
            RefusedError: a check failed.
        """
        self._check_origin(request)
        permissions = None
        if self._authenticator is not None:
            permissions = await self._authorize_subscriber(self._authenticator, request)
            _remaining_s(permissions)
        self.check_availability()
        self._admitted_user(permissions, request)

    async def admit_viewer(self, request: AdmissionRequest) -> None:
        """Admit a reader of the relay's stats.

        Raises:
            RefusedError: a check failed.
        """
        if self._authenticator is not None:
            permissions = await self._authenticator.authenticate(request, Action.SUBSCRIBE)
            if not permissions.stats:
                raise RefusedError(Refusal.STATS_NOT_AUTHORIZED)
            _remaining_s(permissions)
            self._admitted_user(permissions, request)

    async def admit_admin(self, request: AdmissionRequest) -> None:
        """Admit a user of the server API, by its key or a token of an admin.

        Neither is taken from the query: URLs are logged.

        Raises:
            RefusedError: a check failed.
        """
        self._check_origin(request)
        secret = find_token(request.authorization, b"", ())
        if secret is None:
            raise RefusedError(Refusal.TOKEN_REQUIRED)
        if self._api_key and hmac.compare_digest(secret.encode(), self._api_key):
            return
        if self._authenticator is None:
            raise RefusedError(Refusal.INVALID_TOKEN)
        asked = request._replace(query=b"", subprotocols=())
        permissions = await self._authenticator.authenticate(asked, Action.SUBSCRIBE)
        if not permissions.admin:
            raise RefusedError(Refusal.API_NOT_AUTHORIZED)
        _remaining_s(permissions)
        self._admitted_user(permissions, request)

    def access_of(self, grant: Grant) -> "ConnectionAccess":
        """Return what an admitted client of relay.v1 may do, and may be granted later."""
        return ConnectionAccess(self, grant)

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
        counted = []
        if self._addresses is not None:
            counted.append((self._addresses, grant.network))
        if self._users is not None and grant.user:
            counted.append((self._users, grant.user))
        for counter, key in counted:
            counter.add_client(key)
        if counted:
            client.when_lost(partial(_remove_client, counted))

    def _check_cheaply(self, request: AdmissionRequest) -> None:
        """Make the checks that need no cryptography."""
        self._check_origin(request)
        self.check_availability()
        if self._handshakes is not None and not self._handshakes.take(time.monotonic()):
            raise RefusedError(Refusal.HANDSHAKES)

    def _check_origin(self, request: AdmissionRequest) -> None:
        if request.origin is not None and not self.limits.allowed_origins.admit(
            request.origin, request.scheme, request.authority
        ):
            raise RefusedError(Refusal.ORIGIN_NOT_ALLOWED)

    def check_availability(self) -> None:
        """Check that what is published now can be relayed.

        Raises:
            RefusedError: the relay drains, or its backplane is down.
        """
        if self._health.refuses_upgrades:
            raise RefusedError(Refusal.DRAINING)
        if self._health.is_backplane_down:
            raise RefusedError(Refusal.BACKPLANE_UNAVAILABLE)

    async def _authorize_subscriber(
        self, authenticator: Authenticator, request: AdmissionRequest
    ) -> Permissions:
        permissions = await authenticator.authenticate(request, Action.SUBSCRIBE)
        if not all(map(permissions.may_subscribe, request.channels)):
            raise RefusedError(Refusal.NOT_AUTHORIZED)
        return permissions

    def _admitted_user(self, permissions: Permissions | None, request: AdmissionRequest) -> str:
        """Return the user of a request, who may be blocked."""
        user = _user_of(permissions, request)
        self._check_block(user)
        return user

    def _check_block(self, user: str) -> None:
        if self._blocks and self._blocks.is_blocked(user):
            raise RefusedError(Refusal.BLOCKED)

    async def renew(self, token: str, source: RequestSource | None) -> Permissions | None:
        """Return the permissions by another token of an admitted client; None: it needs none.

        Args:
            token: the new one.
            source: of the client's grant.

        Raises:
            RefusedError: the token is refused, its user is blocked, or it can't be checked now.
        """
        if self._authenticator is None:
            return None
        permissions = await self._authenticator.renew(token, source)
        self._check_block(permissions.user)
        return permissions

    def check_subscription(self, channel: str) -> None:
        """Check that an admitted client may create a channel now.

        Raises:
            RefusedError: it may not.
        """
        self.check_availability()
        self._check_capacity((channel,))

    def _check_capacity(self, channels: Sequence[str]) -> None:
        if not self._has_capacity(channels):
            raise RefusedError(Refusal.CHANNELS)

    def _check_limits(self, network: str, user: str) -> None:
        self.check_availability()  # again: it may have changed while the client was authenticated
        if self.limits.max_connections and self._connections() >= self.limits.max_connections:
            raise RefusedError(Refusal.CONNECTIONS)
        if not self._has_descriptor():
            raise RefusedError(Refusal.DESCRIPTORS)
        if self._addresses is not None and not self._addresses.is_below_limit(network):
            raise RefusedError(Refusal.CONNECTIONS_PER_IP)
        if self._users is not None and user and not self._users.is_below_limit(user):
            raise RefusedError(Refusal.CONNECTIONS_PER_USER)


class ConnectionAccess:
    """What the client of one connection may do: see `channels.relay_v1.ChannelAccess`.

    Args:
        policy: decides about permissions and limits.
        grant: the conditions under which the client was admitted.

    Attributes:
        user: who the client is; empty: not known.
    """

    __slots__ = ("_permissions", "_policy", "_source", "user")

    def __init__(self, policy: AdmissionPolicy, grant: Grant) -> None:
        self._policy = policy
        self._permissions = grant.permissions
        self._source = grant.source
        self.user = grant.user

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
        permissions = await self._policy.renew(token, self._source)
        if permissions is None or self._permissions is None:
            return None
        remaining_s = _remaining_s(permissions)
        if permissions.user != self._permissions.user:
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


def _user_of(permissions: Permissions | None, request: AdmissionRequest) -> str:
    """Return who a client is: by its permissions, or else by its certificate; empty: not known."""
    user = permissions.user if permissions is not None else ""
    return user or request.subject


def _counter(present: ClientCounter | None, limit: int) -> ClientCounter | None:
    """Return the counter for a limit, which may have changed; None: there is no limit."""
    if not limit:
        return None
    if present is None:
        return ClientCounter(limit)
    present.limit = limit
    return present


def _remove_client(counted: Sequence[tuple[ClientCounter, str]]) -> None:
    for counter, key in counted:
        counter.remove_client(key)
