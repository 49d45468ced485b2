"""The whole way as a user walks it: phantom files, cache, pretraining, fine-tuning, evaluation, masks."""

import csv
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lungssl_data.cache import PairCache
from lungssl_data.readers import read_labels, read_volume, write_volume
from safetensors.numpy import load_file

Run = Callable[..., tuple[int, str, str]]
TINY = (
    "data.crop_vox=[32,32,32]",
    "views.global_vox=16",
    "train.batch=2",
    "train.eval_batches=1",
    "train.eval_every=4",
    "train.log_every=1",
)
DINO = (*TINY, "views.local_vox=8", "method.prototypes=64", "method.head_hidden=32", "method.head_bottleneck=16")
SEGMENT = ("data.crop_vox=[32,32,32]", "views.global_vox=32", "train.batch=2", "train.eval_batches=1")


@pytest.fixture(scope="module")
def encoder(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lungssl.cli import main

    run = tmp_path_factory.mktemp("pretrain") / "run"
    arguments = ["pretrain", "dino_resenc_tiny", "--data", str(cache), "--out", str(run), "train.steps=4", *DINO]
    assert main(arguments) == 0
    return run


@pytest.fixture(scope="module")
def model(cache: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lungssl.cli import main

    run = tmp_path_factory.mktemp("finetune") / "run"
    arguments = ["finetune", "segment", "--encoder", str(encoder), "--data", str(cache), "--out", str(run)]
    assert main([*arguments, "--labels", "1", "train.steps=3", *SEGMENT]) == 0
    return run


def test_the_cache_holds_every_phantom_with_its_exact_motion(cache: Path, lungssl: Run) -> None:
    code, out, _ = lungssl("cache", "info", cache)
    assert code == 0 and "4 patients (4 with both phases)" in out
    assert lungssl("cache", "verify", cache)[0] == 0
    opened = PairCache(cache)
    for patient in opened.patients:
        pair = opened[patient]
        assert pair.displacement is not None and pair.scan("exhale").lobes is not None
        volumes = [opened.phase_record(patient, phase).lung_ml for phase in ("exhale", "inhale")]
        assert volumes[0] < volumes[1]


def test_pretraining_leaves_what_the_guide_promises(encoder: Path) -> None:
    for name in ("config.yaml", "env.json", "train.log", "metrics.jsonl", "summary.json", "export/encoder.safetensors"):
        assert (encoder / name).is_file(), name
    assert any((encoder / "tb").iterdir()) and any((encoder / "checkpoints").iterdir())
    lines = [json.loads(line) for line in (encoder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss_lnk" in line] == [1, 2, 3, 4]
    assert any("val/teacher_entropy_lnk" in line for line in lines)


@pytest.mark.parametrize(
    ("phases", "pairs"), [("exhale", "all"), ("inhale", "all"), ("both", "within"), ("both", "cross"), ("both", "all")]
)
def test_one_phase_and_both_run_with_the_same_number_of_views(
    cache: Path, lungssl: Run, phases: str, pairs: str
) -> None:
    code, out, err = lungssl(
        "pretrain",
        "dino_resenc_tiny",
        "--data",
        cache,
        "--dry-run",
        *DINO,
        f"data.phases={phases}",
        f"method.pairs={pairs}",
    )
    assert code == 0, err
    assert "nothing was written" in out


def test_a_used_run_folder_is_refused_with_the_ways_forward(cache: Path, encoder: Path, lungssl: Run) -> None:
    code, _, err = lungssl("pretrain", "dino_resenc_tiny", "--data", cache, "--out", encoder, *DINO)
    assert code == 2 and "--resume" in err and "--overwrite" in err


def test_the_finetuned_model_scores_and_segments(
    cache: Path, phantoms: Path, model: Path, tmp_path: Path, lungssl: Run
) -> None:
    summary = json.loads((model / "summary.json").read_text(encoding="utf-8"))
    assert len(summary["labelled_patients"]) == 1 and 0 <= summary["train_dice"] <= 1
    code, out, err = lungssl(
        "evaluate", "--model", model, "--data", cache, "--split", "all", "--out", tmp_path / "scores"
    )
    assert code == 0, err
    assert "mean ± standard deviation over patients" in out
    with open(tmp_path / "scores" / "scores.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 4 * 2 * 5
    image = phantoms / "deep000" / "inhale.nii.gz"
    mask = tmp_path / "lobes.nii.gz"
    code, out, err = lungssl("segment", image, "-o", mask, "--model", model)
    assert code == 0, err
    assert "RUL" in out
    assert read_labels(mask).geometry.same_grid(read_volume(image).geometry, tolerance_mm=1e-4)


def test_without_a_model_segment_writes_the_lungs(phantoms: Path, tmp_path: Path, lungssl: Run) -> None:
    image = phantoms / "deep000" / "exhale.nii.gz"
    code, out, err = lungssl("segment", image, "-o", tmp_path / "lungs.mha")
    assert code == 0, err
    assert "right lung" in out
    mask = read_labels(tmp_path / "lungs.mha")
    truth = read_labels(phantoms / "deep000" / "exhale_lung.nii.gz")
    for side in (1, 2):
        ours, theirs = mask.labels == side, truth.labels == side
        assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.9


def test_a_mask_of_implausible_volume_is_not_written(phantoms: Path, tmp_path: Path, lungssl: Run) -> None:
    volume = read_volume(phantoms / "deep000" / "inhale.nii.gz")
    giant = dataclasses.replace(volume.geometry, spacing_mm=(14.0, 14.0, 14.0))
    write_volume(tmp_path / "giant.nii.gz", dataclasses.replace(volume, geometry=giant))
    code, _, err = lungssl("segment", tmp_path / "giant.nii.gz", "-o", tmp_path / "mask.nii.gz")
    assert code == 3 and "ml" in err and err.count("\n") == 1
    assert not (tmp_path / "mask.nii.gz").exists()


def test_a_run_killed_in_the_middle_resumes_bit_for_bit(cache: Path, tmp_path: Path, lungssl: Run) -> None:
    options = ("--data", str(cache), *DINO, "train.steps=12", "train.checkpoint_every=2", "train.eval_every=100")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert lungssl("pretrain", "dino_resenc_tiny", "--out", whole, *options)[0] == 0
    # Sums over other numbers of threads differ in their last bits: the child gets this process's.
    start = (
        f"import sys, torch; torch.set_num_threads({torch.get_num_threads()}); "
        "from lungssl.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", start, "pretrain", "dino_resenc_tiny", "--out", str(killed), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step_4").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "export" / "encoder.safetensors").exists()
    code, _, err = lungssl("pretrain", "dino_resenc_tiny", "--out", killed, *options, "--resume")
    assert code == 0, err
    assert "resuming after step" in err
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(run / "checkpoints" / "step_12" / file) for run in (whole, killed))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for run in (whole, killed)
    ]
    for log in logs:
        for line in log:
            line.pop("timing", None)
    assert logs[0] == logs[1]


def test_weights_for_another_voxel_size_are_refused(
    cache: Path, phantoms: Path, encoder: Path, model: Path, tmp_path: Path, lungssl: Run
) -> None:
    other = tmp_path / "other"
    assert lungssl("cache", "build", phantoms, "--out", other, "--spacing-mm", "9")[0] == 0
    code, _, err = lungssl("finetune", "segment", "--encoder", encoder, "--data", other, "--dry-run", *SEGMENT)
    assert code == 2 and "is for voxels of 8 mm" in err and "--spacing-mm 8" in err
    code, _, err = lungssl("evaluate", "--model", model, "--data", other, "--out", tmp_path / "scores")
    assert code == 2 and "has 9 mm" in err


def test_held_out_patients_without_the_phase_do_not_stop_a_run(phantoms: Path, tmp_path: Path, lungssl: Run) -> None:
    manifest = tmp_path / "cohort.csv"
    lines = [f"a,exhale,{phantoms}/deep000/exhale.nii.gz,train", f"b,inhale,{phantoms}/deep001/inhale.nii.gz,val"]
    manifest.write_text("\n".join(["patient_id,phase,image,split", *lines]))
    assert lungssl("cache", "build", manifest, "--out", tmp_path / "cache", "--spacing-mm", "8")[0] == 0
    code, out, err = lungssl(
        "pretrain", "dino_resenc_tiny", "--data", tmp_path / "cache", "--dry-run", *DINO, "data.phases=exhale"
    )
    assert code == 0, err
    assert "1 held out (train)" in out


def test_scores_of_one_patient_are_valid_json(cache: Path, model: Path, tmp_path: Path, lungssl: Run) -> None:
    one = tmp_path / "one"
    one.mkdir()
    patient = PairCache(cache).patients[0]
    (one / f"{patient}.h5").write_bytes((cache / f"{patient}.h5").read_bytes())
    code, out, err = lungssl(
        "evaluate", "--model", model, "--data", one, "--split", "all", "--out", tmp_path / "scores"
    )
    assert code == 0, err
    assert "nan" not in out

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = (tmp_path / "scores" / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse)["all"]["dice"]["sd"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pretrain", "dino_vit_nan", "--out", "x"), 2, "did you mean 'dino_vit_nano'"),
        (("pretrain", "dino_vit_nano", "--out", "x", "backbone.pach_vox=8"), 2, "did you mean 'patch_vox'"),
        (("pretrain", "dino_vit_nano", "--data", "nowhere", "--out", "x"), 3, "no such cache folder"),
        (("segment", "nowhere.nii.gz", "-o", "x.nii.gz"), 3, "no such file"),
        (("evaluate", "--model", "nowhere", "--out", "x"), 2, "model"),
        (("finetune", "segment", "--encoder", "nowhere", "--out", "x"), 2, "no weights at"),
    ],
)
def test_mistakes_get_one_clear_line_and_the_right_exit_code(
    lungssl: Run, arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, err = lungssl(*arguments)
    assert found == code, err
    assert message in err and err.count("\n") == 1 and err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_scan_and_a_missing_phase_are_data_errors(phantoms: Path, tmp_path: Path, lungssl: Run) -> None:
    bad = tmp_path / "scan.nii.gz"
    bad.write_bytes((phantoms / "deep000" / "exhale.nii.gz").read_bytes()[:2000])
    code, _, err = lungssl("segment", bad, "-o", tmp_path / "mask.nii.gz")
    assert code == 3 and "scan.nii.gz" in err and err.count("\n") == 1
    (tmp_path / "raw" / "p1").mkdir(parents=True)
    (tmp_path / "raw" / "p1" / "inhale.nii.gz").symlink_to(phantoms / "deep000" / "inhale.nii.gz")
    cache = tmp_path / "cache"
    assert lungssl("cache", "build", tmp_path / "raw", "--out", cache, "--spacing-mm", "8")[0] == 0
    code, _, err = lungssl("pretrain", "dino_resenc_tiny", "--data", cache, "--dry-run", *DINO, "data.phases=exhale")
    assert code == 3 and "exhale" in err and err.count("\n") == 1


def test_a_damaged_patient_is_found_by_verify(cache: Path, tmp_path: Path, lungssl: Run) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    source = next(cache.glob("*.h5"))
    data = bytearray(source.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    (copy / source.name).write_bytes(data)
    code, _, err = lungssl("cache", "verify", copy)
    assert code == 3 and source.stem in err
