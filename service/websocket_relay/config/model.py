"""Own the settings tree: every setting with its type, bounds, default and description.

config.yaml and the chart's values are rendered from it. Knows no component that uses the settings.
"""

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from websocket_relay.origins import normalize_pattern
from websocket_relay.redaction import redacted

ENV_PREFIX = "RELAY__"

MAX_SECONDS = 86_400.0
MAX_BYTES = 1 << 40
MAX_COUNT = 1 << 31

Port = Annotated[int, Field(ge=0, le=65_535)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]

ITEMS = "items_in_words"
"""The key in a list's JSON schema under which its allowed items are described."""


def _listed(value: object) -> object:
    # An environment variable contains a JSON list or comma-separated strings.
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError("a JSON list of strings, or comma-separated strings") from None
    return [part.strip() for part in value.split(",")] if value.strip() else []


def _one_or_more(value: object) -> object:
    # A single string is taken as it is, with white space at its ends.
    is_list = isinstance(value, str) and (value.lstrip().startswith("[") or "," in value)
    return [value] if isinstance(value, str) and value and not is_list else _listed(value)


def _listed_secrets(value: object) -> object:
    # No commas: a secret that has one would become two that can be guessed.
    if isinstance(value, str) and value and not value.lstrip().startswith("["):
        raise ValueError("a list of strings; in an environment variable, a JSON list")
    return _listed(value)


def _path_of_a_file(value: str) -> str:
    if not value.isprintable():  # for example the content of the file
        raise ValueError("the path of a file")
    return value


def _in_utf_8(value: Any) -> Any:
    """Validate a text, a secret or several secrets."""
    try:
        for each in value if isinstance(value, tuple) else [value]:
            (each.get_secret_value() if isinstance(each, SecretStr) else each).encode()
    except UnicodeEncodeError:  # an environment variable may contain any bytes
        raise ValueError("a string in UTF-8") from None
    return value


def _joined(value: object) -> object:
    """Return a list of hosts as one string, in the form that the sockets are opened with."""
    if isinstance(value, list | tuple) and all(isinstance(host, str) for host in value):
        value = ",".join(value)
    if not isinstance(value, str):
        return value
    hosts = [host.strip().removeprefix("[").removesuffix("]") for host in value.split(",")]
    if not all(hosts):
        raise ValueError("one host or several, separated by commas")
    return ", ".join(hosts)


ALL_ADDRESSES = ("*", "::")
"""Hosts that stand for all addresses of the machine; `0.0.0.0` stands for those of IPv4."""


def listens_on_all_addresses(host: str) -> bool:
    """Return whether a host stands for all addresses, of one family at least."""
    return host in (*ALL_ADDRESSES, "0.0.0.0")


Hosts = Annotated[str, BeforeValidator(_joined), Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
FilePath = Annotated[str, AfterValidator(_path_of_a_file)]
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]
OneOrMore = Annotated[tuple[Text, ...], NoDecode, BeforeValidator(_one_or_more)]
Secrets = Annotated[
    tuple[Annotated[SecretStr, Field(min_length=1)], ...],
    NoDecode,
    BeforeValidator(_listed_secrets),
]

ONE_OR_MORE: dict[str, Any] = {"type": ["string", "array"], ITEMS: "non-empty strings"}
"""Additions to the JSON schema of a field of the type OneOrMore."""


HOST_DESCRIPTION = (
    "addresses to listen on, separated by commas; all of IPv6 and IPv4: * or ::, of IPv4: 0.0.0.0"
)
DESCRIPTOR = re.compile(r"fd:([0-9]{1,4})")
FIRST_INHERITED = 3
MAX_SOCKET_BYTES = 107
"""Maximum length of the path of a Unix socket (unix(7), without the final zero)."""

STREAM_NAME = re.compile(r"[!-~]([ -~]{0,253}[!-~])?")
NATS_STREAM_NAME = re.compile(r"[^ .*>/\\]{1,255}")
SUBJECT = re.compile(r"[A-Za-z0-9_$-]+(\.[A-Za-z0-9_$-]+)*", re.ASCII)
BASE_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")
FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)
"""A name of a header field (RFC 9110 section 5.1)."""


