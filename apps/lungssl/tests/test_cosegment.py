"""`lungssl finetune cosegment` on made lesions: trained, scored, from a file of diameters; what it refuses."""

import csv
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from lungssl.cli import main
from lungssl.cohort import CohortConfig
from lungssl.config import load_recipe
from lungssl.finetuning import Labels
from lungssl.finetuning_cosegment import build, judged_lesions
from lungssl.lesion_scoring import score_masks, summary
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.cache_index import FORMAT_VERSION
from lungssl_data.pair import PhasePair, PhaseScan, Split
from lungssl_data.phantom.config import PHANTOM_VERSION
from lungssl_tasks.cosegmentation.diameters import Diameters, lesions_of
from lungssl_tasks.cosegmentation.diameters_file import write_diameters

SMALL = [
    *("backbone.widths=[8,16,16]", "backbone.depths=[1,1,1]", "task.model.segment.base_width=4"),
    *("task.model.segment.max_width=8", "task.side_vox=16", "train.steps=2", "train.eval_every=2"),
]


def scan_of(seed: int) -> PhaseScan:
    apart = np.indices((22, 23, 24)) - np.array([10, 11, 12 + seed % 2]).reshape(3, 1, 1, 1)
    lesion = ((apart**2).sum(axis=0) <= 10).astype(np.uint8)
    hu = np.random.default_rng(seed).normal(np.where(lesion > 0, -100, -850), 30.0)
    return PhaseScan(
        ct_hu=hu.astype(np.int16),
        valid=np.ones(lesion.shape, np.uint8),
        lung=np.ones(lesion.shape, np.uint8),
        lesion=lesion,
        spacing_mm=(4.0, 4.0, 4.0),
        origin_mm=(0.0, 0.0, 0.0),
    )


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lesions")
    splits: tuple[tuple[int, Split], ...] = ((1, "train"), (2, "train"), (3, "val"))
    for seed, split in splits:
        write_pair(pair_of(seed, split, scan_of(seed), scan_of(seed + 1)), folder)
    for seed in (4, 5, 6):  # somebody looked, and there is none
        healthy = dataclasses.replace(scan_of(seed), lesion=np.zeros((22, 23, 24), np.uint8))
        write_pair(pair_of(seed, "train", healthy, healthy), folder)
    return folder


def pair_of(seed: int, split: Split, exhale: PhaseScan, inhale: PhaseScan) -> PhasePair:
    return PhasePair(
        patient=f"p{seed}",
        exhale=exhale,
        inhale=inhale,
        split=split,
        exhale_to_inhale=np.eye(3, 4),
        affine_provenance="none",
    )


def lesion_of(seed: int) -> Diameters:
    scan = scan_of(seed)
    assert scan.lesion is not None
    return lesions_of(scan.lesion)[0].diameters(scan.geometry())


def test_lesions_are_learnt_from_diameters_and_scored(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "cosegment", "--data", str(cohort), *SMALL]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "2 pairs; resenc_tiny from random weights" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["lesions"]) == {"exhale", "inhale"} and summary["patients"] == ["p1", "p2"]
    assert summary["lesions"]["exhale"]["pseudo_dice"] > 0.9 and 0 <= summary["lesions"]["inhale"]["dice"] < 1
    assert 0 <= summary["val"]["truth_dice"] <= 1 and (tmp_path / "run" / "export" / "model" / "model.json").is_file()

    scores = tmp_path / "scores"
    evaluate = ["evaluate", "--model", str(tmp_path / "run"), "--data", str(cohort), "--out", str(scores)]
    assert main([*evaluate, "--split", "val"]) == 0
    assert json.loads((scores / "summary.json").read_text()) == summary["lesions"]
    rows = list(csv.DictReader((scores / "scores.csv").read_text().splitlines()))
    assert [(row["patient"], row["phase"]) for row in rows] == [("p3", "exhale"), ("p3", "inhale")]
    assert capsys.readouterr().out == (scores / "table.txt").read_text()
    assert main([*evaluate, "--overwrite"]) == 3
    assert "split 'test': no patient with both phases has a lesion" in capsys.readouterr().err


