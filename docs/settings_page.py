"""Write the tables of docs/reference/settings.md anew from the settings model: `make config`.

The text around the tables is written by hand. Knows no running relay.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from websocket_relay.config.loader import LEAVES
from websocket_relay.config.model import Settings
from websocket_relay.config.render import default_file

PAGE = Path(__file__).with_name("reference") / "settings.md"

HEAD = "| setting | default | allowed | meaning |\n| --- | --- | --- | --- |\n"
SECTION = re.compile(
    rf"(?P<text>^## `(?P<name>\w+)`\n(?:(?!#).*\n)*?){re.escape(HEAD)}(?:\|.*\n)*", re.MULTILINE
)
"""A section of the page: its heading, the text before its table, and the table."""

URL = re.compile(r"[a-z]+://[^\s;,]*")
LONG_NUMBER = re.compile(r"\b\d{4,}\b")


def with_tables(page: str) -> str:
    """Return the page with its tables made anew.

    Raises:
        ValueError: the page's sections are not those of the settings, in their order.
    """
    sections = [section["name"] for section in SECTION.finditer(page)]
    if sections != list(Settings.model_fields):
        raise ValueError(f"{PAGE}: sections {sections}, not {list(Settings.model_fields)}")
    defaults = yaml.safe_load(default_file())
    return SECTION.sub(
        lambda section: section["text"] + _table(section["name"], defaults[section["name"]]), page
    )


def _table(section: str, defaults: dict[str, Any]) -> str:
    return HEAD + "".join(_rows(Settings.model_fields[section].annotation, section, defaults))


def _rows(model: Any, path: str, defaults: dict[str, Any]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key, annotation = f"{path}.{name}", field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _rows(annotation, key, defaults[name])
            continue
        allowed = LONG_NUMBER.sub(lambda number: f"{int(number[0]):,}", LEAVES[*key.split(".")])
        default, meaning = json.dumps(defaults[name]), field.description or ""
        yield f"| `{key}` | `{default}` | {_cell(allowed)} | {_cell(meaning)} |\n"


def _cell(text: str) -> str:
    """Return a text with its URLs as code, and with nothing that Markdown would interpret."""
    return URL.sub(lambda url: f"`{url[0]}`".replace("\\*", "*"), text.replace("*", r"\*"))


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
