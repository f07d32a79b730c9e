"""The description of what can be asked by HTTP: valid, whole, and true."""

from typing import Any

import httpx2
import jsonschema
import openapi_spec_validator
import pytest

from tests.support.issuer import SECRET, token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import PLAIN, Relay, StartRelay

ROUTES = {
    ("/", "post"),
    ("/channels/{channel}", "post"),
    ("/events", "get"),
    ("/channels/{channel}/events", "get"),
    ("/stats", "get"),
    ("/healthz", "get"),
    ("/readyz", "get"),
}


async def described(relay: Relay) -> dict[str, Any]:
    answer = await relay.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    document: dict[str, Any] = answer.json()
    return document


async def test_the_description_is_valid(relay: Relay) -> None:
    openapi_spec_validator.validate(await described(relay))


async def test_the_description_names_all_that_can_be_asked(relay: Relay) -> None:
    paths = (await described(relay))["paths"]
    assert {(path, method) for path, what in paths.items() for method in what} == ROUTES
    for what in paths.values():
        for operation in what.values():
            assert operation["summary"]
            for answer in operation["responses"].values():
                assert answer["description"]
    assert (
        "messages"
        in paths["/"]["post"]["responses"]["202"]["content"]["application/json"]["schema"][
            "properties"
        ]
    )


async def test_it_stands_below_the_path_that_all_stands_below(relay_with: StartRelay) -> None:
    relay = relay_with(server={"base_path": "/relay"})
    paths = (await relay.get("/relay/openapi.json")).json()["paths"]
    assert {"/relay/", "/relay/channels/{channel}", "/relay/events"} <= paths.keys()


GZIP = {"Content-Encoding": "gzip"}
ASKED = [
    ("post", "/channels/{channel}", 202, {}, b"1\n2\n"),
    ("post", "/channels/{channel}", 400, {}, b"no"),
    ("post", "/channels/{channel}", 401, {"Authorization": ""}, b"1"),
    ("post", "/channels/{channel}", 403, {"Origin": "https://theirs.example"}, b"1"),
    ("post", "/channels/{channel}", 413, {}, b"1" * 1001),
    ("post", "/channels/{channel}", 415, GZIP, b"1"),
    ("get", "/channels/{channel}/events", 401, {"Authorization": ""}, None),
    ("get", "/channels/{channel}/events", 400, {"Last-Event-ID": "yesterday"}, None),
    ("get", "/channels/{channel}/events", 503, {}, None),
    ("get", "/stats", 200, {}, None),
    ("get", "/stats", 401, {"Authorization": ""}, None),
    ("get", "/readyz", 200, {}, None),
]


@pytest.fixture
def guarded_relay(relay_with: StartRelay) -> Relay:
    """A relay with tokens and limits, and room for one client."""
    return relay_with(
        auth={"mode": "jwt", "jwt": {"secret": SECRET}},
        server={"allowed_origins": ["https://ours.example"]},
        limits={"max_message_bytes": 1000, "max_connections": 1},
    )


async def test_answers_are_those_that_are_described(guarded_relay: Relay) -> None:
    paths = (await described(guarded_relay))["paths"]
    rights = {"subscribe": ["*"], "publish": ["*"], "stats": True}
    usual = {
        "Authorization": f"Bearer {token(relay=rights)}",
        "Content-Type": "application/x-ndjson",
    }
    http = httpx2.AsyncClient(verify=PLAIN, trust_env=False, timeout=PATIENCE_S)
    first = guarded_relay.client("a", additional_headers={"Authorization": usual["Authorization"]})
    async with http, first:
        for method, path, status, headers, body in ASKED:
            url = guarded_relay.http_url(path.format(channel="a"))
            answer = await http.request(method, url, headers=usual | headers, content=body)
            assert answer.status_code == status, (path, answer.text)
            said = paths[path][method]["responses"][str(status)]
            kind = answer.headers["content-type"].partition(";")[0]
            assert kind in said["content"]
            if kind == "application/json":
                jsonschema.validate(answer.json(), said["content"][kind]["schema"])
            assert all(name in answer.headers for name in said.get("headers", {}))
