"""Reload the settings of a running relay. Knows no signal and no socket."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from websocket_relay.app import Replica
from websocket_relay.config import changes
from websocket_relay.config.model import Settings, SettingsWarning
from websocket_relay.outcomes import SettingsError, UnusableSettingError
from websocket_relay.watched_files import WatchedFiles

if TYPE_CHECKING:
    from websocket_relay.admission.verifier import TokenVerifier

log = logging.getLogger(__name__)


RETRY_S = 10.0
"""Until the keys are read again, while the sources are invalid: a replaced key is still in use."""


class Reload:
    """The reload of the settings, which a signal or a changed file requests.

    A signal reloads all that can change. The replacement of a file of keys reloads only these:
    the other settings may be incomplete at that moment.

    Args:
        running: the settings of the relay.
        load: reads the settings again, from where they were read at the start.
        secret_files: the files that the variables of the environment name.
        warnings: returns the warnings about settings.
        relay: loads the keys of tokens, and takes the new settings.
    """

    def __init__(
        self,
        *,
        running: Settings,
        load: Callable[[], Settings],
        secret_files: Sequence[Path],
        warnings: Callable[[Settings], Iterable[SettingsWarning]],
        relay: Replica,
    ) -> None:
        self._requested = asyncio.Event()
        self._only_keys = True
        self._running = running
        self._load = load
        self._secret_files = secret_files
        self._warnings = warnings
        self._relay = relay
        self._watched = WatchedFiles(self._files)
        self._problems: tuple[str, ...] = ()  # that were logged last

    def request(self) -> None:
        """Request a reload of all settings; several requests may cause one reload."""
        self._only_keys = False
        self._requested.set()

    async def run(self) -> None:
        """Reload when it is requested, or a file of keys is replaced, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_files())
            await self._reload_when_requested()

    async def _watch_files(self) -> None:
        while True:
            await self._watched.wait_for_change()
            self._requested.set()

    async def _reload_when_requested(self) -> None:
        """Reload at each request. Invalid settings change nothing."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            only_keys, self._only_keys = self._only_keys, True
            try:
                # In threads, because reading files may block.
                loaded = await asyncio.to_thread(self._load)
                changed = changes.compare(self._running, loaded, only_keys=only_keys)
                tokens = None
                if not changed.keeps_keys:
                    tokens = await asyncio.to_thread(self._relay.load_tokens, changed.settings)
            except (SettingsError, UnusableSettingError) as error:
                problems = error.problems if isinstance(error, SettingsError) else (str(error),)
                if problems != self._problems or not only_keys:
                    log.error("settings not reloaded", extra={"problems": list(problems)})
                self._problems = problems
                asyncio.get_running_loop().call_later(RETRY_S, self._requested.set)
                continue
            except Exception:  # for example, no thread can be started
                log.exception("settings not reloaded")
                continue
            self._apply(changed, tokens)

    def _apply(self, changed: changes.Changes, tokens: "TokenVerifier | None") -> None:
        self._problems = ()
        self._running = changed.settings
        self._relay.configure(self._running, tokens)  # all of it between two messages
        facts = {"changed": changed.applied, "needs_restart": changed.needs_restart}
        level = logging.WARNING if changed.needs_restart else logging.INFO
        log.log(level, "settings reloaded", extra=facts)
        for warning in self._warnings(self._running) if changed.applied else ():
            log.warning(warning.text, extra=warning.facts)

    def _files(self) -> Iterator[Path]:
        yield from self._secret_files
        if self._running.auth.jwt.public_key_file:
            yield Path(self._running.auth.jwt.public_key_file)
