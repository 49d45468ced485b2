"""`lungssl finetune joint`: trained on phantoms, scored, and what it refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from lungssl import registering
from lungssl.cli import main
from lungssl.cohort import pair_from_phantom
from lungssl_data.cache import write_pair
from lungssl_data.field import read_field
from lungssl_data.pair import Split
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.readers import read_labels, write_labels, write_volume
from lungssl_data.volume import LabelMap
from lungssl_tasks.aeration.parts import LOBE_NAMES
from lungssl_tasks.metrics import segmentation_scores
from lungssl_tasks.registration import RegistrationConfig
from lungssl_tasks.registration.descent import DescentConfig

SMALL = [
    "backbone.widths=[8,16,16]",
    "backbone.depths=[1,1,1]",
    *(f"task.model.register.{value}" for value in ("width=8", "groups=2")),
    *(f"task.model.segment.{value}" for value in ("base_width=4", "max_width=8", "groups=2")),
    *("train.steps=3", "train.eval_every=3", "train.lr=3e-3"),
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    splits: tuple[tuple[int, Split], ...] = ((1, "train"), (2, "train"), (3, "val"))
    for seed, split in splits:
        phantom = make_phantom(PhantomConfig(preset="deep", seed=seed, spacing_mm=8.0, trees=False))
        write_pair(pair_from_phantom(phantom, f"p{seed}", split), folder)
    return folder


def test_a_joint_model_is_trained_scored_and_registers(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    eight_mm = RegistrationConfig(spacing_mm=8.0, descent=DescentConfig(levels=()))
    monkeypatch.setitem(registering.PRESETS, "coarse", eight_mm)
    command = ["finetune", "joint", "--data", str(cohort), "--labels", "1", *SMALL]
    run = tmp_path / "run"
    assert main([*command, "--out", str(run), "task.weighting=homoscedastic"]) == 0
    assert "2 pairs, 1 of them labelled; resenc_tiny from random weights" in capsys.readouterr().err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["patients"] == ["p1", "p2"] and len(summary["labelled_patients"]) == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [set(line) & {"labels", "warped_dice", "field"} for line in lines if "loss" in line]
    assert {"field"} in held and {"labels", "warped_dice", "field"} in held  # a pair of the one kind and of the other
    stitches = summary["cross_stitch"]
    assert list(stitches) == ["encoder_1", "encoder_2", "decoder_2"] and stitches["decoder_2"]["channels"] == 8
    assert np.shape(stitches["encoder_1"]["mean"]) == (2, 2) and stitches["encoder_1"]["mean"] != [[0.9, 0.1]] * 2
    whole = summary["whole_pairs"]
    assert 0 < summary["val"]["error_mm"] < 60 and summary["val"]["weight_field"] != 1
    assert 0.2 < whole["warped"]["all"]["dice"]["mean"] < 1 and whole["registration"]["phantom (exact)"]["mean_mm"] > 0

    scores = tmp_path / "scores"
    evaluate = ["evaluate", "--model", str(run), "--data", str(cohort), "--split", "val", "--out", str(scores)]
    assert main(evaluate) == 0
    printed = capsys.readouterr().out
    assert "warped lobes on exhale" in printed and "r from s" in printed
    held = json.loads((scores / "summary.json").read_text())
    assert held["warped"] == whole["warped"] and held["predicted"] == whole["predicted"]
    assert held["cross_stitch"] == stitches
    assert main([*evaluate, "--raw", "--overwrite"]) == 0
    with_islands = json.loads((scores / "summary.json").read_text())
    assert with_islands["warped"] == held["warped"] and with_islands["predicted"] != held["predicted"]
    capsys.readouterr()
    rows = list(csv.DictReader((scores / "warped" / "scores.csv").read_text().splitlines()))
    assert [(row["patient"], row["phase"], row["name"]) for row in rows][:2] == [
        ("p3", "exhale", "RUL"),
        ("p3", "exhale", "RML"),
    ]
    assert (scores / "registration" / "scores.csv").is_file()

    phantom = make_phantom(PhantomConfig(preset="deep", seed=3, spacing_mm=8.0, trees=False))
    files = []
    for phase, role in (("exhale", "fixed"), ("inhale", "moving")):
        source = getattr(phantom, phase)
        write_volume(tmp_path / f"{phase}.nii.gz", source.ct)
        mask = LabelMap(labels=source.lung, geometry=source.ct.geometry)
        write_labels(tmp_path / f"{phase}_lung.nii.gz", mask)
        files += [f"--{role}", str(tmp_path / f"{phase}.nii.gz")]
        files += [f"--{role}-mask", str(tmp_path / f"{phase}_lung.nii.gz")]
    fields = []
    for name, model in (("joint", ["--model", str(run)]), ("search", [])):
        files_out = ["-o", str(tmp_path / f"{name}.mha"), "--preset", "coarse"]
        asked = ["--lobes", str(tmp_path / f"{name}_lobes.nii.gz")] if model else []
        assert main(["register", *files, *files_out, *model, *asked]) == 0
        assert ("network after" in capsys.readouterr().out) == (name == "joint")
        fields.append(read_field(tmp_path / f"{name}.mha")[0])
    assert (fields[0] != fields[1]).any()
    found = read_labels(tmp_path / "joint_lobes.nii.gz")
    assert np.allclose(found.geometry.index_to_mm(), phantom.exhale.ct.geometry.index_to_mm())
    alone = segmentation_scores(found.labels, phantom.exhale.lobes, spacing_mm=(8.0,) * 3, labels=LOBE_NAMES)
    predicted = whole["predicted"]["all"]["dice"]["mean"]  # of the same patient in the cache
    assert np.mean([one.dice for one in alone]) == pytest.approx(predicted, abs=0.02)
    asked = ["-o", str(tmp_path / "again.mha"), "--lobes", str(tmp_path / "x.nii.gz")]
    assert main(["register", *files, *asked]) == 2
    assert "--lobes needs --model RUN of `finetune joint`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["task.model.segment.max_width=16", "task.model.segment.base_width=16"], "needs decoders of one width"),
        (["backbone.name=vit3d_nano"], "stage by stage, which vit3d_nano doesn't offer"),
        (["data.labels=lobes"], "data: task joint sees whole pairs; leave this section out"),
        (["task.weighting=gradnorm"], "task.weighting: Input should be 'equal', 'homoscedastic' or 'dwa'"),
    ],
)
def test_what_does_not_fit_is_said(
    cohort: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [value for value in SMALL if "name=vit" not in "".join(extra) or not value.startswith("backbone")]
    command = ["finetune", "joint", "--data", str(cohort), "--dry-run", *small]
    assert main([*command, *extra]) == 2
    assert message in capsys.readouterr().err
