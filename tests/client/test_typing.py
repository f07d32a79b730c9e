"""The public names are typed for pyright, too. mypy checks this project anyway."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.raw_client import PATIENCE_S
from tests.support.tools import npm_command

SAMPLE = Path(__file__).with_name("public_names.py")


@pytest.mark.timeout(180)  # the first time, it installs pyright
def test_pyright_accepts_a_program_that_uses_the_public_names() -> None:
    done = subprocess.run(
        [*npm_command("pyright"), "--pythonpath", sys.executable, str(SAMPLE)],
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
