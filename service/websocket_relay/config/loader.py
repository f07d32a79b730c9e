"""Load settings: environment over file over defaults, with one line per problem.

Knows nothing of what the settings are used for.
"""

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from websocket_relay.config.model import ENV_PREFIX, ITEMS, Settings
from websocket_relay.outcomes import SettingsError

DEFAULT_FILE = Path("config.yaml")


QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")


"""What PyYAML quotes."""


SECTION = "a mapping of keys to values"


ALGORITHM_LIKE = re.compile(r"[A-Za-z]{2,5}-?[0-9]{0,5}K?")


"""What somebody may have meant for an algorithm; anything else in its place may be a secret."""


def load(file: Path | None, environ: Mapping[str, str]) -> Settings:
    """Read the settings.

    Args:
        file: what --config-file named; None takes config.yaml where there is one.
        environ: the process's environment, which pydantic-settings reads by itself; here it is
            checked for misspelt names and asked for whose value was wrong.

    Raises:
        SettingsError: with every problem found, a sentence each.
    """
    source = file or DEFAULT_FILE
    values = _read(source, must_exist=file is not None)
    named = _variables(environ)
    unknown = {path: name for path, name in named.items() if path not in LEAVES}
    problems = [f"{name}: unknown variable; {_known(path)}" for path, name in unknown.items()]
    if any(path in _SECTIONS for path in unknown):
        raise SettingsError(problems)  # pydantic-settings would take them for JSON
    try:
        settings = Settings(**values)
    except ValidationError as error:
        problems += [
            _sentence(entry, source, named)
            for entry in error.errors()
            if not _was_said(tuple(map(str, entry["loc"])), unknown)
        ]
        raise SettingsError(list(dict.fromkeys(problems))) from None
    if problems:
        raise SettingsError(problems)
    return settings


def where(key: str, file: Path | None, environ: Mapping[str, str]) -> str:
    """Return the variable, or else the file, that says a setting which is not a default.

    Args:
        key: like server.port.
        file, environ: as for `load`.
    """
    return _variables(environ).get(tuple(key.split(".")), str(file or DEFAULT_FILE))


def _leaves(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    schema = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, (*path, name))
        else:
            yield (*path, name), _allowed(schema[name])


def _allowed(schema: Mapping[str, Any]) -> str:
    """Say in words what a JSON schema lets in."""
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema["type"] == "boolean":
        return "true or false"
    if schema["type"] == "array":
        return f"a list of {schema[ITEMS]}"
    if schema["type"] == "string":
        return "a text" if not schema.get("minLength") else "a text that is not empty"
    number = "a whole number" if schema["type"] == "integer" else "a number"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    start = f"above {low}" if "exclusiveMinimum" in schema else f"from {low}"
    return f"{number} {start} to {schema['maximum']:.15g}"


LEAVES: dict[tuple[str, ...], str] = dict(_leaves(Settings, ()))


"""What every setting allows, in words, by its path."""


_SECTIONS = {path[:length] for path in LEAVES for length in range(1, len(path))}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML's safe loader reads it, but a key said twice is an error, not a riddle."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key that is no text"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key_node.value in seen:
                problem = f"the key {_key(key_node.value)} stands here twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read(file: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        if must_exist:
            raise SettingsError([f"{file}: no such file"]) from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{file}: can't be read: {error}"]) from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # The last four are what PyYAML makes of a date like 2020-99-99, of !!int foo and the like.
        raise SettingsError([f"{file}: not YAML: {_one_line(error)}"]) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError([f"{file}: holds no mapping of sections"])
    return _tidied(content, Settings, file, ())


def _tidied(
    content: dict[Any, Any], model: type[BaseModel], file: Path, path: tuple[str, ...]
) -> dict[str, Any]:
    """Return a section without the sections in it that are empty, which read as null.

    Raises:
        SettingsError: something else stands where a section should. The environment's part of it
            would replace it without a word.
    """
    tidy: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key)
        kind = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            tidy[name] = value
        elif isinstance(value, dict):
            tidy[name] = _tidied(value, kind, file, (*path, name))
        elif value is not None:
            key_path = ".".join((*path, name))
            redacted = _shown(value, (*path, name))
            raise SettingsError(
                [f"{file}: {key_path}: {redacted} is not allowed; allowed: {SECTION}"]
            )
    return tidy


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, yaml.YAMLError):
        return "a value is not of the kind that it is said to be"
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    return where + QUOTED.sub(_harmless, problem)