@dataclass(frozen=True, slots=True)
class SettingsWarning:
    """Settings that are valid but probably unintended.

    Attributes:
        text: the warning, a constant text.
        facts: its variable parts.
    """

    text: str
    facts: Mapping[str, object]

    def __str__(self) -> str:
        """Return the warning on one line."""
        return f"{self.text} ({', '.join(f'{name}: {fact}' for name, fact in self.facts.items())})"


class Section(BaseModel):
    """A section of the tree. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_flag_is_no_number(cls, value: object, info: Any) -> object:
        # pydantic converts true to 1; in a settings file that is a mistake.
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError("a boolean is not a number")
        return value


def is_web_address(url: str) -> bool:
    """Return whether a URL is http or https, has a host, and has no credentials."""
    try:
        parts = urlsplit(url)
        # Reading the property `port` validates it.
        is_complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return bool(is_complete) and "@" not in parts.netloc and url.isprintable() and " " not in url


class TlsSettings(Section):
    """TLS on server.port."""

    enabled: bool = Field(False, description="true: server.port serves wss:// and https:// only")
    cert_file: str = Field("cert.pem", min_length=1, description="certificate chain, PEM")
    key_file: str = Field(
        "key.pem",
        min_length=1,
        description="its private key, PEM; a renewed pair is reloaded for new handshakes",
    )
    client_ca_file: str = Field(
        "",
        description="authorities of client certificates, PEM: every client needs one; empty: none",
    )


class ServerSettings(Section):
    """The relay's port, its origins and its proxies."""

    host: Hosts = Field("*", description=HOST_DESCRIPTION)
    port: Port = Field(8443, description="port to listen on; 0: any free one")
    socket: str = Field(
        "",
        description="instead of host and port: the path of a Unix socket, or fd:3, a socket that"
        " systemd passes on",
    )
    tls: TlsSettings = TlsSettings()
    allowed_origins: Texts = Field(
        ("*",),
        description="accepted Origin headers of browsers besides the relay's own, like"
        " https://example.com, https://*.example.com or http://localhost:*; *: all",
        json_schema_extra={ITEMS: "origins, each scheme://host[:port] or *"},
    )
    trusted_proxies: Texts = Field(
        (),
        description="addresses or networks whose X-Forwarded-For and -Proto are trusted",
        json_schema_extra={ITEMS: "addresses like 10.0.0.7 or networks like 10.0.0.0/8"},
    )
    keepalive_timeout_s: PositiveSeconds = Field(
        130,
        description="an HTTP connection without a request for this long is closed; has to be longer"
        " than clients and proxies keep theirs",
    )
    proxy_protocol: bool = Field(
        False,
        description="true: trusted_proxies send the PROXY protocol (version 1 or 2) before TLS and"
        " HTTP",
    )
    base_path: str = Field(
        "", description="a path prefix like /relay, for an Ingress that does not rewrite paths"
    )

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(normalize_pattern, value))

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in value:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ValueError(
                    f"addresses like 10.0.0.7 or networks like 10.0.0.0/8; {error}"
                ) from None
        return value

    @field_validator("socket")
    @classmethod
    def _path_or_descriptor(cls, value: str) -> str:
        if ":" in value:
            match = DESCRIPTOR.fullmatch(value)
            if match is None or int(match[1]) < FIRST_INHERITED:
                raise ValueError("a path like /run/websocket-relay/relay.sock, or fd:3")
        elif not value.isprintable() or len(os.fsencode(value)) > MAX_SOCKET_BYTES:
            raise ValueError(f"a path of {MAX_SOCKET_BYTES} bytes at most, or fd:3")
        return value

    @property
    def inherited_descriptor(self) -> int | None:
        """The file descriptor of an inherited socket; None: the relay opens its own."""
        match = DESCRIPTOR.fullmatch(self.socket)
        return int(match[1]) if match else None

    @model_validator(mode="after")
    def _proxies_that_send_the_header(self) -> "ServerSettings":
        if self.proxy_protocol and not (self.trusted_proxies or self.socket):
            raise ValueError(
                "server.proxy_protocol needs server.trusted_proxies, the addresses of the proxies"
            )
        return self

    @field_validator("base_path")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if not BASE_PATH.fullmatch(value):
            raise ValueError("a path that begins with / and does not end with /")
        return value


