"""Compare the settings of a running relay with newly loaded ones.

Owns the list of the settings that can change while the relay runs. Knows no component that uses
them.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

from pydantic import BaseModel

from websocket_relay.config.loader import LEAVES
from websocket_relay.config.model import JwtSettings, Settings

SettingPath = tuple[str, ...]
Model = TypeVar("Model", bound=BaseModel)

KEYS = ("auth",)
API_KEY = ("api", "key")

HOOK_SECRET: SettingPath = ("hooks", "secret")

RELOADABLE: frozenset[SettingPath] = frozenset(
    {
        ("server", "allowed_origins"),
        ("limits", "max_connections"),
        ("limits", "max_connections_per_ip"),
        ("limits", "max_connections_per_user"),
        ("limits", "max_handshakes_per_s"),
        ("limits", "max_http_connections"),
        ("limits", "max_messages_per_s"),
        ("limits", "send_backlog_bytes"),
        ("limits", "total_backlog_bytes"),
        ("logging", "level"),
        HOOK_SECRET,
        ("auth", "hook", "headers"),
        ("auth", "hook", "timeout_s"),
        API_KEY,
        *(("auth", "jwt", name) for name in JwtSettings.model_fields if name != "jwks_url"),
    }
)
"""The settings that take effect at SIGHUP; all others at the next start."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs between the running settings and those that were loaded.

    Attributes:
        settings: the running ones with every change that can take effect now.
        applied: the paths of these changes, such as `logging.level`.
        needs_restart: the paths of the other changes.
        keeps_keys: whether the keys of tokens stay as they are, because their settings need a
            restart.
    """

    settings: Settings
    applied: list[str]
    needs_restart: list[str]
    keeps_keys: bool


def compare(running: Settings, loaded: Settings, *, only_keys: bool = False) -> Changes:
    """Return what a reload changes.

    Args:
        running: the settings of the relay.
        loaded: the new ones.
        only_keys: whether only the keys may change: the settings of tokens, that of the API, and
            hooks.secret.
    """
    considered = (path for path in LEAVES if _is_of_keys(path) or not only_keys)
    differing = [path for path in considered if _value(running, path) != _value(loaded, path)]
    # The settings of `auth` are valid together only: all of them change now, or none.
    keeps_keys = any(path[:1] == KEYS and path not in RELOADABLE for path in differing)
    # The routes of the API are there from the start, or not.
    keeps_api = not (running.api.key and loaded.api.key)
    settings, applied, needs_restart = running, [], []
    for path in differing:
        is_kept = keeps_keys if path[:1] == KEYS else path == API_KEY and keeps_api
        if path in RELOADABLE and not is_kept:
            settings = _replaced(settings, path, _value(loaded, path))
            applied.append(".".join(path))
        else:
            needs_restart.append(".".join(path))
    return Changes(settings, applied, needs_restart, keeps_keys)


def _is_of_keys(path: SettingPath) -> bool:
    return path[:1] == KEYS or path in (API_KEY, HOOK_SECRET)


def _value(settings: Settings, path: SettingPath) -> Any:
    return reduce(getattr, path, settings)


def _replaced(model: Model, path: SettingPath, value: object) -> Model:
    name, *rest = path
    inner = _replaced(getattr(model, name), tuple(rest), value) if rest else value
    return model.model_copy(update={name: inner})
