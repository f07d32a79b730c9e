"""Prepare the files and variables of a rendered pod, as a kubelet does. Knows no relay.

Volumes are directories, and the test provides the content of Secrets.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Secrets = Mapping[str, Mapping[str, bytes]]
"""Values of Secrets, by the names of the Secrets and their keys."""


class Pod:
    """A pod. Its first container runs here.

    Args:
        template: metadata and spec of the pod.
        secrets: to which the pod may refer.
        root: the directory of its mounts. Paths in variables point there, too.
    """

    def __init__(self, template: Mapping[str, Any], secrets: Secrets, root: Path) -> None:
        self._template = template
        self._spec = spec = template["spec"]
        self._secrets = secrets
        self._root = root
        self.container = spec["containers"][0]
        for mount in self.container.get("volumeMounts", ()):
            self._write(mount)

    def path(self, inside: str) -> Path:
        """Return the path on this machine of a path in the pod."""
        return self._root / inside.removeprefix("/")

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of the container."""
        mounts = [mount["mountPath"] for mount in self.container.get("volumeMounts", ())]

        def with_local_paths(value: str) -> str:
            for mount in mounts:
                value = value.replace(f"{mount}/", f"{self.path(mount)}/")
            return value

        return {
            entry["name"]: with_local_paths(self._value(entry))
            for entry in self.container.get("env", ())
        }

    def _value(self, entry: Mapping[str, Any]) -> str:
        if "value" in entry:
            return str(entry["value"])
        reference = entry["valueFrom"]["secretKeyRef"]
        return self._secrets[reference["name"]][reference["key"]].decode()

    def _write(self, mount: Mapping[str, Any]) -> None:
        assert mount.get("readOnly") or "emptyDir" in self._volume(mount["name"])
        directory = self.path(mount["mountPath"])
        directory.mkdir(parents=True)
        for name, content in self._files(self._volume(mount["name"])):
            (directory / name).write_bytes(content)

    def _volume(self, name: str) -> Mapping[str, Any]:
        (volume,) = (each for each in self._spec["volumes"] if each["name"] == name)
        assert isinstance(volume, dict)
        return volume

    def _files(self, volume: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        if "downwardAPI" in volume:
            annotations = self._template["metadata"]["annotations"]
            for item in volume["downwardAPI"]["items"]:
                _, name, _ = item["fieldRef"]["fieldPath"].split("'")
                yield item["path"], annotations[name].encode()
        elif "secret" in volume:
            yield from self._secret_files(volume["secret"]["secretName"], volume["secret"])
        for source in volume.get("projected", {}).get("sources", ()):
            yield from self._secret_files(source["secret"]["name"], source["secret"])

    def _secret_files(self, name: str, source: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        values = self._secrets[name]
        items = source.get("items") or [{"key": key, "path": key} for key in values]
        yield from ((item["path"], values[item["key"]]) for item in items)
