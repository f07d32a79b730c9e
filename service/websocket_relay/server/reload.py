"""Reload the settings of a running relay on request. Knows no signal and no socket."""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from websocket_relay import logs
from websocket_relay.app import Replica
from websocket_relay.config import changes
from websocket_relay.config.model import Settings
from websocket_relay.outcomes import SettingsError, UnusableSettingError

if TYPE_CHECKING:
    from websocket_relay.admission.verifier import TokenVerifier

log = logging.getLogger(__name__)


async def reload_when_requested(
    requested: asyncio.Event,
    running: Settings,
    load: Callable[[], Settings],
    load_tokens: "Callable[[Settings], TokenVerifier | None]",
    relay: Replica,
) -> None:
    """Reload whenever the event is set, until cancelled. Invalid settings change nothing.

    Args:
        requested: set by the signal; several signals may cause one reload.
        running: the settings of the relay.
        load: reads the settings again, from where they were read at the start.
        load_tokens: reads the keys of tokens again.
        relay: takes the new settings.
    """
    while True:
        await requested.wait()
        requested.clear()
        try:
            # In threads, because reading files may block.
            changed = changes.compare(running, await asyncio.to_thread(load))
            tokens = await asyncio.to_thread(load_tokens, changed.settings)
        except (SettingsError, UnusableSettingError) as error:
            problems = error.problems if isinstance(error, SettingsError) else [str(error)]
            log.error("settings not reloaded", extra={"problems": list(problems)})
            continue
        except Exception:  # for example, no thread can be started
            log.exception("settings not reloaded")
            continue
        running = changed.settings
        relay.configure(running, tokens)  # no await: all of it between two messages
        logs.set_level(running.logging.level)
        facts = {"changed": changed.applied, "needs_restart": changed.needs_restart}
        level = logging.WARNING if changed.needs_restart else logging.INFO
        log.log(level, "settings reloaded", extra=facts)
