"""Answer in JSON whatever names and facts clients have. Knows no route and no refusal."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Response

from websocket_relay.api import media_types


def json_response(fields: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Return a response with compact JSON in ASCII.

    The user of a token may have half of a surrogate pair, which UTF-8 has no bytes for.
    """
    content = json.dumps(fields, separators=(",", ":"))
    return Response(content, status, media_type=media_types.JSON)
