"""Render settings as YAML. Knows no file."""

import json
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from websocket_relay.config.model import Settings

FILE_HEAD = """\
# Every setting of websocket-relay with its default. Each can also be set in the environment, which
# takes precedence: server.tls.cert_file is RELAY__SERVER__TLS__CERT_FILE. Durations are in
# seconds, sizes in bytes. `websocket-relay check` prints the effective settings.
"""


def render(settings: Settings, *, comments: bool = False) -> str:
    """Return the settings as YAML that `load` can read, optionally with their descriptions."""
    return "\n".join(_lines(settings, 0, comments)) + "\n"


def default_file() -> str:
    """Return the text of config.yaml: every setting with its default and its description."""
    return f"{FILE_HEAD}\n{render(Settings.model_construct(), comments=True)}"


def _lines(model: BaseModel, depth: int, comments: bool) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            if comments and not depth and name != next(iter(type(model).model_fields)):
                yield ""
            yield f"{indent}{name}:" + (f"  # {_title(value)}" if comments else "")
            yield from _lines(value, depth + 1, comments)
        else:
            yield from _leaf(f"{indent}{name}: {_scalar(value)}", indent, field, comments)


def _leaf(line: str, indent: str, field: FieldInfo, comments: bool) -> Iterator[str]:
    if comments:
        yield f"{indent}# {field.description}"
    yield line


def _title(section: BaseModel) -> str:
    return (type(section).__doc__ or "").strip().rstrip(".")


def _scalar(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # The text form of a secret is asterisks.
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str)
