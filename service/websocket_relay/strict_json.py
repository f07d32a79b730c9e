"""Read JSON that two parsers can't read in two ways. Knows no field.

Python accepts NaN and Infinity, which are not JSON (RFC 8259), and of a repeated key the last
value: another parser may take the first.
"""

import json
from json.scanner import make_scanner
from typing import Any


class RepeatedKeyError(ValueError):
    """An object has a key twice."""


def refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity: for `parse_constant` of a decoder."""
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RepeatedKeyError
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=refuse_constant)

decode = _DECODER.decode
"""Returns the value of a text; raises ValueError, and RecursionError for one that is too deep."""

scan = make_scanner(_DECODER)  # type: ignore[arg-type]  # typeshed has the type of make_scanner itself
"""Returns the value at an index of a text, and where it ends; raises StopIteration for no value,
otherwise like `decode`."""
