"""Serve backends and operators: publish, disconnect, and ask about all replicas.

Knows no connection: what the replicas do is in `channels.operations`, how they are asked in
`cluster.questions`.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response

from websocket_relay.admission.policy import AdmissionPolicy
from websocket_relay.api.operation_requests import (
    ChannelsQuery,
    ClientsQuery,
    Disconnection,
    LogLevelChange,
    publishes_of,
)
from websocket_relay.api.publish import collect, idempotency_key, received_body
from websocket_relay.api.refusals import refusal_responses
from websocket_relay.api.requests import admission_request_of, cancelled_when_lost
from websocket_relay.api.responses import json_response
from websocket_relay.api.routes import add_get_route
from websocket_relay.api.server_api_schema import BEARER, DESCRIPTIONS
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.channels.operations import ORDERS
from websocket_relay.cluster.blocks import Blocks
from websocket_relay.cluster.questions import Answers, Questions
from websocket_relay.logs import LogLevel
from websocket_relay.outcomes import Refusal, RefusedError

log = logging.getLogger(__name__)

MAX_ORDER_BYTES = 65_536

REPLICA_FACTS = ("name", "clients", "messages", "version", "since")

Endpoint = Callable[[Request], Awaitable[Response]]


class ServerApi:
    """The endpoints of the server API.

    Args:
        admission: decides who may use it.
        broadcaster: receives the messages.
        questions: asks all replicas.
        blocks: the users that are blocked.
        log_level: of the log of this replica.
        replicas: returns what is known of the replicas that are alive.
        max_bytes: maximum size of a body with messages.
    """

    def __init__(
        self,
        admission: AdmissionPolicy,
        broadcaster: Broadcaster,
        questions: Questions,
        blocks: Blocks,
        log_level: LogLevel,
        replicas: Callable[[], Sequence[Mapping[str, Any]]],
        *,
        max_bytes: int,
    ) -> None:
        self._admission = admission
        self._broadcaster = broadcaster
        self._questions = questions
        self._blocks = blocks
        self._log_level = log_level
        self._replicas = replicas
        self._max_bytes = max_bytes

    async def publish(self, request: Request) -> Response:
        """Publish each line of the body, or none."""
        await self._admit(request)
        key = idempotency_key(request)
        shared = self._broadcaster.shared
        async with received_body(request, self._max_bytes, shared.partial_messages) as body:
            publishes = await collect(publishes_of(body, key), shared.parse_slicer)
            await self._broadcaster.wait_for_capacity(*{each.channel for each in publishes})
        self._admission.check_availability()
        publish = self._broadcaster.publish_each_once if key else self._broadcaster.publish_each
        positions = await publish(publishes)
        return json_response({"positions": list(map(str, positions))}, HTTPStatus.ACCEPTED)

    async def disconnect(self, request: Request) -> Response:
        """Disconnect clients on all replicas."""
        await self._admit(request)
        order = Disconnection.parse(await self._read_order(request))
        until = order.blocked_until
        if until is not None and not self._blocks.has_capacity(order.target["user"], until):
            raise RefusedError(Refusal.BLOCKS)
        answers = await self._questions.ask(
            "disconnect", order.fields(), unconfirmed=Refusal.UNCONFIRMED
        )
        return _answer(answers, {"disconnected": sum(answers.items)})

    async def list_channels(self, request: Request) -> Response:
        """List the busiest channels over all replicas."""
        await self._admit(request)
        query = ChannelsQuery.parse(request.scope["query_string"])
        of = {"prefix": query.prefix, "order": query.order}
        answers = await self._questions.ask("channels", of)
        channels = busiest(answers.items, query)
        return _answer(answers, {"channels": channels})

    async def list_clients(self, request: Request) -> Response:
        """List clients of all replicas."""
        await self._admit(request)
        query = ClientsQuery.parse(request.scope["query_string"])
        answers = await self._questions.ask("clients", query._asdict())
        clients = sorted(answers.items, key=lambda client: client["since"])
        is_truncated = answers.is_truncated or len(clients) > query.limit
        answers = answers._replace(is_truncated=is_truncated)
        return _answer(answers, {"clients": clients[: query.limit]})

    async def list_replicas(self, request: Request) -> Response:
        """List the replicas that are alive."""
        await self._admit(request)
        self._questions.check_availability()
        replicas = [{name: facts.get(name) for name in REPLICA_FACTS} for facts in self._replicas()]
        return json_response({"replicas": sorted(replicas, key=lambda each: str(each["name"]))})

    async def change_log_level(self, request: Request) -> Response:
        """Change the minimum level of this replica's log for some time."""
        await self._admit(request)
        change = LogLevelChange.parse(await self._read_order(request))
        self._log_level.set_for(change.level, change.for_s)
        log.warning("log level changed", extra={"to": change.level, "for_s": change.for_s})
        return json_response({"level": change.level, "until": round(time.time() + change.for_s)})

    async def _admit(self, request: Request) -> None:
        with cancelled_when_lost(request):
            await self._admission.admit_admin(admission_request_of(request, ()))

    async def _read_order(self, request: Request) -> bytes:
        partial_messages = self._broadcaster.shared.partial_messages
        async with received_body(request, MAX_ORDER_BYTES, partial_messages) as body:
            return body


