"""Prepare a directory once, whichever of several processes comes first."""

import fcntl
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def prepare_once(directory: Path, prepare: Callable[[Path], None]) -> None:
    """Prepare a directory if it does not exist; wait if another process is preparing it.

    Args:
        directory: exists only when it is complete.
        prepare: writes the content into an empty directory.
    """
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return
        temporary = Path(tempfile.mkdtemp(dir=directory.parent))
        try:
            prepare(temporary)
            temporary.rename(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
