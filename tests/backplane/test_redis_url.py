"""The URLs of Redis: what they name, and which are refused."""

from typing import Any

import pytest
from websocket_relay.backplane.redis_url import RedisAddress, parse_redis_url
from websocket_relay.outcomes import UnusableSettingError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host", {"servers": (("host", 6379),), "uses_tls": False, "options": {"db": 0}}),
        ("valkey://host:1/", {"servers": (("host", 1),), "uses_tls": False, "options": {"db": 0}}),
        ("valkeys://host/7", {"uses_tls": True, "options": {"db": 7}}),
        (
            "REDISS://u%40:p%2F@[::1]:1/?db=2",
            {
                "servers": (("::1", 1),),
                "uses_tls": True,
                "options": {"username": "u@", "password": "p/", "db": 2},
            },
        ),
        (
            "rediss://:p@host?ssl_cert_reqs=none",
            {"options": {"username": "", "password": "p", "db": 0, "ssl_cert_reqs": "none"}},
        ),
        (
            "rediss://host?ssl_cert_reqs=CERT_REQUIRED&ssl_check_hostname=False",
            {"options": {"db": 0, "ssl_cert_reqs": "required", "ssl_check_hostname": False}},
        ),
        (
            "unix://u:p@/run/redis.sock?db=3",
            {
                "servers": (("", 0),),
                "options": {"username": "u", "password": "p", "db": 3, "path": "/run/redis.sock"},
            },
        ),
        (
            "redis+sentinel://:p@one,two:1/log",
            {
                "kind": "sentinel",
                "servers": (("one", 26379), ("two", 1)),
                "service": "log",
                "options": {"username": "", "password": "p", "db": 0},
                "sentinel_options": {},
            },
        ),
        (
            "rediss+sentinel://one/log/3?sentinel_password=s&ssl_ca_certs=ca.pem",
            {
                "uses_tls": True,
                "options": {"db": 3, "ssl_ca_certs": "ca.pem"},
                "sentinel_options": {"password": "s", "ssl_ca_certs": "ca.pem"},
            },
        ),
        (
            "redis+cluster://one:1,two/0",
            {"kind": "cluster", "servers": (("one", 1), ("two", 6379)), "options": {"db": 0}},
        ),
    ],
)
def test_a_url_names_the_servers_and_how_to_connect(url: str, expected: dict[str, Any]) -> None:
    address = parse_redis_url(url)
    assert expected.keys() <= {*RedisAddress._fields}
    assert {name: getattr(address, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://host/cache", "the database has to be a number"),
        ("redis://host/1/2", "the database has to be a number"),
        ("redis://host?db=-1", "the database has to be a number"),
        ("redis://one:1,two:1", "invalid server"),
        ("redis://", "invalid server"),
        ("redis+cluster://one,,two", "invalid server"),
        ("redis://host?protocol=3", "unknown parameters: protocol"),
        ("redis://host?ssl_ca_certs=ca.pem", "ssl_ca_certs requires TLS"),
        ("rediss://host?ssl_cert_reqs=maybe", "invalid ssl_cert_reqs"),
        ("rediss://host?ssl_check_hostname=maybe", "invalid ssl_check_hostname"),
        ("redis://host?sentinel_password=s", "unknown parameters: sentinel_password"),
        ("redis+sentinel://host", "no service"),
        ("redis+sentinel://u:p@one,u:p@two/log", "once"),
        ("redis+cluster://host/1", "no other database than 0"),
        ("unix://run/redis.sock", "no path of a socket"),
    ],
)
def test_a_url_that_would_be_misread_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(UnusableSettingError, match=reason):
        parse_redis_url(url)