def _harmless(quoted: re.Match[str]) -> str:
    """Return something quoted from a settings file without what may be a secret.

    Single letters tell nothing, and PyYAML has names of its own for things, like '<block end>'.
    """
    text: str = quoted[0]
    return text if len(text) <= 3 or text in ("'<stream end>'", "'<block end>'") else "…"


def _variables(environ: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Return the names of the variables that are ours, by the paths that they name."""
    return {path: name for name in environ if (path := _path_of(name)) is not None}


def _path_of(variable: str) -> tuple[str, ...] | None:
    """Return the path that a variable names, or None where it is not ours."""
    if not variable.upper().startswith(ENV_PREFIX):
        return None
    return tuple(variable[len(ENV_PREFIX) :].lower().split("__"))


def _was_said(loc: tuple[str, ...], unknown: Iterable[tuple[str, ...]]) -> bool:
    """Tell whether an error is about a variable that was called unknown already."""
    return any(loc and loc == path[: len(loc)] for path in unknown)


def _known(path: tuple[str, ...]) -> str:
    """Return the nearest names that exist, as a hint."""
    names = {_variable(leaf): leaf for leaf in LEAVES}
    near = get_close_matches(_variable(path), names, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else "websocket-relay check prints what there is"


def _variable(path: tuple[str, ...]) -> str:
    return ENV_PREFIX + "__".join(path).upper()


def _sentence(entry: Any, file: Path, variables: Mapping[tuple[str, ...], str]) -> str:
    """Put one of pydantic's errors into the operator's words."""
    loc = tuple(str(part) for part in entry["loc"])
    if not loc:
        return f"{file}: {entry['msg'].removeprefix('Value error, ')}"
    path = next((loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in LEAVES), loc)
    where = variables.get(path, str(file))
    key = _key(".".join(path))
    if entry["type"] == "extra_forbidden":
        siblings = [leaf[len(loc) - 1] for leaf in LEAVES if leaf[: len(loc) - 1] == loc[:-1]]
        near = get_close_matches(loc[-1], siblings, n=1, cutoff=0.6)
        allowed = f"did you mean {near[0]}?" if near else ", ".join(dict.fromkeys(siblings))
        hint = allowed if near else f"allowed: {allowed}"
        # Its value is not shown: who knows whether that is a secret.
        return f"{where}: {key}: unknown key; {hint}"
    if entry["type"] == "value_error" and path in _SECTIONS:
        said = [name for variable, name in variables.items() if variable[: len(path)] == path]
        return f"{said[0] if said else file}: {key}: {entry['msg'].removeprefix('Value error, ')}"
    allowed = LEAVES.get(path, SECTION)
    if entry["type"] == "value_error" and not isinstance(entry["input"], bool):
        allowed = entry["msg"].removeprefix("Value error, ")
    return f"{where}: {key}: {_shown(entry['input'], loc)} is not allowed; allowed: {allowed}"


def _key(name: str) -> str:
    return name if name.isprintable() and len(name) <= 80 else _shown(name)


def _shown(value: object, path: tuple[str, ...] = ()) -> str:
    """Return a value on one line and not too long, whatever it holds; a secret only by name.

    Args:
        path: where it stands; nothing is shown that is, or could hold, a secret.
    """
    may_be_secret = path in SECRET_PATHS or path[:2] == ("auth", "jwt")
    if may_be_secret and not (path[2:3] == ("algorithms",) and _is_algorithm_like(value)):
        return "the value (not shown)"
    return _SHORT.repr(list(value) if isinstance(value, tuple) else value)


def _is_algorithm_like(value: object) -> bool:
    parts = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(part, str) and ALGORITHM_LIKE.fullmatch(part) for part in parts)


SECRET_PATHS = (("auth",), ("backplane",), ("backplane", "url"))


_SHORT = reprlib.Repr()


_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
