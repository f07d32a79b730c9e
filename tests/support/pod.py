"""Do with a rendered pod what a kubelet does, as far as a process is concerned.

Volumes are directories, variables are set, and Secrets hold what the test says. Knows no relay.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.helm import KubernetesObject, find_object

Secrets = Mapping[str, Mapping[str, bytes]]
"""What Secrets hold, by their names and keys."""


class Pod:
    """A pod with one container.

    Args:
        objects: all that was rendered: ConfigMaps are looked up there.
        spec: the pod's.
        secrets: what it may refer to.
        root: where its mounts go. Paths that a variable holds are led there, too.
    """

    def __init__(
        self,
        objects: Sequence[KubernetesObject],
        spec: Mapping[str, Any],
        secrets: Secrets,
        root: Path,
    ) -> None:
        self._objects = objects
        self._spec = spec
        self._secrets = secrets
        self._root = root
        (self.container,) = spec["containers"]
        for mount in self.container.get("volumeMounts", ()):
            self._write(mount)

    def path(self, inside: str) -> Path:
        """Return where a path of the pod's is on this machine."""
        return self._root / inside.removeprefix("/")

    @property
    def environment(self) -> dict[str, str]:
        """Its variables."""
        mounts = [mount["mountPath"] for mount in self.container.get("volumeMounts", ())]

        def here(value: str) -> str:
            for mount in mounts:
                value = value.replace(f"{mount}/", f"{self.path(mount)}/")
            return value

        return {entry["name"]: here(self._value(entry)) for entry in self.container.get("env", ())}

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
        if "configMap" in volume:
            texts = find_object(self._objects, "ConfigMap", volume["configMap"]["name"])["data"]
            yield from ((name, text.encode()) for name, text in texts.items())
        elif "secret" in volume:
            held = self._secrets[volume["secret"]["secretName"]]
            items = volume["secret"].get("items") or [{"key": key, "path": key} for key in held]
            yield from ((item["path"], held[item["key"]]) for item in items)
