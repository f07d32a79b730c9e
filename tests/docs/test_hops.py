"""The page about the architecture lists the functions that messages and requests pass through."""

from pathlib import Path

from tests.support import hops


async def test_the_page_lists_every_hop_of_a_message_a_request_and_a_drain(tmp_path: Path) -> None:
    recorded = await hops.record_all(tmp_path)
    assert hops.listed() == recorded, "run python -m tests.support.hops --write"
