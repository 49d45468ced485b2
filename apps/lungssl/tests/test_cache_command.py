import json
import shutil
from pathlib import Path

import pytest
from lungssl.cli import main
from lungssl_data.phantom import PhantomConfig, make_phantom, write_phantom


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for seed in range(2):
        write_phantom(make_phantom(PhantomConfig(preset="deep", seed=seed, spacing_mm=8.0)), root / f"p{seed}")
    return root


def test_a_dry_run_lists_what_would_be_read_and_writes_nothing(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "build", str(phantoms), "--out", str(tmp_path / "cache"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "p0: exhale" in text and "inhale" in text and "with lung" in text and "a displacement" in text
    assert "2 of 2 patients would be built" in text
    assert not list(tmp_path.iterdir())


def test_shards_build_each_patient_once_and_report_it(phantoms: Path, tmp_path: Path) -> None:
    built = []
    for part in ("1/3", "2/3", "3/3"):
        arguments = ["cache", "build", str(phantoms), "--out", str(tmp_path), "--spacing-mm", "8", "--shard", part]
        assert main(arguments) == 0
        built.append({path.stem for path in tmp_path.glob("*.h5")})
    assert built[0] <= built[1] < built[2] or built[0] < built[1] <= built[2]
    assert len(built[2]) == 2
    lines = [json.loads(line) for line in (tmp_path / "build.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted((line["patient"], line["outcome"]) for line in lines) == [("p0", "built"), ("p1", "built")]
    assert main(["cache", "verify", str(tmp_path)]) == 0


def test_patients_whom_the_source_no_longer_has_are_named(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(phantoms, tmp_path / "raw")
    arguments = ["cache", "build", str(tmp_path / "raw"), "--out", str(tmp_path / "cache"), "--spacing-mm", "8"]
    assert main(arguments) == 0
    assert "earlier builds" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "raw" / "p0")
    assert main(arguments) == 0
    texts = capsys.readouterr()
    assert "1 patients of earlier builds, whom raw does not have, stay" in texts.err and ": p0; delete" in texts.err
    assert texts.out.startswith("1 patients in")


def test_swapped_phases_are_bad_data_unless_told_otherwise(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, phase in (("exhale", "inhale"), ("inhale", "exhale")):
        (tmp_path / "raw" / "p1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / "p1" / f"{name}.nii.gz").symlink_to(phantoms / "p0" / f"{phase}.nii.gz")
    arguments = ["cache", "build", str(tmp_path / "raw"), "--out", str(tmp_path / "cache"), "--spacing-mm", "8"]
    assert main(arguments) == 3
    assert "exchange the phases" in capsys.readouterr().err
    assert main([*arguments, "--phase-check", "warn"]) == 0
    assert "WARNING: inhale holds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "3/2"], "--shard 3/2: expected i/n with i from 1 to n"),
        (["--shard", "one"], "--shard one: expected i/n"),
        (["--jobs", "0"], "--jobs 0: expected a number from 1 to 1,024"),
        (["--time-limit-s", "-1"], "--time-limit-s -1: expected a number from 0 to 10,000,000"),
        (["--time-limit-s", "nan"], "--time-limit-s nan: expected a number from 0 to 10,000,000"),
        (["--time-limit-s", "inf"], "--time-limit-s inf: expected"),
        (["--margin-mm", "nan"], "--margin-mm nan: expected a number from 0 to 500"),
        (["--margin-mm", "inf"], "--margin-mm inf: expected"),
        (["--margin-mm", "-0.5"], "--margin-mm -0.5: expected"),
        (["--memory-gib", "nan"], "--memory-gib nan: expected a number from 0 to 1,000,000"),
        (["--memory-gib", "-inf"], "--memory-gib -inf: expected"),
        (["--spacing-mm", "nan"], "--spacing-mm nan: expected a number from 0.3 to 20"),
        (["--spacing-mm", "-2"], "--spacing-mm -2: expected"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    options: list[str], message: str, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "build", str(phantoms), "--out", str(tmp_path / "cache"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_keyed_ids_are_the_same_on_every_run_and_say_nothing(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "id.key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    monkeypatch.setenv("LUNGSSL_ID_KEY_FILE", str(key))
    listed = []
    for _ in range(2):
        arguments = ["cache", "build", str(phantoms), "--out", str(tmp_path / "cache"), "--dry-run", "--keyed-ids"]
        assert main(arguments) == 0
        listed.append([line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:2]])
    assert listed[0] == listed[1] and len(set(listed[0])) == 2
    assert not {"p0", "p1"} & set(listed[0])
