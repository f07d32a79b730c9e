"""Load settings: command line over environment over file over defaults; one line per problem.

Knows no component that uses the settings.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from websocket_relay.config.model import ENV_PREFIX, ITEMS, Settings
from websocket_relay.outcomes import SettingsError
from websocket_relay.secret_files import SecretFileError, read_secret

DEFAULT_FILE = Path("config.yaml")

FILE_SUFFIX = "_file"
"""At the end of a variable for a secret: its value is the path of the file with the secret."""

QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")
"""A part of the file quoted in a message of PyYAML."""

SECTION = "a mapping of keys to values"

ALGORITHM_LIKE = re.compile(r"[A-Za-z]{2,5}-?[0-9]{0,5}K?")
"""A misspelt name of an algorithm. Any other value in its place may be a secret."""


DEFAULT = "default"
"""The source of a setting that no source contains."""

Options = Mapping[str, tuple[str, str]]
"""Options on the command line: the key of a setting, such as server.port, with the option's name
and value."""


def load(
    file: Path | None,
    environ: Mapping[str, str],
    options: Options | None = None,
    *,
    again: bool = False,
) -> Settings:
    """Load and validate the settings.

    Args:
        file: the value of --config-file; None: config.yaml, if it exists.
        environ: the environment of the process. A variable with _FILE at its end names the file
            that contains a secret.
        options: of the command line.
        again: whether a relay runs with settings from there. An empty file is an error then: it is
            about to be written, or a pipe that was read before.

    Raises:
        SettingsError: one message for every problem found.
    """
    source = file or DEFAULT_FILE
    values = _read(source, must_exist=file is not None)
    if again and not values and file is not None and not file.is_char_device():
        raise SettingsError([f"{file}: empty"])
    variables, given = _given(environ, options or {})
    unknown = {path: name for path, name in variables.items() if path not in LEAVES}
    problems = [f"{name}: unknown variable; {_suggestion(path)}" for path, name in unknown.items()]
    # pydantic-settings has parameters of its own, which begin with an underscore.
    hidden = [name for name in values if name.startswith("_")]
    problems += [f"{source}: {_key(name)}: unknown key" for name in hidden]
    for name in hidden:
        del values[name]
    known = {path: name for path, name in variables.items() if path in LEAVES}
    given_values = _values(known, given)
    try:
        settings = Settings(given_values, **values)
    except ValidationError as error:
        problems += [_problem(entry, source, values, variables) for entry in error.errors()]
        raise SettingsError(list(dict.fromkeys(problems))) from None
    if problems:
        raise SettingsError(problems)
    return settings


def secret_files(environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield the files that variables name for secrets.

    Args:
        environ: as for `load`.
    """
    for name in _variables(environ).values():
        if _names_file(_full_path(name)):
            yield Path(environ[name])


def where(
    key: str, file: Path | None, environ: Mapping[str, str], options: Options | None = None
) -> str:
    """Return the source of a setting: an option, a variable, the file or DEFAULT.

    Args:
        key: like server.port.
        file, environ, options: as for `load`.
    """
    path = tuple(key.split("."))
    variables, _ = _given(environ, options or {})
    if path in variables:
        return variables[path]
    source = file or DEFAULT_FILE
    return str(source) if _is_set(_read(source, must_exist=False), path) else DEFAULT


def _given(
    environ: Mapping[str, str], options: Options
) -> tuple[dict[tuple[str, ...], str], dict[str, str]]:
    """Return the names of variables and options by the paths of their settings, and the values."""
    variables, values = _variables(environ), dict(environ)
    for key, (option, value) in options.items():
        variables[tuple(key.split("."))] = option
        values[option] = value
    return variables, values


