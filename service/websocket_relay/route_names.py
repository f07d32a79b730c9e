"""Name the route of a request, without the channel in its path. Knows no framework."""

from collections.abc import Mapping
from typing import Any


def route_of(scope: Mapping[str, Any]) -> str:
    """Return the path with a placeholder for the channel's name; empty for an unknown path.

    Args:
        scope: the ASGI scope of a request that was routed.
    """
    path: str = scope["path"]
    parameters: Mapping[str, str] = scope.get("path_params", {})
    if "endpoint" not in scope or "path" in parameters:
        return ""
    if "channel" not in parameters:
        return path
    prefix, _, suffix = path.partition(f"/channels/{parameters['channel']}")
    return f"{prefix}/channels/{{channel}}{suffix}"
