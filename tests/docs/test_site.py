"""The pages of docs/ build as a site, with no broken link and no page left out."""

from pathlib import Path

from tests.support.relay_process import ROOT, run_python


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = run_python(
        *("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)),
        directory=ROOT,
        env={"NO_MKDOCS_2_WARNING": "1"},
    )
    # With --quiet MkDocs counts no warnings, so --strict would never fail.
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "index.html").exists()
