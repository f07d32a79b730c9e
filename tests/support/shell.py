"""The environment of a command that a user types."""

from collections.abc import Mapping

from tests.support.relay_process import environment

MAKE_VARIABLES = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
"""Variables that make sets for the make processes that it starts."""


def user_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment without variables of a make that runs the tests, and with `extra`."""
    variables = environment(extra)
    return {name: value for name, value in variables.items() if name not in MAKE_VARIABLES}
