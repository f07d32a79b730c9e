"""The OpenAPI document: valid, complete, and in agreement with the responses."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
import jsonschema
import openapi_spec_validator
import pytest

from tests.support.issuer import SECRET, sign_token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import NO_CA, ROOT, RelayProcess, StartRelay, run_python
from tests.support.server_api import KEY, WITH_KEY, request_api

ROUTES = {
    ("/", "post"),
    ("/channels/{channel}", "post"),
    ("/events", "get"),
    ("/channels/{channel}/events", "get"),
    ("/channels/{channel}/presence", "get"),
    ("/stats", "get"),
    ("/healthz", "get"),
    ("/readyz", "get"),
}


async def openapi_document(relay: RelayProcess) -> dict[str, Any]:
    response = await relay.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    document: dict[str, Any] = response.json()
    return document


async def test_the_document_is_valid_openapi(relay: RelayProcess) -> None:
    openapi_spec_validator.validate(await openapi_document(relay))


async def test_the_document_describes_all_routes(relay: RelayProcess) -> None:
    paths = (await openapi_document(relay))["paths"]
    assert {(path, method) for path, methods in paths.items() for method in methods} == ROUTES
    for methods in paths.values():
        for operation in methods.values():
            assert operation["summary"]
            for response in operation["responses"].values():
                assert response["description"]
    published = paths["/"]["post"]["responses"]["202"]["content"]["application/json"]["schema"]
    assert "messages" in published["properties"]


async def test_the_document_includes_the_base_path(relay_with: StartRelay) -> None:
    relay = relay_with(server={"base_path": "/relay"})
    paths = (await relay.get("/relay/openapi.json")).json()["paths"]
    assert {"/relay/", "/relay/channels/{channel}", "/relay/events"} <= paths.keys()


API_ROUTES = {
    ("/api/publish", "post"),
    ("/api/disconnect", "post"),
    ("/api/channels", "get"),
    ("/api/clients", "get"),
    ("/api/replicas", "get"),
    ("/api/logging", "patch"),
}


@pytest.fixture
def api_relay(relay_with: StartRelay) -> RelayProcess:
    return relay_with(**WITH_KEY)


async def test_the_document_describes_the_server_api_where_there_is_one(
    api_relay: RelayProcess,
) -> None:
    document = await openapi_document(api_relay)
    openapi_spec_validator.validate(document)
    paths = document["paths"]
    described = {(path, method) for path, methods in paths.items() for method in methods}
    assert {each for each in described if each[0].startswith("/api")} == API_ROUTES


def query_of(operation: dict[str, Any], names: Sequence[str]) -> str:
    """Return a query with the examples of some parameters."""
    parameters = [each for each in operation.get("parameters", []) if each["name"] in names]
    return urlencode({each["name"]: each["example"] for each in parameters})


async def test_the_examples_of_the_server_api_are_answered_as_described(
    api_relay: RelayProcess,
) -> None:
    paths = (await openapi_document(api_relay))["paths"]
    async with api_relay.client("news"):
        for path, method in API_ROUTES:
            operation = paths[path][method]
            assert operation["security"] == [{"admin": []}]
            content = operation.get("requestBody", {}).get("content", {"": {}})
            ((media_type, body),) = content.items()
            example = body.get("example")
            if isinstance(example, dict):
                jsonschema.validate(example, body["schema"])
            for names in ((), ("limit", "order"), ("channel", "prefix", "user")):
                response = await request_api(
                    api_relay,
                    method.upper(),
                    f"{path.removeprefix('/api')}?{query_of(operation, names)}",
                    example,
                    headers={"Content-Type": media_type} if media_type else {},
                )
                described = operation["responses"][str(response.status_code)]
                assert response.is_success, (path, response.text)
                answer = described["content"]["application/json"]
                jsonschema.validate(response.json(), answer["schema"])
                jsonschema.validate(answer["example"], answer["schema"])
            refused = await request_api(api_relay, method.upper(), path[4:], b"no", secret="x")
            assert str(refused.status_code) in operation["responses"]


async def test_the_server_api_answers_as_described_and_refuses_what_the_document_forbids(
    api_relay: RelayProcess, tmp_path: Path
) -> None:
    """The command generates requests from the document, valid and invalid ones."""
    done = await asyncio.to_thread(
        run_python,
        *("-m", "schemathesis.cli", "--no-color"),
        *("--config-file", str(ROOT / "tests" / "support" / "schemathesis.toml")),
        *("run", api_relay.http_url("/openapi.json"), "--include-path-regex", "^/api/"),
        *("--header", f"Authorization: Bearer {KEY}", "--checks", "all"),
        directory=tmp_path,
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    assert f"Tested: {len(API_ROUTES)}" in done.stdout
    assert await api_relay.metric("websocket_messages_total") > 0
    assert api_relay.unexpected_lines == []


GZIP = {"Content-Encoding": "gzip"}
REQUESTS = [
    ("post", "/channels/{channel}", 202, {}, b"1\n2\n"),
    ("post", "/channels/{channel}", 400, {}, b"no"),
    ("post", "/channels/{channel}", 401, {"Authorization": ""}, b"1"),
    ("post", "/channels/{channel}", 403, {"Origin": "https://other.example"}, b"1"),
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
def limited_relay(relay_with: StartRelay) -> RelayProcess:
    """A relay that requires tokens, admits one origin, and has a limit of one client."""
    return relay_with(
        auth={"mode": "jwt", "jwt": {"secret": SECRET}},
        server={"allowed_origins": ["https://allowed.example"]},
        limits={"max_message_bytes": 1000, "max_connections": 1},
    )


async def test_responses_agree_with_the_document(limited_relay: RelayProcess) -> None:
    paths = (await openapi_document(limited_relay))["paths"]
    permissions = {"subscribe": ["*"], "publish": ["*"], "stats": True}
    default_headers = {
        "Authorization": f"Bearer {sign_token(relay=permissions)}",
        "Content-Type": "application/x-ndjson",
    }
    http = httpx2.AsyncClient(verify=NO_CA, trust_env=False, timeout=PATIENCE_S)
    bearer = {"Authorization": default_headers["Authorization"]}
    async with http, limited_relay.client("a", additional_headers=bearer):
        for method, path, status, headers, body in REQUESTS:
            url = limited_relay.http_url(path.format(channel="a"))
            response = await http.request(
                method, url, headers=default_headers | headers, content=body
            )
            assert response.status_code == status, (path, response.text)
            described = paths[path][method]["responses"][str(status)]
            media_type = response.headers["content-type"].partition(";")[0]
            assert media_type in described["content"]
            if media_type == "application/json":
                jsonschema.validate(response.json(), described["content"][media_type]["schema"])
            assert all(name in response.headers for name in described.get("headers", {}))
