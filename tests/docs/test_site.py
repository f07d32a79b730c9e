"""The pages of docs/ build as a site, with no broken link and no page left out."""

import os
import subprocess
from pathlib import Path

from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import ROOT
from tests.support.tools import python_tool


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [python_tool("mkdocs"), "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    # With --quiet MkDocs counts no warnings, so --strict would never fail.
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()