class MetricsSettings(Section):
    """The port that Prometheus scrapes."""

    enabled: bool = Field(True, description="false: the port is closed")
    host: Hosts = Field("*", description=HOST_DESCRIPTION)
    port: Port = Field(9090, description="port of /metrics, /healthz and /readyz; 0: any free one")


class ChannelsSettings(Section):
    """Named channels that clients subscribe to."""

    max_channels: Annotated[int, Field(ge=1, le=MAX_COUNT)] = Field(
        10_000, description="maximum number of channels with subscribers"
    )


class LimitsSettings(Section):
    """Limits on messages, connections and memory."""

    max_message_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = Field(
        1_048_576, description="a larger message closes its publisher (1009)"
    )
    max_channels_per_connection: Annotated[int, Field(ge=1, le=MAX_COUNT)] = Field(
        128, description="subscriptions of one client of relay.v1, channels of one event stream"
    )
    max_connections: Count = Field(
        0, description="concurrent clients; 0: limited by file descriptors only"
    )
    max_http_connections: Annotated[int, Field(ge=1, le=MAX_COUNT)] = Field(
        1000,
        description="concurrent connections that are not clients (yet); beyond it the idlest is"
        " closed",
    )
    max_connections_per_ip: Count = Field(
        0, description="concurrent clients from one address, or one IPv6 /64; 0: no limit"
    )
    max_connections_per_user: Count = Field(
        0, description="concurrent clients of one user, on each replica; 0: no limit"
    )
    max_handshakes_per_s: Count = Field(0, description="upgrade requests per second; 0: no limit")
    max_messages_per_s: Count = Field(
        0, description="per connection, with a burst of twice as many (else 1008); 0: no limit"
    )
    handshake_timeout_s: PositiveSeconds = Field(
        10, description="from TCP accept to the upgrade, and for the closing handshake"
    )
    send_backlog_bytes: Annotated[int, Field(ge=1024, le=MAX_BYTES)] = Field(
        1_048_576, description="maximum memory for the unsent data of one slow client (else 1013)"
    )
    total_backlog_bytes: Annotated[int, Field(ge=1024, le=MAX_BYTES)] = Field(
        268_435_456,
        description="maximum memory for the unsent data of all slow clients; the largest backlog is"
        " closed first; messages in flight take up to twice as much again",
    )


class KeepaliveSettings(Section):
    """Pings that detect dead connections."""

    ping_interval_s: PositiveSeconds = Field(20, description="seconds between two pings")
    ping_timeout_s: PositiveSeconds = Field(
        20, description="seconds until a client that is silent after a ping is closed (1011)"
    )


class CompressionSettings(Section):
    """permessage-deflate (RFC 7692), for the clients that offer it."""

    enabled: bool = Field(
        False, description="true: each message is compressed once for all clients"
    )
    min_message_bytes: Count = Field(256, description="shorter messages are sent uncompressed")


class HistorySettings(Section):
    """Messages retained for replay to clients that reconnect, over all channels."""

    max_messages: Count = Field(
        10_000,
        description="beyond it the channel with the most messages loses its oldest; 0: no history",
    )
    max_bytes: Annotated[int, Field(ge=1024, le=MAX_BYTES)] = Field(
        16_777_216,
        description="memory; beyond it the channel that uses the most loses its oldest message",
    )
    max_age_s: PositiveSeconds = Field(300, description="older messages are removed")