def test_a_file_of_diameters_is_looked_at_fingerprinted_and_judged_by_masks(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "cosegment", "--data", str(cohort), *SMALL]
    path = tmp_path / "d.csv"
    with_file = [*command, "--out", str(tmp_path / "run"), "--diameters", str(path)]
    write_diameters(path, {("p1", "exhale"): [lesion_of(1)], ("p3", "exhale"): [lesion_of(3)]})
    assert main(with_file) == 0
    said = capsys.readouterr().err
    assert "labels of lesions: 1/1" in said and "1 pairs; resenc_tiny" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["diameters_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert summary["lesions"]["exhale"]["lesions"] == 1 and summary["lesions"]["exhale"]["pseudo_dice"] > 0.9
    assert summary["lesions"]["inhale"]["lesions"] == 0  # not in the file: who knows which of the mask's it is
    path.write_text(path.read_text() + "\n")
    assert main([*with_file, "--resume"]) == 2
    assert "start anew with --overwrite" in capsys.readouterr().err

    write_diameters(path, {("p1", "exhale"): [lesion_of(1)]})
    parts = build(load_recipe("finetune/cosegment", SMALL), cohort, encoder=None, labels=Labels(), diameters=path)
    assert [pair.patient for pair in parts.held_out] == ["p3"]  # by its masks, which nobody had to measure
    mirrored = dataclasses.replace(
        lesion_of(1), long_mm=lesion_of(1).long_mm * (-1, -1, 1), short_mm=lesion_of(1).short_mm * (-1, -1, 1)
    )
    for lesions, message in (
        ({("p1", "exhale"): [mirrored]}, "d.csv, line 2: end"),
        ({("p1", "exhale"): [mirrored]}, "(as RAS it would lie inside); give x, y, z in LPS mm"),
        ({("Jane Doe", "exhale"): [lesion_of(1)]}, "d.csv, line 2: its patient isn't among the 6 in"),
    ):
        write_diameters(path, lesions)
        assert main(with_file) == 3
        assert message in (said := capsys.readouterr().err) and "Jane" not in said


def test_patients_are_drawn_among_those_with_lesions(cohort: Path) -> None:
    recipe = load_recipe("finetune/cosegment", SMALL)
    for draw in range(4):
        drawn = build(recipe, cohort, encoder=None, labels=Labels(patients=1, draw=draw)).pairs.patients
        assert set(drawn) < {"p1", "p2"} and len(drawn) == 1
    with pytest.raises(ValueError, match="cannot draw 3 patients from 2"):
        build(recipe, cohort, encoder=None, labels=Labels(patients=3))


def test_judged_lesions_are_off_the_middle_always_alike_and_no_ball_finds_them(cohort: Path) -> None:
    cache = PairCache(cohort)
    ball = ((np.indices((16, 16, 16)) - 8) ** 2).sum(axis=0) <= 10
    dice = {
        shift: summary(score_masks(lambda _: (ball, ball), judged_lesions(cache, "all", side_vox=16, shift_vox=shift)))
        for shift in (0, None)
    }
    assert dice[0]["exhale"]["dice"] > 0.9 and dice[None]["exhale"]["dice"] < 0.6
    one, again = (judged_lesions(cache, "all", side_vox=16) for _ in range(2))
    assert all(bool((a.exhale_hu == b.exhale_hu).all()) for a, b in zip(one, again, strict=True))


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["task.side_vox=18"], 2, "side_vox 18 must be a multiple of the token stride, 4"),
        (["views.global_vox=40"], 2, "views: task cosegment cuts its own crops; leave this section out"),
        (["--diameters", "nowhere.csv"], 3, "--diameters: "),
        (["task.supervision=boxes"], 2, "task.supervision: Input should be 'diameters' or 'masks'"),
    ],
)
def test_what_does_not_fit_is_said(
    cohort: Path, extra: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "cosegment", "--data", str(cohort), "--dry-run", *SMALL, *extra]) == code
    assert message in capsys.readouterr().err


def test_cohorts_without_lesions_keep_their_names() -> None:
    """A new name would make everybody's phantoms again: what is None is not part of it."""
    plain, ill, ventilated = CohortConfig(), CohortConfig(pathology=("consolidation",)), CohortConfig(preset="ards")
    assert len({plain.name(), ill.name(), ventilated.name()}) == 3
    fields = {"patients": 16, "spacing_mm": 5.0, "texture_rho": 0.5, "seed": 0, "motion": "charts"}
    text = json.dumps([FORMAT_VERSION, PHANTOM_VERSION, fields], sort_keys=True)
    assert plain.name() == f"phantoms-16x5mm-{hashlib.sha256(text.encode()).hexdigest()[:8]}" != ill.name()
