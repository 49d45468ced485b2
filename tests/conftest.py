"""One tiny phantom cohort for all end-to-end tests: made once, through the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lungssl.cli import main


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms as plain files: two deep, two ards."""
    root = tmp_path_factory.mktemp("phantoms")
    for preset in ("deep", "ards"):
        arguments = [
            "phantom",
            "--out",
            str(root),
            "--count",
            "2",
            "--preset",
            preset,
            "--spacing-mm",
            "8",
            "--overwrite",
        ]
        assert main(arguments) == 0
    return root


@pytest.fixture(scope="session")
def cache(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their pair cache at 8 mm."""
    folder = tmp_path_factory.mktemp("cache") / "cohort"
    assert main(["cache", "build", str(phantoms), "--out", str(folder), "--spacing-mm", "8"]) == 0
    return folder


@pytest.fixture
def lungssl(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
