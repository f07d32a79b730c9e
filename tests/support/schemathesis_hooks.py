"""Generate the lines of `POST /api/publish`, which its schema does not describe."""

import base64
import json

import schemathesis
from hypothesis import strategies
from websocket_relay.api.media_types import BATCH

CHANNELS = strategies.from_regex(r"\A[A-Za-z0-9:_-]{1,20}\Z")
MESSAGES = strategies.one_of(
    strategies.fixed_dictionaries({"text": strategies.text()}),
    strategies.fixed_dictionaries(
        {"base64": strategies.binary().map(lambda each: base64.b64encode(each).decode())}
    ),
)
LINES = strategies.builds(lambda name, message: {"channel": name, **message}, CHANNELS, MESSAGES)

schemathesis.openapi.media_type(
    BATCH, strategies.lists(LINES.map(json.dumps)).map(lambda lines: "\n".join(lines).encode())
)
