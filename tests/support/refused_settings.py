"""Settings that the relay refuses, and so does the chart: each alone, or because of others."""

from typing import Any

SECRET = "a secret that must never be printed"

ORIGINS: list[tuple[str, str]] = [
    ("example.com", "scheme://host[:port]"),
    ("https://example.com/", "without a path"),
    ("https://user@example.com", "scheme://host[:port]"),
    ("https://a.*.example", "scheme://host[:port]"),
    ("wss://example.com", "https://, not wss"),
    ("file:///index.html", "scheme://host[:port]"),
    ("file://host", "file:// or null"),
    ("https://example.com:0", "1 to 65535"),
    ("https://example.com:99999", "1 to 65535"),
    ("http://127.1", "127.1 is not a host name or an IP address"),
    ("http://[::x]", "[::x] is not a host name or an IP address"),
    ("http://*.127.0.0.1", "no subdomains"),
    ("https://exa\u2028mple.com", "scheme://host[:port]"),
    ("https://a..example", "not a host name"),
    ("", "scheme://host[:port]"),
]
"""Origins that no browser sends, with words of the error."""

SERVERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"socket": "fd:2"}, ["server.socket", "fd:3"]),
    ({"socket": "fd:x"}, ["server.socket", "fd:3"]),
    ({"socket": "unix:/run/relay.sock"}, ["server.socket", "a path like"]),
    ({"socket": "/run/" + "x" * 200}, ["server.socket", "107 bytes"]),
    ({"host": ""}, ["server.host", "separated by commas"]),
    ({"host": "127.0.0.1,"}, ["server.host", "separated by commas"]),
    ({"host": [1]}, ["server.host"]),
    ({"proxy_protocol": True}, ["server.proxy_protocol needs server.trusted_proxies"]),
]
"""Sections `server` whose sockets can not work, with words of the error."""

TOKENS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["HS256", "auth.jwt.secret"]),
    (
        {"algorithms": ["RS256"], "secret": SECRET},
        ["RS256", "auth.jwt.public_key_file", "auth.jwt.jwks_url"],
    ),
    (
        {"algorithms": ["HS256", "ES256"], "jwks_url": "https://issuer.example/"},
        ["HS256", "auth.jwt.secret"],
    ),
    (
        {
            "algorithms": ["ES256"],
            "jwks_url": "https://issuer.example/",
            "public_key_file": "x",
        },
        ["auth.jwt.public_key_file", "auth.jwt.jwks_url", "both"],
    ),
    (
        {"jwks_url": "https://issuer.example/"},
        ["auth.jwt.jwks_url is set", "auth.jwt.algorithms (HS256)", "RS256", "ES256", "EdDSA"],
    ),
    (
        {"public_key_file": "jwt.pem", "secret": SECRET, "algorithms": ["HS256", "HS512"]},
        ["auth.jwt.public_key_file is set", "(HS256, HS512)", "RS256"],
    ),
]
"""Sections `auth.jwt` whose keys do not fit their algorithms, with words of the error."""

JWKS_URLS = [
    "issuer.example/keys",
    "ftp://issuer.example/keys",
    "file:///etc/passwd",
    "https://",
    "https:///keys",
    "https://user:password@issuer.example/keys",
    "https://token@issuer.example/keys",
    "https://issuer.example:99999/keys",
    "https://issuer.example:x/keys",
    "https://[::1/keys",
    "https://issuer.example/a b",
    "https://issuer.example/a\nb",
]
"""Values of `auth.jwt.jwks_url` that are not the address of a key set."""

PROXIES = ["10.0.0.0/99", "10.0.0.7/8", "fd12::/8", "1.2.3", "proxy.example", "*", ""]
"""Values of `server.trusted_proxies` that are neither an address nor a network."""

STREAMS = [
    *(("redis://host", each, True) for each in ("app1:relay", "{relay}", "team1.relay", "a b")),
    *(("redis+cluster://host", each, True) for each in ("{relay}:log", "*", "x" * 255)),
    *(("redis://host", each, False) for each in ("", " a", "a ", "gr\u00fc\u00dfe", "x" * 256)),
    *(("nats://host", each, True) for each in ("app1:relay", "{relay}", "x" * 255)),
    *(("tls://host", each, False) for each in ("team1.relay", "a b", "a*", ">", "a/b", "a\\b")),
]
"""Brokers, names of streams, and whether the two fit."""

ACCESS: list[tuple[str, dict[str, str], str, str]] = [
    ("memory://", {"password": SECRET}, "password", "memory:// is not a broker"),
    ("redis://b", {"creds_file": "x"}, "creds_file", "only NATS has it"),
    ("rediss://b", {"domain": "hub"}, "domain", "only NATS has it"),
    ("redis://b", {"ca_file": "x"}, "ca_file", "needs TLS: begin backplane.url with rediss://"),
    ("nats://b", {"ca_file": "x"}, "ca_file", "needs TLS: begin backplane.url with tls://"),
    ("rediss://b?ssl_ca_certs=x", {"ca_file": "x"}, "ca_file", "ssl_ca_certs from backplane"),
    ("tls://b", {"key_file": "x"}, "key_file", "needs backplane.cert_file"),
    ("rediss://b?ssl_keyfile=x", {}, "url", "ssl_keyfile needs ssl_certfile"),
    ("tls://b?ssl_keyfile=x", {}, "url", "ssl_keyfile needs ssl_certfile"),
    ("redis://user@b", {"password": SECRET}, "password", "remove user, password and token"),
    ("redis://b", {"username": "u"}, "username", "needs backplane.password"),
    (
        "nats://b",
        {"password": SECRET, "nkey_file": "x"},
        "password",
        "remove it, or backplane.nkey_file",
    ),
    ("nats://b?domain=hub", {}, "url", "set backplane.domain instead"),
    ("nats://b?handshake_first=true", {}, "url", "handshake_first needs TLS"),
    ("nats://b", {"domain": "a.b"}, "domain", "one word of"),
    ("nats://b", {"inbox_prefix": "_INBOX.>"}, "inbox_prefix", "words of"),
    ("nats://b", {"nkey_file": "a\nb"}, "nkey_file", "the path of a file"),
]
"""Brokers, settings of `backplane` that do not fit them or each other, the setting that the error
names, and words of the error."""