class PresenceSettings(Section):
    """Who is in a channel, over all replicas."""

    channels: Texts = Field(
        (),
        description="patterns of channels that have it; a * at the end stands for any rest",
        json_schema_extra={ITEMS: "patterns of channel names"},
    )
    grace_s: Seconds = Field(
        10,
        description="a client of relay.v1 whose connection broke has left after this time, unless"
        " it resumes its session; the clients of a replica that is gone leave after it, too",
    )
    max_clients: Annotated[int, Field(ge=1, le=MAX_COUNT)] = Field(
        1000, description="clients of a channel that are listed; of more only the number is sent"
    )


class BrokerUrl(SecretStr):
    """A URL that may contain a password, which its text form redacts."""

    def __str__(self) -> str:
        return redacted(self.get_secret_value())


class BackplaneSettings(Section):
    """The log that puts the messages of all replicas in one order."""

    url: BrokerUrl = Field(
        BrokerUrl("memory://"),
        description="memory:// for one replica; redis://, rediss://, nats:// or tls:// for several",
    )
    username: str = Field("", description="user at the broker, if the URL contains none")
    password: SecretStr = Field(
        SecretStr(""), description="the user's password; without a user a token of NATS"
    )
    password_file: FilePath = Field(
        "", description="or a file with the password, which is read anew for each connection"
    )
    ca_file: FilePath = Field(
        "", description="file with the broker's CA, PEM; empty: the system's; read anew as well"
    )
    cert_file: FilePath = Field(
        "", description="file with the relay's own certificate for the broker, PEM; read anew"
    )
    key_file: FilePath = Field(
        "", description="its private key, PEM, unless cert_file contains it; read anew"
    )
    creds_file: FilePath = Field(
        "", description="NATS: .creds file with the user's JWT and seed; read anew"
    )
    nkey_file: FilePath = Field("", description="NATS: file with the user's seed; read anew")
    domain: str = Field("", description="NATS: JetStream domain of the stream; empty: the server's")
    inbox_prefix: str = Field(
        "", description="NATS: subject before the relay's inboxes; empty: _INBOX"
    )
    stream: str = Field("relay", description="name of the stream on the broker")
    on_outage: Literal["reject", "local"] = Field(
        "reject",
        description="reject: publishers are closed (1013); local: messages reach this replica only",
    )

    _utf_8 = field_validator("username", "password")(_in_utf_8)

    @field_validator("domain", "inbox_prefix")
    @classmethod
    def _subject(cls, value: str, info: ValidationInfo) -> str:
        if value and not SUBJECT.fullmatch(value):
            raise ValueError("words of A-Z a-z 0-9 _ - $, separated by dots")
        if info.field_name == "domain" and "." in value:
            raise ValueError("one word of A-Z a-z 0-9 _ -")
        return value

    @field_validator("stream")
    @classmethod
    def _name(cls, value: str, info: ValidationInfo) -> str:
        if not STREAM_NAME.fullmatch(value):
            raise ValueError("1 to 255 printable ASCII characters, without spaces at the ends")
        url = info.data.get("url", BrokerUrl("")).get_secret_value().lower()
        if url.startswith(("nats://", "tls://")) and not NATS_STREAM_NAME.fullmatch(value):
            raise ValueError("in NATS, 1 to 255 ASCII characters except space . * > / \\")
        return value


Algorithm = Literal[
    "HS256",
    "HS384",
    "HS512",
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES256K",
    "ES384",
    "ES512",
    "EdDSA",
    "Ed25519",
    "Ed448",
]


SECRET_BYTES: dict[str, int] = {"HS256": 32, "HS384": 48, "HS512": 64}
"""The algorithms that need the secret, and its minimum length in bytes (RFC 7518 section 3.2)."""


BEARER = re.compile(r"[!-~]([ -~]*[!-~])?")
"""What an Authorization header can have behind `Bearer`."""

MIN_KEY_BYTES = 32


