"""Write what in chart and manifests follows from something else: `make chart`.

Owns values.yaml's `config` and values.schema.json (from the settings), the table in the chart's
README (from the comments in values.yaml) and k8s/base (from the chart). Knows nothing of where Helm
comes from.
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
"""Returns what `helm template` makes of the chart with its defaults, hooks left out."""

CONFIG_COMMENT = """\
# config.yaml of the relay, key for key: all settings. Each may be left out. What differs from the
# relay's own defaults: logs are JSON, and a stop has the time that a cluster needs. Secrets go into
# Secrets (see secrets)
"""

SHUTDOWN = model.ShutdownSettings(readiness_delay_s=5, spread_s=10, timeout_s=20)
"""Five seconds until every node and Ingress has noticed that a pod goes; ten for its clients, who
may be some ten thousand (docs/scaling.md)."""

PATTERNS = {
    ("server", "base_path"): model.BASE_PATH,
    ("server", "allowed_origins"): model.ORIGIN,
    ("server", "trusted_proxies"): re.compile(r"[0-9A-Fa-f:.]+(/[0-9]{1,3})?"),
    ("backplane", "stream"): model.STREAM_NAME,
}
"""What the settings check, and pydantic's schema does not say; of lists their items. Of networks it
is roughly that."""

SCHEMA_KEYS = {"type", "enum", "items", "minimum", "maximum", "exclusiveMinimum", "minLength"}

CONFIG_BLOCK = re.compile(r"(?:^#.*\n)*^config:.*\n(?:^(?: .*)?\n)*", re.MULTILINE)
KEY = re.compile(r"( *)([\w./-]+):(?: +(.*))?")
TABLE = re.compile(r"(?<=<!-- values -->\n).*(?=<!-- /values -->)", re.DOTALL)

HEADER = "# Rendered from helm/websocket-relay by make chart. Change things in an overlay.\n"

RELEASE_LABELS = ("app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart")
"""What changes with each version, or says that Helm was here."""


@dataclass(frozen=True, slots=True)
class Row:
    """A value of the chart.

    Attributes:
        path: its keys.
        default: what values.yaml says.
        comment: what stands above it there.
    """

    path: tuple[str, ...]
    default: Any
    comment: str


def values(text: str) -> str:
    """Return values.yaml with its `config` as the settings are."""
    chart_defaults = model.Settings.model_construct(
        shutdown=SHUTDOWN, logging=model.LoggingSettings(format="json")
    )
    tree = render.render(chart_defaults, comments=True)
    indented = "".join(f"  {line}\n" if line else "\n" for line in tree.splitlines())
    block = f"{CONFIG_COMMENT}config:\n{indented}\n"
    # A text for a replacement would have its backslashes read.
    return CONFIG_BLOCK.sub(lambda _: block, text, count=1)


def rows(text: str) -> list[Row]:
    """Return what values.yaml holds: each value that has a comment above it."""
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
    # A section whose values have comments of their own is no value.
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
    """Yield the files of k8s/base, from what Helm made of the chart."""
    names = []
    for document in filter(None, yaml.safe_load_all(rendered)):
        if document["kind"] == "ConfigMap":
            # kustomize makes it anew, with its hash in its name: other settings are other pods.
            config = yaml.safe_load(document["data"]["config.yaml"])
            yield BASE / "config.yaml", HEADER + _dumped(config)
            continue
        name = f"{document['kind'].lower()}.yaml"
        names.append(name)
        yield BASE / name, HEADER + _dumped(_plain(document))
    # The ConfigMap's name is the only thing that has to be known of it here.
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": names,
        "configMapGenerator": [{"name": "websocket-relay", "files": ["config.yaml"]}],
    }
    yield BASE / "kustomization.yaml", HEADER + _dumped(kustomization)


def files(render: Render) -> dict[Path, str]:
    """Return all that is generated, by where it belongs.

    Helm renders the chart as it lies there, so a values.yaml that changes has to be written first.
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
    """Write all that is generated."""
    # Helm reads the first two before the last are made.
    values_file = CHART / "values.yaml"
    values_text = values(values_file.read_text())
    values_file.write_text(values_text)
    (CHART / "values.schema.json").write_text(schema(values_text))
    made = files(render)
    shutil.rmtree(BASE, ignore_errors=True)
    BASE.mkdir(parents=True)
    for path, text in made.items():
        path.write_text(text)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _settings_schema(root: Mapping[str, Any]) -> dict[str, Any]:
    """Return pydantic's schema of the settings as one tree, without what Helm has no use for."""

    def whole(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        node = root["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        kept: dict[str, Any] = {"description": node.get("description", "")}
        if "properties" in node:
            children = node["properties"].items()
            inner = {name: whole(child, (*path, name)) for name, child in children}
            # values.yaml has them all: one that is missing was taken out by a null.
            closed = {"type": "object", "additionalProperties": False, "required": [*inner]}
            return kept | closed | {"properties": inner}
        kept |= {key: value for key, value in node.items() if key in SCHEMA_KEYS}
        if path in PATTERNS:
            pattern = {"pattern": f"^({PATTERNS[path].pattern})$"}
            kept |= {"items": kept["items"] | pattern} if "items" in kept else pattern
        return kept

    return whole(root, ()) | {"description": "config.yaml of the relay, key for key"}


def _require(node: dict[str, Any], defaults: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
    """Ask for what values.yaml has: one that is missing was taken out by a null.

    Without a section or a number Helm would make nonsense, or say where in a template it gave up.
    What is empty, free or allowed to be null can be missing.
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
    """Return a value's own place in the schema; none where it is in a definition, or is free."""
    node = tree
    for key in path:
        if "properties" not in node or key not in node["properties"]:
            return None
        node = node["properties"][key]
    if "$ref" in node:  # beside a reference draft 7 has no eyes for anything
        node["allOf"] = [{"$ref": node.pop("$ref")}]
    return node


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    """Take from an object what says that Helm made it, and what kustomize does itself."""
    for label in RELEASE_LABELS:
        document["metadata"]["labels"].pop(label)
    template = document.get("spec", {}).get("template", {}).get("metadata", {})
    if template.get("annotations", {}).pop("checksum/config", None) and not template["annotations"]:
        del template["annotations"]
    return document


class _Dumper(yaml.SafeDumper):
    """Writes lists the way that yamllint likes them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _dumped(document: Mapping[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)
