"""Generate files of the chart and the manifests: `make chart`.

Owns values.yaml's `config` and values.schema.json (from the settings), the table in the chart's
README (from the comments in values.yaml) and k8s/base (from the chart). Knows no Helm program: the
caller renders the chart.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from websocket_relay.config import model, render

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "websocket-relay"
SCHEMA_BY_HAND = ROOT / "helm" / "values.schema.yaml"
BASE = ROOT / "k8s" / "base"

Render = Callable[[], str]
"""Returns the output of `helm template` for the chart with its defaults, without hooks."""

CONFIG_COMMENT = """\
# config.yaml of the relay, key for key: all settings. Each may be left out. What differs from the
# relay's own defaults: logs are JSON, and a stop has the time that a cluster needs. Secrets go into
# Secrets (see secrets)
"""

SHUTDOWN = model.ShutdownSettings(readiness_delay_s=5, spread_s=10, timeout_s=20)
"""5 s until every node and Ingress has noticed that a pod terminates; 10 s to close its clients,
which may be some ten thousand (docs/explanation/scaling.md)."""

HOST = r" *\[?[A-Za-z0-9*:._%-]+\]? *"
FILE = re.compile(r"[ -~]*")
ONE_OR_MORE = re.compile(r"(\s*[^\s,\[][^,]*(,\s*[^\s,][^,]*)*)?")
"""A string as in a variable: commas separate, and a JSON list would begin with [."""

PATTERNS: dict[tuple[str, ...], re.Pattern[str]] = {
    ("server", "host"): re.compile(f"{HOST}(,{HOST})*"),
    ("server", "base_path"): model.BASE_PATH,
    ("server", "allowed_origins"): re.compile(r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^/\s?#]*"),
    ("server", "trusted_proxies"): re.compile(r"[0-9A-Fa-f:.]+(/[0-9]{1,3})?"),
    ("metrics", "host"): re.compile(f"{HOST}(,{HOST})*"),
    **{
        ("backplane", name): FILE
        for name in model.BackplaneSettings.model_fields
        if name.endswith("_file")
    },
    ("backplane", "domain"): re.compile(r"[A-Za-z0-9_$-]*"),
    ("backplane", "inbox_prefix"): re.compile(f"({model.SUBJECT.pattern})?"),
    ("backplane", "stream"): model.STREAM_NAME,
    ("auth", "jwt", "public_key_file"): FILE,
    ("api", "key"): re.compile(f"({model.BEARER.pattern})?"),
    ("auth", "jwt", "audience"): ONE_OR_MORE,
    ("auth", "jwt", "issuer"): ONE_OR_MORE,
}
"""Patterns that the settings check and pydantic's schema lacks; for a list, of its items. The
patterns for origins and networks are only approximate: _checks.tpl has the rest."""

SCHEMA_KEYS = {"type", "enum", "items", "minimum", "maximum", "exclusiveMinimum", "minLength"}

CONFIG_BLOCK = re.compile(r"(?:^#.*\n)*^config:.*\n(?:^(?: .*)?\n)*", re.MULTILINE)
KEY = re.compile(r"( *)([\w./-]+):(?: +(.*))?")
TABLE = re.compile(r"(?<=<!-- values -->\n).*(?=<!-- /values -->)", re.DOTALL)

HEADER = "# Rendered from helm/websocket-relay by make chart. Change things in an overlay.\n"

CONFIG_ANNOTATION = "websocket-relay/config.yaml"
"""The annotation of the chart's pods that contains the settings."""

RELEASE_LABELS = ("app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart")
"""Labels that change with each version, or that belong to Helm."""


@dataclass(frozen=True, slots=True)
class Row:
    """A value of the chart.

    Attributes:
        path: its keys.
        default: its value in values.yaml.
        comment: the comment above it there.
    """

    path: tuple[str, ...]
    default: Any
    comment: str


def values(text: str) -> str:
    """Return values.yaml with `config` generated from the settings."""
    chart_defaults = model.Settings.model_construct(
        shutdown=SHUTDOWN, logging=model.LoggingSettings(format="json")
    )
    tree = render.render(chart_defaults, comments=True)
    indented = "".join(f"  {line}\n" if line else "\n" for line in tree.splitlines())
    block = f"{CONFIG_COMMENT}config:\n{indented}\n"
    # A function, since re would interpret backslashes in a replacement string.
    return CONFIG_BLOCK.sub(lambda _: block, text, count=1)


def rows(text: str) -> list[Row]:
    """Return the values of values.yaml that have a comment above them."""
    found: list[Row] = []
    tree = yaml.safe_load(text)
    path: list[tuple[int, str]] = []
    comments: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comments.append(stripped.removeprefix("#").strip())
            continue
        key = KEY.fullmatch(line)
        if key:
            path = [*((depth, name) for depth, name in path if depth < len(key[1]))]
            path.append((len(key[1]), key[2]))
            if comments:
                names = tuple(name for _, name in path)
                found.append(Row(names, _at(tree, names), " ".join(comments)))
        comments = []
    # A section is not a row itself if its values have comments of their own.
    parents = {row.path[:length] for row in found for length in range(1, len(row.path))}
    return [row for row in found if row.path not in parents]


def schema(values_text: str) -> str:
    """Return values.schema.json."""
    tree = yaml.safe_load(SCHEMA_BY_HAND.read_text())
    _require(tree, yaml.safe_load(values_text), tree["definitions"])
    tree["required"].append("config")
    tree["properties"]["config"] = _settings_schema(model.Settings.model_json_schema())
    for row in rows(values_text):
        if row.path[0] != "config":
            place = _schema_of(tree, row.path)
            if place is not None:
                place["description"] = row.comment
    return json.dumps(tree, indent=2) + "\n"


def readme(text: str, values_text: str) -> str:
    """Return the chart's README with its table of values."""
    lines = ["| value | default | |\n", "| --- | --- | --- |\n"]
    for row in rows(values_text):
        name = ".".join(f'"{key}"' if "." in key else key for key in row.path)
        default = json.dumps(row.default) if row.default is not None else ""
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{name}` | {shown} | {row.comment} |\n".replace("|  |", "| |"))
    return TABLE.sub(lambda _: "\n" + "".join(lines) + "\n", text)


def manifests(rendered: str) -> Iterator[tuple[Path, str]]:
    """Yield the files of k8s/base, from the chart as rendered by Helm."""
    names = []
    for document in filter(None, yaml.safe_load_all(rendered)):
        if document["kind"] == "Deployment":
            yield BASE / "config.yaml", HEADER + _dumped(_taken_config(document))
        name = f"{document['kind'].lower()}.yaml"
        names.append(name)
        yield BASE / name, HEADER + _dumped(_plain(document))
    # kustomize adds a hash to the ConfigMap's name, and `kubectl apply` keeps the old ones.
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": names,
        "configMapGenerator": [{"name": "websocket-relay", "files": ["config.yaml"]}],
    }
    yield BASE / "kustomization.yaml", HEADER + _dumped(kustomization)


def files(render: Render) -> dict[Path, str]:
    """Return the generated files, by path.

    Helm renders the chart on disk, so a changed values.yaml has to be written first.
    """
    values_file, readme_file = CHART / "values.yaml", CHART / "README.md"
    values_text = values(values_file.read_text())
    return {
        values_file: values_text,
        CHART / "values.schema.json": schema(values_text),
        readme_file: readme(readme_file.read_text(), values_text),
        **dict(manifests(render())),
    }


def write(render: Render) -> None:
    """Write the generated files."""
    # Helm reads values.yaml and values.schema.json when it renders the others.
    values_file = CHART / "values.yaml"
    values_text = values(values_file.read_text())
    values_file.write_text(values_text)
    (CHART / "values.schema.json").write_text(schema(values_text))
    generated = files(render)
    shutil.rmtree(BASE, ignore_errors=True)
    BASE.mkdir(parents=True)
    for path, text in generated.items():
        path.write_text(text)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _settings_schema(root: Mapping[str, Any]) -> dict[str, Any]:
    """Return pydantic's schema of the settings as one tree, without keys that Helm does not use."""

    def whole(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        node = root["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        kept: dict[str, Any] = {"description": node.get("description", "")}
        if "properties" in node:
            children = node["properties"].items()
            inner = {name: whole(child, (*path, name)) for name, child in children}
            # values.yaml has every key: a missing one was removed by a null.
            closed = {"type": "object", "additionalProperties": False, "required": [*inner]}
            return kept | closed | {"properties": inner}
        kept |= {key: value for key, value in node.items() if key in SCHEMA_KEYS}
        if kept.get("type") == "number":
            kept |= {"type": ["number", "string"], "pattern": _decimal_text(kept)}
        if path in PATTERNS:
            pattern = {"pattern": f"^({PATTERNS[path].pattern})$"}
            is_list = kept["type"] == "array"
            kept |= {"items": kept["items"] | pattern} if is_list else pattern
        return kept

    return whole(root, ()) | {"description": "config.yaml of the relay, key for key"}


def _decimal_text(bounds: Mapping[str, Any]) -> str:
    """Return a pattern for a number with decimals that `helm --set` passes, which is a string.

    It matches numbers within the bounds, less those with as many digits as the maximum.
    """
    more_digits = len(str(int(bounds["maximum"]))) - 2
    large = rf"[1-9][0-9]{{0,{more_digits}}}[.][0-9]+"
    if bounds.get("minimum", 0) >= 1:
        return f"^{large}$"
    zero = "|0[.]0+" if "minimum" in bounds else ""
    return f"^({large}|0[.]0*[1-9][0-9]*{zero})$"


def _require(node: dict[str, Any], defaults: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
    """Require the keys that values.yaml has: a missing one was removed by a null.

    Without a section or a number Helm would render nonsense, or fail with a position in a template.
    A value that is empty, free-form or nullable may be missing.
    """
    needed = []
    for name, default in defaults.items():
        place = node["properties"][name]
        kind = shared[place["$ref"].rpartition("/")[2]] if "$ref" in place else place
        if "properties" in place:
            _require(place, default, shared)
        is_needed = "properties" in kind or (default and not isinstance(default, dict | list))
        if is_needed and "null" not in kind.get("type", ""):
            needed.append(name)
    if needed:
        node["required"] = needed


def _schema_of(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """Return a value's node in the schema; None if it is in a definition, or is free-form."""
    node = tree
    for key in path:
        if "properties" not in node or key not in node["properties"]:
            return None
        node = node["properties"][key]
    if "$ref" in node:  # draft 7 ignores all keys beside a $ref
        node["allOf"] = [{"$ref": node.pop("$ref")}]
    return node


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    """Remove Helm's labels from an object."""
    for label in RELEASE_LABELS:
        document["metadata"]["labels"].pop(label)
    return document


def _taken_config(deployment: dict[str, Any]) -> Any:
    """Return the settings in the pods' template, which then takes them from the ConfigMap."""
    template = deployment["spec"]["template"]
    (volume,) = (each for each in template["spec"]["volumes"] if each["name"] == "config")
    del volume["downwardAPI"]
    volume["configMap"] = {"name": "websocket-relay"}
    annotations = template["metadata"].pop("annotations")
    return yaml.safe_load(annotations[CONFIG_ANNOTATION])


class _Dumper(yaml.SafeDumper):
    """Indents lists as yamllint requires."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _dumped(document: Mapping[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)