class JwtSettings(Section):
    """Token verification: HS algorithms need the secret, all others the key file or the URL."""

    secret: SecretStr = Field(SecretStr(""), description="shared secret of HS256, HS384 and HS512")
    secrets: Secrets = Field(
        (),
        description="further secrets that verify tokens, while the issuer changes its secret",
        json_schema_extra={ITEMS: "non-empty strings"},
    )
    public_key_file: FilePath = Field(
        "", description="file with one public key, PEM, for the other algorithms"
    )
    jwks_url: str = Field(
        "",
        description="or the URL of the issuer's key set or openid-configuration; refreshed",
    )
    algorithms: Annotated[tuple[Algorithm, ...], NoDecode, BeforeValidator(_listed)] = Field(
        ("HS256",),
        description="accepted signature algorithms",
        json_schema_extra={ITEMS: ", ".join(get_args(Algorithm))},
    )
    audience: OneOrMore = Field(
        (),
        description="required in a token's aud, or one of several; empty: tokens with an aud are"
        " rejected",
        json_schema_extra=ONE_OR_MORE,
    )
    issuer: OneOrMore = Field(
        (),
        description="required iss of a token, or one of several; empty: any",
        json_schema_extra=ONE_OR_MORE,
    )
    claim: str = Field(
        "relay",
        min_length=1,
        description="the claim with the permissions: its name, or a path like app_metadata.relay",
    )
    leeway_s: Annotated[float, Field(ge=0, le=300)] = Field(
        0,
        description="how far the issuer's clock may differ: exp and nbf are tolerated for so long",
    )

    _utf_8 = field_validator("secret", "secrets")(_in_utf_8)

    @field_validator("algorithms")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # As a bound of the field this would be a second error if the only item is invalid.
        if not value:
            raise ValueError(f"one or more of {', '.join(get_args(Algorithm))}")
        return value

    @field_validator("jwks_url")
    @classmethod
    def _url(cls, value: str) -> str:
        if value and not is_web_address(value):
            raise ValueError("a URL like https://issuer.example/jwks.json, without a password")
        return value

    @property
    def all_secrets(self) -> list[tuple[str, bytes]]:
        """Every shared secret, after the name of its setting."""
        named = [("secret", self.secret), *(("secrets", each) for each in self.secrets)]
        return [(name, each.get_secret_value().encode()) for name, each in named if each]

    @property
    def public_key_settings(self) -> list[str]:
        """The names of the settings that provide public keys and are not empty."""
        return [name for name in ("public_key_file", "jwks_url") if getattr(self, name)]

    def algorithms_needing_longer_secret(self) -> Iterator[tuple[str, int]]:
        """Yield each algorithm for which a secret is too short, and the minimum in bytes."""
        length = min((len(secret) for _, secret in self.all_secrets), default=0)
        for algorithm in sorted(set(self.algorithms)):
            if length < SECRET_BYTES.get(algorithm, 0):
                yield algorithm, SECRET_BYTES[algorithm]


class AuthHookSettings(Section):
    """The backend that decides about clients by their sessions; hooks.secret signs the requests."""

    url: str = Field("", description="asked by POST who a client is, and which channels it may use")
    headers: Texts = Field(
        ("cookie", "authorization"),
        description="headers of a client's request that are passed on",
        json_schema_extra={ITEMS: "names of headers"},
    )
    timeout_s: PositiveSeconds = Field(
        5, description="without an answer for this long, the client is refused (503)"
    )
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = Field(
        100, description="requests at a time; beyond it clients are refused (503)"
    )

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        return _hook_address(value)

    @field_validator("headers")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(FIELD_NAME.fullmatch, value)):
            raise ValueError("names of headers, like cookie")
        return tuple(dict.fromkeys(map(str.lower, value)))


def _hook_address(value: str) -> str:
    if value and not is_web_address(value):
        raise ValueError("a URL like https://app.example/relay, without a password")
    return value


