"""`lungssl finetune segment` learns any label set of a cache: lungs and lesions beside lobes."""

import json
from pathlib import Path

import pytest
from lungssl.cli import main
from lungssl.cohort import pair_from_phantom
from lungssl.errors import ConfigError
from lungssl.structures import STRUCTURES, labels_named
from lungssl_data.cache import write_pair
from lungssl_data.pair import Split
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.readers import write_volume

SMALL = [
    *("backbone.widths=[8,16,16]", "backbone.depths=[1,1,1]", "task.decoder={base_width: 4, max_width: 8}"),
    *("train.steps=2", "train.eval_every=2", "data.crop_vox=[32,32,32]", "views.global_vox=24"),
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    splits: tuple[tuple[int, Split], ...] = ((1, "train"), (2, "val"))
    for seed, split in splits:
        phantom = make_phantom(PhantomConfig(seed=seed, spacing_mm=8.0, pathology=("consolidation",)))
        write_pair(pair_from_phantom(phantom, f"p{seed}", split, lesions=True, vessels=True), folder)
    write_volume(folder / "ct.nii.gz", phantom.exhale.ct)
    return folder


@pytest.mark.parametrize("labels", ["lung", "lesion", "vessels"])
def test_a_label_set_is_learned_scored_and_segmented(
    labels: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, names = tmp_path / "run", list(STRUCTURES[labels].names.values())
    command = ["finetune", "segment", "--data", str(cohort), "--out", str(run), f"data.labels={labels}", *SMALL]
    assert main(command) == 0
    said = capsys.readouterr()
    assert ("place tells lobes and sides apart" in said.err) == (labels == "lung")  # 192 mm
    scores = tmp_path / "scores"
    assert main(["evaluate", "--model", str(run), "--data", str(cohort), "--split", "val", "--out", str(scores)]) == 0
    held = json.loads((scores / "summary.json").read_text())
    assert held["patients"] == 1 and held["scans"] == 2 and set(names) < set(held)
    table = (scores / "table.txt").read_text().splitlines()
    assert len({len(line) for line in table[1:]}) == 1 and names[0] in table[3]
    assert f"NSD {3 if labels == 'lesion' else 1} mm" in table[1]
    report = tmp_path / "ct.json"
    files = [str(cohort / "ct.nii.gz"), "-o", str(tmp_path / "mask.nii.gz"), "--report", str(report)]
    assert main(["segment", *files, "--model", str(run)]) == 0
    assert list(json.loads(report.read_text())["volumes_ml"]) == names


def test_label_sets_that_no_cache_has_are_refused(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", "segment", "--data", str(cohort), "--dry-run", "data.labels=lesions"]
    assert main(command) == 2
    assert (
        "data.labels: 'lesions' is not one of lobes, lung, vessels, lesion; did you mean 'lesion'?"
        in capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match="the model labels liver, which no cache holds"):
        labels_named({1: "liver"})
