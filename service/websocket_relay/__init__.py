"""websocket-relay: what one client sends, every client of its channel receives."""

__version__: str


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for: that takes longer than to import all else here."""
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("websocket-relay")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
