"""Parse the URL of a Redis: one server, or several of which one holds the stream.

Imports no library and opens no connection.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from websocket_relay.backplane.access import TLS_PARAMETERS
from websocket_relay.redaction import unusable_url

USES_TLS = {"redis": False, "rediss": True, "valkey": False, "valkeys": True}
"""By the first part of a scheme."""

USUAL_PORTS = {"": 6379, "sentinel": 26379, "cluster": 6379}
"""By the second part of a scheme, after the +."""

SCHEMES = (
    "unix",
    *(f"{base}{'+' * bool(kind)}{kind}" for base in USES_TLS for kind in USUAL_PORTS),
)

SENTINEL_CREDENTIALS = {"sentinel_username": "username", "sentinel_password": "password"}
"""By parameter of the URL: the option of a connection to a Sentinel."""

CERT_REQS = ("none", "optional", "required")
FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

REDIS_TLS_PARAMETERS = {
    *TLS_PARAMETERS.values(),
    "ssl_ca_path",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_password",
}
PARAMETERS = {"client_name", "db", "password", "username"}

DATABASE = re.compile(r"[0-9]{1,9}")


class Server(NamedTuple):
    """A server. An empty host: the Unix socket in the options of the address."""

    host: str
    port: int


class RedisAddress(NamedTuple):
    """The servers, and how to connect to them.

    Attributes:
        kind: what the servers are: Redis itself (one server), Sentinels, or nodes of a Cluster.
        servers: in the order of the URL.
        service: the name that the Sentinels have for the Redis.
        uses_tls: of Redis and Sentinels.
        options: arguments of redis-py for a connection to Redis.
        sentinel_options: the same for a Sentinel.
    """

    kind: Literal["", "sentinel", "cluster"]
    servers: tuple[Server, ...]
    service: str
    uses_tls: bool
    options: Mapping[str, Any]
    sentinel_options: Mapping[str, Any]


def parse_redis_url(url: str) -> RedisAddress:
    """Parse a URL of one of the `SCHEMES`.

    Raises:
        UnusableSettingError: the URL is invalid.
    """
    scheme, _, rest = url.partition("://")
    base, _, kind = scheme.lower().partition("+")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    credentials, _, hosts = authority.rpartition("@")
    if kind and "," in credentials:
        raise unusable_url(url, "write user and password once, and %2C for a comma in them")
    uses_tls = USES_TLS.get(base, False)
    parameters = _parameters(url, query, kind, uses_tls=uses_tls)
    sentinel_options = {
        option: parameters.pop(name)
        for name, option in SENTINEL_CREDENTIALS.items()
        if name in parameters
    }
    sentinel_options |= {
        name: parameters[name] for name in parameters.keys() & REDIS_TLS_PARAMETERS
    }
    username, _, password = map(unquote, credentials.partition(":"))
    options: dict[str, Any] = {}
    if credentials:
        options = {"username": username, "password": password}
    options |= parameters
    service = ""
    if base == "unix":
        options["path"] = unquote(f"/{path}")
        if hosts or not path:
            raise unusable_url(url, "no path of a socket; example: unix:///run/redis.sock")
        servers: tuple[Server, ...] = (Server("", 0),)
        path = ""
    else:
        servers = _servers(url, hosts, kind)
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not service:
            raise unusable_url(url, f"no service; example: {scheme}://host:26379/mymaster/0")
    database = options.get("db", path.rstrip("/"))
    if database and not DATABASE.fullmatch(database):
        raise unusable_url(url, "the database has to be a number; example: /0")
    options["db"] = int(database or 0)
    if kind == "cluster" and options["db"]:
        raise unusable_url(url, "a Redis Cluster has no other database than 0")
    return RedisAddress(
        kind,  # type: ignore[arg-type]
        servers,
        unquote(service),
        uses_tls,
        options,
        sentinel_options,
    )


def _servers(url: str, hosts: str, kind: str) -> tuple[Server, ...]:
    servers = []
    for host in hosts.split(",") if kind else [hosts]:
        try:
            parts = urlsplit(f"//{host}")
            if not parts.hostname or "," in host:
                raise ValueError
            servers.append(Server(unquote(parts.hostname), parts.port or USUAL_PORTS[kind]))
        except ValueError:
            example = "one:6379" if not kind else f"one:{USUAL_PORTS[kind]},two:{USUAL_PORTS[kind]}"
            raise unusable_url(
                url, f"invalid server; example: {url.partition(':')[0]}://{example}"
            ) from None
    return tuple(servers)


def _parameters(url: str, query: str, kind: str, *, uses_tls: bool) -> dict[str, Any]:
    parameters: dict[str, Any] = dict(parse_qsl(query))
    allowed = PARAMETERS | (REDIS_TLS_PARAMETERS if uses_tls else set())
    allowed |= set(SENTINEL_CREDENTIALS) if kind == "sentinel" else set()
    if unknown := parameters.keys() - allowed:
        if not uses_tls and unknown <= REDIS_TLS_PARAMETERS:
            raise unusable_url(url, f"{min(unknown)} requires TLS: rediss:// or valkeys://")
        raise unusable_url(
            url,
            f"unknown parameters: {', '.join(sorted(unknown))};"
            f" allowed: {', '.join(sorted(allowed))}",
        )
    if "ssl_cert_reqs" in parameters:
        parameters["ssl_cert_reqs"] = parameters["ssl_cert_reqs"].lower().removeprefix("cert_")
        if parameters["ssl_cert_reqs"] not in CERT_REQS:
            raise unusable_url(url, f"invalid ssl_cert_reqs; allowed: {', '.join(CERT_REQS)}")
    if "ssl_check_hostname" in parameters:
        parameters["ssl_check_hostname"] = FLAGS.get(parameters["ssl_check_hostname"].lower())
        if parameters["ssl_check_hostname"] is None:
            raise unusable_url(url, "invalid ssl_check_hostname; allowed: true, false")
    return parameters
