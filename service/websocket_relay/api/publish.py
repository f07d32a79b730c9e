"""Take messages by HTTP: one in a request, or many, a line each."""

import asyncio
import json
import re
from collections.abc import Iterator
from http import HTTPStatus
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from websocket_relay.admission.policy import AdmissionPolicy
from websocket_relay.api.refusals import Refusals, refused
from websocket_relay.api.requests import (
    CHANNEL_PARAMETER,
    CHANNEL_PATH,
    DEFAULT_PATH,
    TOKEN_PARAMETER,
    admission_request_of,
    channel_of,
)
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.frames import BINARY, TEXT
from websocket_relay.wire.http_protocol import CONNECTION_KEY, HttpProtocol
from websocket_relay.wire.partial_messages import PartialMessages
from websocket_relay.wire.time_slicer import TimeSlicer

BATCH = "application/x-ndjson"
JSON = "application/json"
TEXTS = "text/"

MAX_BATCH = 10_000
"""Messages in one request: they are appended in one turn of the loop, and so stay together."""

VALUE = re.compile(rb"[^ \t\r\n][^\n]*")
"""A line from its first character on that is no whitespace of JSON (RFC 8259 section 2)."""

ANSWERS: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "It has its place among the channel's messages.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["position"],
                    "properties": {
                        "position": {"type": "string", "description": "where the last one stands"},
                        "messages": {"type": "integer", "description": "of a batch: how many"},
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
    "description": "text/* and application/json are relayed as text, application/x-ndjson as a"
    f" text message for each line, {MAX_BATCH} at most, anything else as binary.",
    "content": {
        "text/plain": {"schema": {"type": "string"}, "example": "hello, everybody"},
        "application/json": {"schema": {}},
        BATCH: {"schema": {"type": "string"}, "example": '{"n":1}\n{"n":2}\n'},
        "application/octet-stream": ANY,
        "*/*": ANY,
    },
}

Said = tuple[int, bytes]
"""An opcode and a payload."""


def publish_router(
    admission: AdmissionPolicy,
    broadcaster: Broadcaster,
    refusals: Refusals,
    *,
    base_path: str,
    max_bytes: int,
) -> APIRouter:
    """Return the routes that take messages at `/` and `/channels/{channel}`.

    Args:
        admission: who may publish.
        broadcaster: where it goes.
        refusals: what answers the others.
        base_path: what stands before both paths.
        max_bytes: what a request may bring.
    """
    shared = broadcaster.shared

    async def publish(request: Request) -> Response:
        channel, kind = channel_of(request), _kind(request)
        try:
            await admission.admit_publisher(admission_request_of(request))
            _expect_no_coding(request)
            async with MessageBatch(shared.unfinished) as parcel:
                body = await _body(request, max_bytes, parcel)
                said = await _said(kind, body, shared.reading)
                courier = broadcaster.courier(channel)
                await courier.wait_for_room()
            _expect_listener(request)
            position = await broadcaster.publish(channel, said, courier)
        except RefusedError as error:
            return refusals.answer(error)
        except ClientDisconnect:
            return Response(status_code=HTTPStatus.BAD_REQUEST)  # which nobody hears
        told: dict[str, object] = {"position": str(position)}
        if kind == BATCH:
            told["messages"] = len(said)
        return JSONResponse(told, HTTPStatus.ACCEPTED)

    router = APIRouter()
    for path, parameters in ((DEFAULT_PATH, []), (CHANNEL_PATH, [CHANNEL_PARAMETER])):
        router.add_api_route(
            base_path + path,
            publish,
            methods=["POST"],
            status_code=HTTPStatus.ACCEPTED,
            summary="Publish a message, or many",
            response_model=None,
            responses={**ANSWERS, **refused(400, 401, 403, 404, 408, 413, 415, 503, 504)},
            openapi_extra={"parameters": [*parameters, TOKEN_PARAMETER], "requestBody": BODY},
        )
    return router