def _leaves(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path of each setting, and its JSON schema."""
    schema = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _leaves(annotation, (*path, name))
        else:
            yield (*path, name), schema[name]


def _allowed(schema: Mapping[str, Any]) -> str:
    """Describe in words the values that a JSON schema allows."""
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema["type"] == "boolean":
        return "true or false"
    if "items" in schema:
        one = "a string or " if "string" in schema["type"] else ""
        return f"{one}a list of {schema[ITEMS]}"
    if schema["type"] == "string":
        return "a string" if not schema.get("minLength") else "a non-empty string"
    number = "an integer" if schema["type"] == "integer" else "a number"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    start = f"above {low}" if "exclusiveMinimum" in schema else f"from {low}"
    return f"{number} {start} to {schema['maximum']:.15g}"


_SCHEMAS: dict[tuple[str, ...], Any] = dict(_leaves(Settings, ()))

LEAVES = {path: _allowed(schema) for path, schema in _SCHEMAS.items()}
"""The allowed values of every setting, in words, by its path."""

SECRETS = {
    path
    for path, schema in _SCHEMAS.items()
    if schema.get("writeOnly") or schema.get("items", {}).get("writeOnly")
}
"""The paths of the settings that are secrets, or lists of secrets."""

_SECTIONS = {path[:length] for path in LEAVES for length in range(1, len(path))}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader (YAML 1.1), except that a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key that is not a string"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key_node.value in seen:
                problem = f"duplicate key {_key(key_node.value)}"
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
        # PyYAML raises the last four for a date like 2020-99-99, for !!int foo and the like.
        raise SettingsError([f"{file}: not YAML: {_one_line(error)}"]) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError([f"{file}: not a mapping of sections"])
    return _without_empty_sections(content, Settings, file, ())


def _without_empty_sections(
    content: dict[Any, Any], model: type[BaseModel], file: Path, path: tuple[str, ...]
) -> dict[str, Any]:
    """Return a section without its empty subsections, which YAML reads as null.

    Raises:
        SettingsError: a subsection is not a mapping. A variable of that subsection would replace
            the wrong value silently.
    """
    section: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key)
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            section[name] = value
        elif isinstance(value, dict):
            section[name] = _without_empty_sections(value, annotation, file, (*path, name))
        elif value is not None:
            key_path = ".".join((*path, name))
            shown = _shown(value, (*path, name))
            raise SettingsError([f"{file}: {key_path}: {shown} is not allowed; allowed: {SECTION}"])
    return section


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, yaml.YAMLError):
        return "a value does not match its type or tag"
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    return place + QUOTED.sub(_redact_quoted, problem)


def _redact_quoted(quoted: re.Match[str]) -> str:
    """Replace a quotation from the settings file, which may be a secret.

    Single characters and PyYAML's own token names, like '<block end>', are kept.
    """
    text: str = quoted[0]
    return text if len(text) <= 3 or text in ("'<stream end>'", "'<block end>'") else "…"


def _values(variables: Mapping[tuple[str, ...], str], given: Mapping[str, str]) -> dict[str, str]:
    """Return the values of the settings that are not from the file, by the settings' variables.

    Raises:
        SettingsError: a variable names a file that contains no secret.
    """
    values, problems = {}, []
    for path, name in variables.items():
        try:
            is_file = not name.startswith("-") and _names_file(_full_path(name))
            values[_variable(path)] = read_secret(given[name]) if is_file else given[name]
        except SecretFileError as error:
            problems.append(f"{name}: {error}")
    if problems:  # without the secret, further settings would be reported as invalid
        raise SettingsError(problems)
    return values


def _variables(environ: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Return the names of the relay's variables, by the paths of their settings.

    Raises:
        SettingsError: a secret and its file are both set.
    """
    variables: dict[tuple[str, ...], str] = {}
    for name in environ:
        if not name.upper().startswith(ENV_PREFIX):
            continue
        path = _full_path(name)
        if _names_file(path):
            path = _without_suffix(path)
        if path in variables and path in SECRETS:
            raise SettingsError([f"{variables[path]} and {name} are both set; remove one of them"])
        variables[path] = name
    return variables


def _full_path(variable: str) -> tuple[str, ...]:
    return tuple(variable[len(ENV_PREFIX) :].lower().split("__"))


def _names_file(path: tuple[str, ...]) -> bool:
    """Return whether the variable of a path names the file of a secret, and is no setting."""
    return path not in LEAVES and _without_suffix(path) in SECRETS


def _without_suffix(path: tuple[str, ...]) -> tuple[str, ...]:
    return (*path[:-1], path[-1].removesuffix(FILE_SUFFIX))


def _suggestion(path: tuple[str, ...]) -> str:
    """Return the most similar name that exists, as a hint."""
    names = {_variable(leaf): leaf for leaf in LEAVES}
    near = get_close_matches(_variable(path), names, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else "websocket-relay check prints all settings"


def _variable(path: tuple[str, ...]) -> str:
    return ENV_PREFIX + "__".join(path).upper()


def _problem(
    entry: Any,
    file: Path,
    values: Mapping[str, Any],
    variables: Mapping[tuple[str, ...], str],
) -> str:
    """Convert one of pydantic's errors into a message in the terms of the settings.

    Args:
        entry: the error.
        file, values: of the settings.
        variables: the variables and options that are set, by the paths of their settings.
    """
    loc = tuple(str(part) for part in entry["loc"])
    if not loc:
        message = entry["msg"].removeprefix("Value error, ")
        return f"{_source_of(message, loc, file, values, variables)}: {message}"
    path = next((loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in LEAVES), loc)
    source = variables.get(path, str(file))
    key = _key(".".join(path))
    if entry["type"] == "extra_forbidden":
        siblings = [leaf[len(loc) - 1] for leaf in LEAVES if leaf[: len(loc) - 1] == loc[:-1]]
        near = get_close_matches(loc[-1], siblings, n=1, cutoff=0.6)
        allowed = f"did you mean {near[0]}?" if near else ", ".join(dict.fromkeys(siblings))
        hint = allowed if near else f"allowed: {allowed}"
        # The value is not shown: it may be a secret.
        return f"{source}: {key}: unknown key; {hint}"
    if entry["type"] == "value_error" and path in _SECTIONS:
        message = entry["msg"].removeprefix("Value error, ")
        return f"{_source_of(message, path, file, values, variables)}: {key}: {message}"
    allowed = LEAVES.get(path, SECTION)
    if entry["type"] == "value_error" and not isinstance(entry["input"], bool):
        allowed = entry["msg"].removeprefix("Value error, ")
    return f"{source}: {key}: {_shown(entry['input'], loc)} is not allowed; allowed: {allowed}"


def _source_of(
    message: str,
    section: tuple[str, ...],
    file: Path,
    values: Mapping[str, Any],
    variables: Mapping[tuple[str, ...], str],
) -> str:
    """Return a variable, an option or the file: where settings are from that do not fit together.

    Args:
        message: names some of them.
        section: that contains them.
        file, values, variables: as for `_problem`.
    """
    named = [path for path in LEAVES if ".".join(path) in message]
    for path in named:
        if path in variables:
            return variables[path]
    if any(_is_set(values, path) for path in named):
        return str(file)
    inside = [name for path, name in variables.items() if path[: len(section)] == section]
    return inside[0] if section and inside else str(file)


def _is_set(values: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _key(name: str) -> str:
    return name if name.isprintable() and len(name) <= 80 else _shown(name)


def _shown(value: object, path: tuple[str, ...] = ()) -> str:
    """Return a value as one short line, unless it is or may contain a secret.

    Args:
        value: any value.
        path: the path of its setting, which decides whether it may be a secret.
    """
    # A key or a password may be in the place of the file that contains it.
    is_file = path != () and path[-1].endswith(FILE_SUFFIX)
    may_be_secret = path in SECRET_PATHS or is_file or path[:2] == ("auth", "jwt")
    may_be_secret = may_be_secret or path in URLS
    if may_be_secret and not (path[2:3] == ("algorithms",) and _is_algorithm_like(value)):
        return "the value (not shown)"
    return _SHORT.repr(list(value) if isinstance(value, tuple) else value)


def _is_algorithm_like(value: object) -> bool:
    parts = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(part, str) and ALGORITHM_LIKE.fullmatch(part) for part in parts)


SECRET_PATHS = {path[:length] for path in SECRETS for length in range(1, len(path) + 1)}
"""The paths of the secrets, and of the sections that contain them."""

URLS = {("auth", "hook", "url"), ("hooks", "url")}
"""A URL that is rejected may contain a password."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
