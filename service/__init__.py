"""websocket-relay: what one client sends, every client of its channel receives."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("websocket-relay")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
