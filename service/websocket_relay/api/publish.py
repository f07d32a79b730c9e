"""Publish by HTTP: one message in a request, or a batch with one message a line.

Knows no subscriber and no frame.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from websocket_relay.admission.policy import AdmissionPolicy
from websocket_relay.api import media_types
from websocket_relay.api.media_types import MediaType
from websocket_relay.api.refusals import refusal_responses
from websocket_relay.api.requests import (
    CHANNEL_PARAMETER,
    CHANNEL_PATH,
    DEFAULT_PATH,
    TOKEN_PARAMETER,
    admission_request_of,
    cancelled_when_lost,
    channel_of,
)
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.channels.publications import key_source
from websocket_relay.messages import BINARY, TEXT, Message
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.strict_json import refuse_constant
from websocket_relay.wire.http_protocol import CONNECTION_KEY, HttpProtocol
from websocket_relay.wire.partial_messages import PartialMessages
from websocket_relay.wire.time_slicer import TimeSlicer

T = TypeVar("T")

MAX_BATCH = 10_000
"""Messages in one request. They are appended in one turn of the event loop, and so are
contiguous."""

VALUE = re.compile(rb"[^ \t\r\n][^\n]*")
"""A line from its first character that is not JSON whitespace (RFC 8259 section 2)."""

IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,128}")
"""Visible ASCII characters."""

KEY_PARAMETER = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "a request with a key that the log holds already is answered with the position"
    " of the first one, and is not relayed again",
    "schema": {"type": "string", "pattern": f"^{IDEMPOTENCY_KEY.pattern}$"},
    "example": "7f3c1a52-9d8e-4b57-8f6e-2f1d0c9b8a76",
}

RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "The message has a position in the channel.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["position"],
                    "properties": {
                        "position": {
                            "type": "string",
                            "description": "position of the last message",
                        },
                        "messages": {
                            "type": "integer",
                            "description": "number of messages in a batch",
                        },
                    },
                },
                "example": {"position": "1795441056000-8-0"},
            }
        },
    }
}
ANY = {"schema": {"type": "string", "format": "binary"}}
BODY = {
    "required": True,
    "description": "text/*, JSON, XML, forms and application types with a charset are relayed as"
    f" text, {media_types.BATCH} as one text message for each line, {MAX_BATCH} at most, any other"
    " type as binary.",
    "content": {
        "text/plain": {"schema": {"type": "string"}, "example": "hello, world"},
        media_types.JSON: {"schema": {}},
        media_types.BATCH: {"schema": {"type": "string"}, "example": '{"n":1}\n{"n":2}\n'},
        media_types.OCTET_STREAM: ANY,
        "*/*": ANY,
    },
}


def publish_router(
    admission: AdmissionPolicy,
    broadcaster: Broadcaster,
    *,
    base_path: str,
    max_bytes: int,
) -> APIRouter:
    """Return the routes that accept messages at `/` and `/channels/{channel}`.

    Args:
        admission: decides who may publish.
        broadcaster: receives the messages.
        base_path: the prefix of both paths.
        max_bytes: maximum size of a request body.
    """
    shared = broadcaster.shared

    async def publish(request: Request) -> Response:
        media_type = MediaType.parse(request.headers.get("content-type", ""))
        channel, key = channel_of(request), idempotency_key(request)
        with cancelled_when_lost(request):
            user = await admission.admit_publisher(admission_request_of(request, (channel,)))
        source = key_source(key, channel, user) if key else b""
        async with received_body(request, max_bytes, shared.partial_messages) as body:
            messages = await _decode(media_type, body, max_bytes, shared.parse_slicer)
            await broadcaster.wait_for_capacity(channel)
        position = await broadcaster.publish(channel, messages, source)
        count = f',"messages":{len(messages)}' if media_type.is_batch else ""
        content = f'{{"position":"{position}"{count}}}'  # a position needs no escapes
        return Response(content, HTTPStatus.ACCEPTED, media_type=media_types.JSON)

    router = APIRouter()
    for path, parameters in ((CHANNEL_PATH, [CHANNEL_PARAMETER]), (DEFAULT_PATH, [])):
        # Starlette's route answers; FastAPI's describes: see `api.routes`.
        router.add_route(base_path + path, publish, methods=["POST"])
        router.add_api_route(
            base_path + path,
            publish,
            methods=["POST"],
            status_code=HTTPStatus.ACCEPTED,
            summary="Publish one message or a batch",
            response_model=None,
            responses={
                **RESPONSES,
                **refusal_responses(400, 401, 403, 404, 408, 413, 415, 422, 503, 504),
            },
            openapi_extra={
                "parameters": [*parameters, KEY_PARAMETER, TOKEN_PARAMETER],
                "requestBody": BODY,
            },
        )
    return router


class MessageBatch:
    """The body of one request, from its first byte until the backlog accepts it.

    All bodies share one bound with the partial messages of WebSocket clients. Above the bound the
    largest are refused.

    Args:
        unfinished: the shared bound.
    """

    def __init__(self, unfinished: PartialMessages) -> None:
        self._unfinished = unfinished
        self._scope = asyncio.timeout(None)

    async def __aenter__(self) -> "MessageBatch":
        """Start to count the body."""
        await self._scope.__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        """Release the body.

        Raises:
            RefusedError: the body was dropped because the bound was exceeded.
        """
        self._unfinished.record_partial_bytes(self, 0)
        try:
            await self._scope.__aexit__(*raised)
        except TimeoutError:
            raise RefusedError(Refusal.PARTIAL_MESSAGES) from None

    def record_size(self, size: int) -> None:
        """Record the number of bytes received so far."""
        self._unfinished.record_partial_bytes(self, size)

    def drop_partial_message(self) -> None:
        """Cancel the request, whatever it awaits."""
        self._unfinished.record_partial_bytes(self, 0)
        self._scope.reschedule(asyncio.get_running_loop().time())


def idempotency_key(request: Request) -> str:
    """Return the key of a request that may be a repeat; empty: it has none.

    Raises:
        RefusedError: it is invalid, or there are several.
    """
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return ""
    if len(keys) > 1 or not IDEMPOTENCY_KEY.fullmatch(keys[0]):
        raise RefusedError(Refusal.INVALID_IDEMPOTENCY_KEY)
    return keys[0]


@asynccontextmanager
async def received_body(
    request: Request, max_bytes: int, unfinished: PartialMessages
) -> AsyncIterator[bytes]:
    """Receive the body of a request, which is counted until the block ends.

    Args:
        request: the request.
        max_bytes: maximum size of its body.
        unfinished: the bound of all bodies: see `MessageBatch`.

    Raises:
        RefusedError: the body is compressed or too large, or the bound was exceeded.
        ClientDisconnect: the client has disconnected. It may have published to another replica
            since.
    """
    _require_identity_coding(request)
    async with MessageBatch(unfinished) as batch:
        yield await _read_body(request, max_bytes, batch)
    connection: HttpProtocol = request.scope[CONNECTION_KEY]
    if connection.is_disconnected:
        raise ClientDisconnect


def _require_identity_coding(request: Request) -> None:
    """Refuse a body that is compressed."""
    codings = ",".join(request.headers.getlist("content-encoding"))
    if any(coding.strip().lower() not in ("", "identity") for coding in codings.split(",")):
        raise RefusedError(Refusal.CONTENT_CODING)


async def _read_body(request: Request, max_bytes: int, batch: MessageBatch) -> bytes:
    """Return the body of a request; refuse one that is too large as early as possible."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise RefusedError(Refusal.MESSAGE_TOO_BIG)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise RefusedError(Refusal.MESSAGE_TOO_BIG)
        parts.append(part)
        batch.record_size(size)
    return b"".join(parts)


