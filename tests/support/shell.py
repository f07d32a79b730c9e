"""Type commands as a person does, who has not begun by running make."""

from collections.abc import Mapping

from tests.support.relay_process import environment

MAKE_VARIABLES = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")


def user_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment without what a make above this process tells a make below it."""
    ours = environment(extra)
    return {name: value for name, value in ours.items() if name not in MAKE_VARIABLES}
