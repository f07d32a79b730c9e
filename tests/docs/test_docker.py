"""The files of docs/how-to/docker.md: compose and the relay accept them."""

from io import StringIO
from pathlib import Path

import yaml
from dotenv import dotenv_values

from tests.support.certificates import make_pair
from tests.support.pages import fenced_blocks
from tests.support.relay_process import ROOT, run_command, run_python

FILES = {
    block.title: block.text
    for block in fenced_blocks((ROOT / "docs" / "how-to" / "docker.md").read_text())
    if block.title
}
CA_FILE = "/etc/websocket-relay/ca.pem"


def test_compose_understands_the_override(tmp_path: Path) -> None:
    file = tmp_path / "compose.override.yaml"
    file.write_text(FILES[file.name])
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = run_python("-m", "check_jsonschema", *schema, str(file))
    assert done.exit_code == 0, done.stdout
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    override = yaml.safe_load(file.read_text())["services"]
    assert set(override) == {name for name in services if name.startswith("relay")}
    assert all(each["volumes"] == [f"./ca.pem:{CA_FILE}:ro"] for each in override.values())


def test_the_relay_accepts_the_address_of_the_broker(tmp_path: Path) -> None:
    variables = dotenv_values(stream=StringIO(FILES[".env"]))
    (address,) = variables.values()
    assert address is not None
    make_pair().write_to(tmp_path)
    here = {name: address.replace(CA_FILE, str(tmp_path / "cert.pem")) for name in variables}
    assert CA_FILE in address
    done = run_command("check", directory=tmp_path, env=here)
    assert (done.exit_code, done.faults) == (0, [])
    assert ":password@" not in done.stdout
