"""The units on the page about systemd: systemd itself accepts them."""

import subprocess
import sys
from pathlib import Path

from tests.support.pages import fenced_blocks
from tests.support.programs import SYSTEMD_ANALYZE, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import ROOT

UNITS = "/etc/systemd/system/"


def test_systemd_accepts_the_units_on_the_page(tmp_path: Path) -> None:
    program = needed(SYSTEMD_ANALYZE)
    installed = Path(sys.executable).with_name("websocket-relay")
    text = (ROOT / "docs" / "how-to" / "systemd.md").read_text()
    files = []
    for block in fenced_blocks(text):
        if block.title.startswith(UNITS):
            file = tmp_path / block.title.removeprefix(UNITS)
            file.parent.mkdir(exist_ok=True)
            file.write_text(
                block.text.replace("/opt/websocket-relay/bin/websocket-relay", str(installed))
            )
            files.append(file)
    units = [file for file in files if file.parent == tmp_path]
    assert [unit.name for unit in units] == ["websocket-relay.socket", "websocket-relay.service"]
    done = subprocess.run(
        [program, "verify", "--man=no", "--recursive-errors=one", *units],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
