"""Describe the server API for the OpenAPI document, with examples. Knows no endpoint."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import Security
from fastapi.security import HTTPBearer

from websocket_relay.api import media_types
from websocket_relay.api.operation_requests import (
    CODES,
    DEFAULT_LISTED,
    DEFAULT_LOG_LEVEL_S,
    MAX_BLOCK_S,
    MAX_LOG_LEVEL_S,
    MAX_REASON_BYTES,
    TARGETS,
    Level,
)
from websocket_relay.api.publish import KEY_PARAMETER, MAX_BATCH
from websocket_relay.channels.names import CHANNEL_NAME
from websocket_relay.channels.operations import MAX_LISTED, ORDERS
from websocket_relay.identity import MAX_USER_CHARACTERS

ADMIN = "Needs `Authorization: Bearer` with `api.key` or the token of an admin."
BEARER = Security(HTTPBearer(scheme_name="admin", description="`api.key`, or an admin's token"))

Schema = dict[str, Any]


class Description(NamedTuple):
    """The description of an endpoint in the OpenAPI document.

    Attributes:
        summary, text: what it does.
        request: the parameters or the body.
        response: the response of success.
    """

    summary: str
    text: str
    request: dict[str, Any]
    response: dict[str, Any]


def _object(properties: Mapping[str, Schema], *optional: str) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": dict(properties)}


def _order(properties: Mapping[str, Schema], *optional: str, **rules: object) -> Schema:
    """Return the schema of what the relay is asked: it accepts no other fields."""
    return {**_object(properties, *optional), "additionalProperties": False, **rules}


def _response(description: str, schema: Schema, example: object) -> dict[str, Any]:
    content = {media_types.JSON: {"schema": schema, "example": example}}
    return {"description": description, "content": content}


def _query(name: str, description: str, schema: Schema, example: object) -> dict[str, Any]:
    return {
        "name": name,
        "in": "query",
        "description": description,
        "schema": schema,
        "example": example,
    }


TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
CHANNEL = {"type": "string", "pattern": f"^{CHANNEL_NAME.pattern}$", "maxLength": 128}
USER = {"type": "string", "minLength": 1, "maxLength": MAX_USER_CHARACTERS}

MISSING = {
    "type": "array",
    "items": TEXT,
    "description": "names of replicas that are alive and have not answered within a second",
}
TRUNCATED = {"type": "boolean", "description": "whether there is more than is listed"}
PARTIAL: Mapping[str, Schema] = {"missing": MISSING, "truncated": TRUNCATED}

LIMIT = _query(
    "limit",
    f"how many are listed; default {DEFAULT_LISTED}",
    {"type": "integer", "minimum": 1, "maximum": MAX_LISTED},
    10,
)

LINES = """{"channel":"news","text":"hello"}
{"channel":"images","base64":"iVBORw0KGgo="}
"""

LINES_KEY = {
    **KEY_PARAMETER,
    "description": "a request with a key may be sent again: a line that the log holds already is"
    " answered with its first position, and is not relayed again",
}

DISCONNECT = _order(
    {
        "user": USER,
        "client": {"type": "string", "minLength": 1, "maxLength": MAX_USER_CHARACTERS},
        "channel": CHANNEL,
        "code": {"type": "integer", "minimum": CODES[0], "maximum": CODES[-1]},
        "reason": {
            "type": "string",
            "maxLength": MAX_REASON_BYTES,
            "description": f"at most {MAX_REASON_BYTES} bytes in UTF-8",
        },
        "block_s": {
            "type": "number",
            "minimum": 0,
            "maximum": MAX_BLOCK_S,
            "description": "with `user`: the user is refused for so long; 0: no more",
        },
    },
    *("user", "client", "channel", "code", "reason", "block_s"),
    oneOf=[{"required": [target]} for target in TARGETS],
    dependentRequired={"block_s": ["user"]},
)

CLIENT = _object(
    {
        "client": TEXT,
        "user": TEXT,
        "address": TEXT,
        "since": NUMBER,
        "channels": {"type": "array", "items": TEXT},
        "backlog": {"type": "integer", "description": "bytes that wait for the client"},
        "replica": TEXT,
    }
)
USAGE = _object({"channel": TEXT, "clients": INTEGER, "messages": INTEGER})
REPLICA = _object(
    {
        "name": TEXT,
        "clients": INTEGER,
        "messages": INTEGER,
        "version": {"type": ["string", "null"]},
        "since": {"type": ["integer", "null"], "description": "seconds since 1970"},
    }
)
LOG_LEVEL = _order(
    {
        "level": {"type": "string", "enum": list(Level.__args__)},  # type: ignore[attr-defined]  # of typing.Literal
        "for_s": {
            "type": "number",
            "minimum": 1,
            "maximum": MAX_LOG_LEVEL_S,
            "description": f"default {DEFAULT_LOG_LEVEL_S}",
        },
    },
    "for_s",
)


def _body(
    media_type: str, schema: Schema, example: object, *, required: bool = True
) -> dict[str, Any]:
    content = {media_type: {"schema": schema, "example": example}}
    return {"requestBody": {"required": required, "content": content}}


DESCRIPTIONS: Mapping[str, Description] = {
    "/api/publish": Description(
        "Publish messages to any channels",
        f"Each line is a message for a channel: `text`, or binary as `base64`; {MAX_BATCH} at most."
        f" If one line is invalid, none is published. {ADMIN}",
        {"parameters": [LINES_KEY], **_body(media_types.BATCH, TEXT, LINES, required=False)},
        _response(
            "Each message has a position, in the order of the lines.",
            _object({"positions": {"type": "array", "items": TEXT}}),
            {"positions": ["1795441056000-8-0", "1795441056000-9-0"]},
        ),
    ),
    "/api/disconnect": Description(
        "Disconnect clients on all replicas",
        f"Those of a user, of a channel, or one client. {ADMIN}",
        _body(media_types.JSON, DISCONNECT, {"user": "ada", "reason": "signed out"}),
        _response(
            "The number of clients that were disconnected.",
            _object({"disconnected": INTEGER, "missing": MISSING}, "missing"),
            {"disconnected": 2},
        ),
    ),
    "/api/channels": Description(
        "List the busiest channels over all replicas",
        f"`messages` are those since the first client of the channel is here. {ADMIN}",
        {
            "parameters": [
                _query("prefix", "of the names that are listed", TEXT, "news"),
                _query("order", "default `clients`", {"enum": list(ORDERS)}, "messages"),
                LIMIT,
            ]
        },
        _response(
            "The channels that are first in the `order`.",
            _object({"channels": {"type": "array", "items": USAGE}, **PARTIAL}, *PARTIAL),
            {"channels": [{"channel": "news", "clients": 3, "messages": 120}]},
        ),
    ),
    "/api/clients": Description(
        "List clients of all replicas",
        f"Those that have been connected longest come first. {ADMIN}",
        {
            "parameters": [
                _query("channel", "that they are subscribed to", CHANNEL, "news"),
                _query("user", "whose clients they are", TEXT, "ada"),
                LIMIT,
            ]
        },
        _response(
            "The clients.",
            _object({"clients": {"type": "array", "items": CLIENT}, **PARTIAL}, *PARTIAL),
            {
                "clients": [
                    {
                        "client": "bsvVecN3UvZr",
                        "user": "ada",
                        "address": "192.0.2.7",
                        "since": 1796122146.086,
                        "channels": ["news"],
                        "backlog": 0,
                        "replica": "relay-0",
                    }
                ]
            },
        ),
    ),
    "/api/replicas": Description(
        "List the replicas that are alive",
        f"From their heartbeats. {ADMIN}",
        {},
        _response(
            "The replicas.",
            _object({"replicas": {"type": "array", "items": REPLICA}}),
            {
                "replicas": [
                    {
                        "name": "relay-0",
                        "clients": 3,
                        "messages": 120,
                        "version": "0.1.0",
                        "since": 1796122146,
                    }
                ]
            },
        ),
    ),
    "/api/logging": Description(
        "Change the log level of the replica that is asked, for a time",
        f"After it, the level is that of the settings again. {ADMIN}",
        _body(media_types.JSON, LOG_LEVEL, {"level": "debug", "for_s": 600}),
        _response(
            "The level, and until when it is in effect, in seconds since 1970.",
            _object({"level": TEXT, "until": INTEGER}),
            {"level": "debug", "until": 1796122746},
        ),
    ),
}
