"""HTTP requests: sent to a relay, or as bytes."""

from collections.abc import Mapping

import httpx2

from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import NO_CA, RelayProcess, path_of

TEXT_TYPE = "text/plain"
BATCH_TYPE = "application/x-ndjson"


async def publish_by_post(
    relay: RelayProcess,
    channel: str | None,
    body: bytes,
    content_type: str = "",
    headers: Mapping[str, str] | None = None,
) -> httpx2.Response:
    """Publish to a channel with a POST; return the response."""
    fields = {**({"Content-Type": content_type} if content_type else {}), **(headers or {})}
    context = relay.tls_context or NO_CA
    async with httpx2.AsyncClient(verify=context, trust_env=False, timeout=PATIENCE_S) as http:
        return await http.post(relay.http_url(path_of(channel)), content=body, headers=fields)


def post_request(
    channel: str, body: bytes, *lines: str, length: int | None = None, version: str = "1.1"
) -> bytes:
    """Return the bytes of a POST to a channel.

    Args:
        lines: further header lines.
        length: another Content-Length than that of the body.
    """
    head = [
        f"POST /channels/{channel} HTTP/{version}",
        "Host: localhost",
        "Content-Type: text/plain",
        f"Content-Length: {len(body) if length is None else length}",
        *lines,
    ]
    return "".join(f"{line}\r\n" for line in (*head, "")).encode() + body


def get_request(path: str, *lines: str) -> bytes:
    """Return the bytes of a GET request, with further header lines."""
    head = [f"GET {path} HTTP/1.1", "Host: localhost", *lines, ""]
    return "".join(f"{line}\r\n" for line in head).encode("latin-1")
