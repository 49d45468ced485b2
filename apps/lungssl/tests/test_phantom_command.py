"""`lungssl phantom` from its command line to the layouts that read what it wrote."""

from pathlib import Path

import pytest
from lungssl.cli import main
from lungssl_data.layouts import recognised

QUICK = ("--spacing-mm", "8")


@pytest.mark.parametrize("layout", ["popi", "dirlab-copd"])
def test_a_collections_copy_can_be_built_with_auto(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"
    assert main(["phantom", "--out", str(out), "--count", "2", "--layout", layout, *QUICK]) == 0
    assert f"2 phantoms as {layout}" in capsys.readouterr().err
    assert recognised(out) == layout
    assert main(["cache", "build", str(out), "--out", str(tmp_path / "cache"), *QUICK]) == 0
    assert "expert landmarks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "dirlab"), "--layout dirlab: there is no copy of it; known are folder, manifest"),
        (("--layout", "dirlab-copd", "--count", "11"), "--count 11: 11 phantoms for a copy of at most 10 patients"),
    ],
)
def test_what_cannot_be_made_is_refused(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["phantom", "--out", str(tmp_path / "copy"), *options, *QUICK]) == 2
    assert message in capsys.readouterr().err