async def _decode(
    media_type: MediaType, body: bytes, max_bytes: int, slicer: TimeSlicer
) -> list[Message]:
    """Return the messages in a body.

    Raises:
        RefusedError: the body does not match its media type.
    """
    if not media_type.is_batch and not media_type.is_text:
        return [(BINARY, body)]
    text = media_type.to_utf_8(body)
    if len(text) > max_bytes:
        raise RefusedError(Refusal.MESSAGE_TOO_BIG)
    if media_type.is_batch:
        return await collect(_lines(text), slicer)
    if not _is_utf8(text):
        raise RefusedError(Refusal.INVALID_MESSAGE, "text is not UTF-8")
    return [(TEXT, text)]


async def collect(messages: Iterator[T], slicer: TimeSlicer) -> list[T]:
    """Return all messages, parsed in time slices shared with other input.

    Raises:
        RefusedError: a line is not a message.
    """
    done: asyncio.Future[list[T]] = asyncio.get_running_loop().create_future()

    def work() -> Iterator[None]:
        collected = []
        while not done.done():  # the caller may be cancelled between two steps
            try:
                collected.append(next(messages))
            except StopIteration:
                done.set_result(collected)
            except RefusedError as error:
                done.set_exception(error)
            yield

    slicer.schedule_work(work())
    return await done


def _lines(body: bytes) -> Iterator[Message]:
    """Yield one text message for each line, unchanged; each must be one JSON value."""
    for number, line in enumerate(VALUE.finditer(body), 1):
        if number > MAX_BATCH:
            raise RefusedError(Refusal.MESSAGE_TOO_BIG, f"a batch has up to {MAX_BATCH} lines")
        text = line[0].rstrip(b" \t\r")
        try:
            check_json(text.decode())
        except (ValueError, RecursionError):
            line_number = body.count(b"\n", 0, line.start()) + 1
            raise RefusedError(Refusal.INVALID_MESSAGE, f"line {line_number} is not JSON") from None
        yield TEXT, text


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


check_json = json.JSONDecoder(
    parse_constant=refuse_constant,
    parse_int=bool,  # the value is not needed, and converting long numbers is slow
    parse_float=bool,
).decode
"""Checks that a text is JSON. It is relayed as it is: what a repeated key means is up to those who
read it."""