class AuthSettings(Section):
    """Authentication of clients."""

    mode: Literal["none", "jwt", "hook"] = Field(
        "none",
        description="none: all clients are accepted; jwt: a token is required; hook: your backend"
        " is asked",
    )
    jwt: JwtSettings = JwtSettings()
    hook: AuthHookSettings = AuthHookSettings()

    @model_validator(mode="after")
    def _a_hook_to_ask(self) -> "AuthSettings":
        if self.mode == "hook" and not self.hook.url:
            raise ValueError("auth.mode is hook; it needs auth.hook.url")
        return self

    @model_validator(mode="after")
    def _a_key_for_every_algorithm(self) -> "AuthSettings":
        if self.mode != "jwt":
            return self
        with_secret = [name for name in self.jwt.algorithms if name in SECRET_BYTES]
        others = [name for name in self.jwt.algorithms if name not in SECRET_BYTES]
        if self.jwt.public_key_settings and not others:
            raise ValueError(
                f"auth.jwt.{self.jwt.public_key_settings[0]} is set, but auth.jwt.algorithms"
                f" ({', '.join(with_secret)}) uses no public key; set auth.jwt.algorithms"
                " to the algorithms of the tokens: RS256 for most RSA keys, ES256 or EdDSA"
                " for others"
            )
        if with_secret and not self.jwt.all_secrets:
            raise ValueError(f"{', '.join(with_secret)} needs auth.jwt.secret")
        if self.jwt.public_key_file and self.jwt.jwks_url:
            raise ValueError("auth.jwt.public_key_file and auth.jwt.jwks_url are both set")
        if others and not (self.jwt.public_key_file or self.jwt.jwks_url):
            names = ", ".join(others)
            raise ValueError(f"{names} needs auth.jwt.public_key_file or auth.jwt.jwks_url")
        return self


class HooksSettings(Section):
    """Webhooks: what happens in channels, for your backend; and the signature of all requests."""

    url: str = Field("", description="receives events by POST (webhooks); empty: none")
    secret: SecretStr = Field(
        SecretStr(""),
        description="signs every request to hooks.url and auth.hook.url (Relay-Signature); empty:"
        " they are not signed",
    )
    messages: Texts = Field(
        (),
        description="patterns of channels whose messages are events, too; a * at the end stands for"
        " any rest",
        json_schema_extra={ITEMS: "patterns of channel names"},
    )
    timeout_s: PositiveSeconds = Field(
        5, description="events that are not accepted within this time are sent again"
    )
    max_pending: Annotated[int, Field(ge=1, le=MAX_COUNT)] = Field(
        100_000, description="events that wait to be sent; beyond it they are dropped and counted"
    )

    _utf_8 = field_validator("secret")(_in_utf_8)

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        return _hook_address(value)


class ApiSettings(Section):
    """The server API: publishing, disconnecting, and questions about all replicas."""

    key: SecretStr = Field(
        SecretStr(""),
        description="opens /api; empty: tokens of admins alone do, where auth.mode is not none",
    )

    @field_validator("key")
    @classmethod
    def _of_a_header(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value() and not BEARER.fullmatch(value.get_secret_value()):
            raise ValueError("printable ASCII characters, without spaces at the ends")
        return value

    @property
    def is_short(self) -> bool:
        """Whether the key can be guessed."""
        return 0 < len(self.key.get_secret_value()) < MIN_KEY_BYTES


class ConsoleSettings(Section):
    """The web page with live stats."""

    enabled: bool = Field(
        True, description="the page at / and its live stats; disable it on a public relay"
    )


class ShutdownSettings(Section):
    """Graceful shutdown."""

    readiness_delay_s: Seconds = Field(
        0, description="time to keep serving while load balancers remove the replica"
    )
    spread_s: Seconds = Field(5, description="clients are closed one after another over this time")
    timeout_s: Annotated[float, Field(ge=1, le=MAX_SECONDS)] = Field(
        10, description="maximum duration of the whole shutdown"
    )


class LoggingSettings(Section):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error"
    )
    format: Literal["text", "json"] = Field("text", description="text or json")


_environ: ContextVar[Mapping[str, str]] = ContextVar("environ")