def server_api_router(api: ServerApi, *, base_path: str) -> APIRouter:
    """Return the routes of `/api`.

    Args:
        api: their endpoints.
        base_path: the prefix of all paths.
    """
    router = APIRouter()
    for method, path, endpoint, status, refused in (
        ("POST", "/api/publish", api.publish, 202, (400, 401, 403, 408, 413, 415, 422, 503, 504)),
        ("POST", "/api/disconnect", api.disconnect, 200, (400, 401, 403, 408, 413, 415, 503, 504)),
        ("GET", "/api/channels", api.list_channels, 200, (400, 401, 403, 503)),
        ("GET", "/api/clients", api.list_clients, 200, (400, 401, 403, 503)),
        ("GET", "/api/replicas", api.list_replicas, 200, (401, 403, 503)),
        ("PATCH", "/api/logging", api.change_log_level, 200, (400, 401, 403, 408, 413, 415, 503)),
    ):
        described = DESCRIPTIONS[path]
        description: dict[str, Any] = {
            "summary": described.summary,
            "description": described.text,
            "response_model": None,
            "status_code": status,
            "responses": {status: described.response, **refusal_responses(*refused)},
            "openapi_extra": described.request,
            "dependencies": [BEARER],
        }
        if method == "GET":
            add_get_route(router, base_path + path, endpoint, **description)
        else:
            router.add_route(base_path + path, endpoint, methods=[method])
            router.add_api_route(base_path + path, endpoint, methods=[method], **description)
    return router


def busiest(items: Iterable[tuple[str, int, int]], query: ChannelsQuery) -> list[dict[str, Any]]:
    """Return the busiest channels.

    Args:
        items: of all replicas: names, clients there, and messages that these were sent.
        query: what was asked.
    """
    merged: dict[str, tuple[int, int]] = {}
    for name, clients, messages in items:
        known_clients, known_messages = merged.get(name, (0, 0))
        # Each replica counts each message: the one whose clients have come first knows most.
        merged[name] = known_clients + clients, max(known_messages, messages)
    usages = [(name, *usage) for name, usage in merged.items()]
    usages.sort(key=lambda usage: (-ORDERS[query.order](usage), usage[0]))
    return [
        {"channel": name, "clients": clients, "messages": messages}
        for name, clients, messages in usages[: query.limit]
    ]


def _answer(answers: Answers, fields: dict[str, Any]) -> Response:
    """Return a response that names what is missing in it."""
    if answers.missing:
        fields["missing"] = answers.missing
    if answers.is_truncated:
        fields["truncated"] = True
    return json_response(fields)