class MessageBatch:
    """What a request brings, from its first byte until there is room for it.

    All of them together are bounded like what other clients have begun to say: past that, those
    that hold most are refused.

    Args:
        unfinished: the bound.
    """

    def __init__(self, unfinished: PartialMessages) -> None:
        self._unfinished = unfinished
        self._scope = asyncio.timeout(None)

    async def __aenter__(self) -> "MessageBatch":
        """Begin."""
        await self._scope.__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        """Keep nothing any more.

        Raises:
            RefusedError: it was too much.
        """
        self._unfinished.note(self, 0)
        try:
            await self._scope.__aexit__(*raised)
        except TimeoutError:
            raise RefusedError(Refusal.UNFINISHED) from None

    def keep(self, size: int) -> None:
        """Take note of what is kept now."""
        self._unfinished.note(self, size)

    def drop_unfinished(self) -> None:
        """End the request, whatever it waits for."""
        self._unfinished.note(self, 0)
        self._scope.reschedule(asyncio.get_running_loop().time())


def _kind(request: Request) -> str:
    """Return what the body is said to be, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _expect_no_coding(request: Request) -> None:
    codings = ",".join(request.headers.getlist("content-encoding"))
    if any(coding.strip().lower() not in ("", "identity") for coding in codings.split(",")):
        raise RefusedError(Refusal.CODING)


def _expect_listener(request: Request) -> None:
    """See that somebody waits for the answer: who gave up may have said it elsewhere."""
    connection: HttpProtocol = request.scope[CONNECTION_KEY]
    if connection.is_gone:
        raise ClientDisconnect


async def _body(request: Request, max_bytes: int, parcel: MessageBatch) -> bytes:
    """Return what a request brings; do not wait for what is too much anyway."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise RefusedError(Refusal.TOO_LARGE)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise RefusedError(Refusal.TOO_LARGE)
        parts.append(part)
        parcel.keep(size)
    return b"".join(parts)


async def _said(kind: str, body: bytes, turns: TimeSlicer) -> list[Said]:
    """Return the messages that a request brings.

    Raises:
        RefusedError: they are not what they are said to be.
    """
    if kind == BATCH:
        return await _gathered(_lines(body), turns)
    if kind != JSON and not kind.startswith(TEXTS):
        return [(BINARY, body)]
    if not _is_utf8(body):
        raise RefusedError(Refusal.BODY, "text is not UTF-8")
    return [(TEXT, body)]


async def _gathered(messages: Iterator[Said], turns: TimeSlicer) -> list[Said]:
    """Return them all, looked at in turn with what else there is to read.

    Raises:
        RefusedError: one of them is none.
    """
    gathered: list[Said] = []
    done: asyncio.Future[RefusedError | None] = asyncio.get_running_loop().create_future()

    def gather(until: float) -> bool:
        if done.done():  # nobody waits for them any more
            return True
        try:
            for message in messages:
                gathered.append(message)
                if perf_counter() > until:
                    return False
        except RefusedError as error:
            done.set_result(error)
        else:
            done.set_result(None)
        return True

    turns.add(gather)
    fault = await done
    if fault is not None:
        raise fault
    return gathered


def _lines(body: bytes) -> Iterator[Said]:
    """Yield a text message for each line that is one JSON value, as it stands."""
    for number, line in enumerate(VALUE.finditer(body), 1):
        if number > MAX_BATCH:
            raise RefusedError(Refusal.TOO_LARGE, f"a batch has up to {MAX_BATCH} lines")
        text = line[0].rstrip(b" \t\r")
        try:
            decode(text.decode())
        except (ValueError, RecursionError):
            place = body.count(b"\n", 0, line.start()) + 1
            raise RefusedError(Refusal.BODY, f"line {place} is not JSON") from None
        yield TEXT, text


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


decode = json.JSONDecoder(
    parse_constant=_refuse_constant,  # NaN and the like, which Python takes and browsers do not
    parse_int=bool,  # what a number comes to nobody asks, and long ones take their time
    parse_float=bool,
).decode
"""Read one JSON value (RFC 8259)."""