class Settings(BaseSettings):
    """The whole tree. Build it with `load`, which reports problems in the terms of the settings.

    Args:
        environ: variables with values, which take precedence.
        values: of the file, by section.
    """

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    server: ServerSettings = ServerSettings()
    metrics: MetricsSettings = MetricsSettings()
    channels: ChannelsSettings = ChannelsSettings()
    limits: LimitsSettings = LimitsSettings()
    keepalive: KeepaliveSettings = KeepaliveSettings()
    compression: CompressionSettings = CompressionSettings()
    history: HistorySettings = HistorySettings()
    presence: PresenceSettings = PresenceSettings()
    backplane: BackplaneSettings = BackplaneSettings()
    auth: AuthSettings = AuthSettings()
    hooks: HooksSettings = HooksSettings()
    api: ApiSettings = ApiSettings()
    console: ConsoleSettings = ConsoleSettings()
    shutdown: ShutdownSettings = ShutdownSettings()
    logging: LoggingSettings = LoggingSettings()

    def __init__(self, environ: Mapping[str, str] | None = None, /, **values: Any) -> None:
        token = _environ.set(environ or {})
        try:
            super().__init__(**values)
        finally:
            _environ.reset(token)

    @property
    def has_api(self) -> bool:
        """Whether the server API is there: for the holder of its key, or of a token."""
        return bool(self.api.key.get_secret_value()) or self.auth.mode != "none"

    @property
    def max_calls(self) -> int:
        """How many connections to the operator's backend there are at most."""
        of_hook = self.auth.hook.max_in_flight if self.auth.mode == "hook" else 0
        return of_hook + bool(self.hooks.url)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the given variables, not those of the process: a secret may be in a file."""
        assert isinstance(env_settings, EnvSettingsSource)
        env_settings.env_vars = {name.lower(): value for name, value in _environ.get().items()}
        return env_settings, init_settings

    def warnings(self) -> Iterator[SettingsWarning]:
        """Yield warnings, which `check` prints and the relay logs at startup."""
        jwt = self.auth.jwt
        if self.api.is_short:
            yield SettingsWarning("api.key is short", {"min_bytes": MIN_KEY_BYTES})
        yield from self._hook_warnings()
        if self.auth.mode == "none":
            named = [*dict(jwt.all_secrets), *jwt.public_key_settings]
            unused = [f"auth.jwt.{name}" for name in named]
            unused += ["auth.hook.url"] if self.auth.hook.url else []
            if unused:
                yield SettingsWarning(
                    "auth.mode is none: all clients are accepted", {"unused": ", ".join(unused)}
                )
            return
        if self.auth.mode == "hook":
            if "cookie" in self.auth.hook.headers and "*" in self.server.allowed_origins:
                # Browsers send cookies with the WebSockets of any page.
                yield SettingsWarning(
                    "any page may use the cookies of its visitors", {"allowed_origins": "*"}
                )
            return
        for algorithm, min_bytes in jwt.algorithms_needing_longer_secret():
            facts = {"algorithm": algorithm, "min_bytes": min_bytes}
            yield SettingsWarning("auth.jwt.secret is short", facts)

    def _hook_warnings(self) -> Iterator[SettingsWarning]:
        called = ["auth.hook.url"] if self.auth.mode == "hook" else []
        called += ["hooks.url"] if self.hooks.url else []
        if called and not self.hooks.secret.get_secret_value():
            yield SettingsWarning(
                "hooks.secret is empty: requests are not signed", {"unsigned": ", ".join(called)}
            )
        if self.hooks.url and not (self.presence.channels or self.hooks.messages):
            yield SettingsWarning(
                "hooks.url receives no events", {"empty": "presence.channels, hooks.messages"}
            )

    @model_validator(mode="after")
    def _two_ports(self) -> "Settings":
        is_open = self.metrics.enabled and self.server.port and not self.server.socket
        if is_open and self.server.port == self.metrics.port:
            raise ValueError("server.port and metrics.port are the same")
        return self
