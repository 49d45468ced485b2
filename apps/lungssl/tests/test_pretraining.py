import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lungssl.cli import main
from lungssl.config import Recipe, load_recipe
from lungssl.errors import ConfigError, DataError
from lungssl.pretraining import Pretraining, alarm_bounds, build_pretraining, judge, pretrain
from lungssl.replaying import replay
from lungssl.training.logs import read_metrics
from lungssl.training.watch import NotFiniteError
from lungssl_backbones.weights import load_encoder
from lungssl_data.batch import CropBatch, PairBatch
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.pair import Displacement, PhasePair, PhaseScan
from lungssl_methods import METHODS
from safetensors.torch import load_file

TINY = (
    "train.steps=6 train.batch=2 train.checkpoint_every=2 train.eval_every=2 train.eval_batches=1 train.log_every=1 "
    "data.crop_vox=[20,24,22] views.global_vox=16 views.local_vox=8 backbone.spacing_mm=9"
).split()
DINO = [*TINY, "method.prototypes=32", "method.head_hidden=16", "method.head_bottleneck=8"]
MAE = [*TINY, "method.decoder_width=24", "method.decoder_depth=1", "method.decoder_heads=2"]
RECIPES = {
    "dino_vit_nano": [*DINO, "backbone.dim=48"],
    "dino_resenc_tiny": DINO,
    "phase_dino_vit_nano": [*DINO, "backbone.dim=48"],
    "croco_vit_nano": [*MAE, "backbone.dim=48", "method.mask_unit_tokens=1", "views.global_vox=16"],
    "paired_dense_resenc_tiny": TINY,
    "mae_vit_nano": [*MAE, "backbone.dim=48", "method.mask_unit_tokens=1"],
    "mae_resenc_tiny": [*MAE, "method.mask_unit_tokens=1"],
    "spark_resenc_tiny": [*TINY, "method.decoder_width=16", "method.mask_unit_tokens=1"],
}


SWAPPED = {
    "simclr": ["method={name: simclr, hidden: 16, out: 8}"],
    "vicreg": ["method={name: vicreg, expander: [16, 16]}"],
    "simmim": ["method={name: simmim, mask_unit_tokens: 1}"],
    "jepa": [
        "method={name: jepa, predictor_width: 24, predictor_depth: 1, predictor_heads: 2}",
        "backbone.patch_vox=4",
    ],
    "phase_jepa": ["method={name: phase_jepa, predictor_width: 24, predictor_depth: 1, predictor_heads: 2}"],
    "vox2vec": ["method={name: vox2vec, points: 16, out: 8}", "views.globals_per_slot=2"],
}
"""Methods without a recipe of their own: another's, with one line swapped."""


def _recipe(name: str, *more: str) -> Recipe:
    if name in SWAPPED:
        return load_recipe("mae_vit_nano", [*TINY, "backbone.dim=48", *SWAPPED[name], *more])
    return load_recipe(name, [*RECIPES[name], *more])


def _still(scan: PhaseScan) -> Displacement:
    u_mm = np.zeros((3, *scan.ct_hu.shape), np.float32)
    return Displacement(u_mm=u_mm, spacing_mm=scan.spacing_mm, origin_mm=scan.origin_mm, provenance="test")


def _pair(patient: str, split: Any, spacing_mm: tuple[float, float, float], phases: tuple[str, ...]) -> PhasePair:
    rng = np.random.default_rng(sum(map(ord, patient)))
    scans = {}
    for phase, shape in (("exhale", (26, 30, 33)), ("inhale", (31, 30, 33))):
        z, y, x = np.indices(shape)
        lung = ((np.stack([z, y, x], -1) / shape - 0.5) ** 2).sum(-1) < 0.16
        hu = np.where(lung, -800 if phase == "inhale" else -650, 40) + rng.normal(0, 60, shape)
        scans[phase] = PhaseScan(
            ct_hu=hu.astype(np.int16),
            valid=np.ones(shape, np.uint8),
            lung=np.where(lung, 1 + (x > shape[2] // 2), 0).astype(np.uint8),
            spacing_mm=spacing_mm,
            origin_mm=(-40.0, 12.0, 5.0),
        )
    both = len(phases) == 2
    return PhasePair(
        patient=patient,
        **{phase: scans[phase] for phase in phases},
        exhale_to_inhale=np.eye(3, 4) if both else None,
        affine_provenance="test" if both else "",
        displacement=_still(scans["exhale"]) if both else None,
        split=split,
        key=f"key-{patient}",
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    for patient, split in (("a", "train"), ("b", "train"), ("c", "train"), ("d", "val")):
        phases = ("exhale",) if patient == "c" else ("exhale", "inhale")
        write_pair(_pair(patient, split, (3.0, 3.0, 3.0), phases), folder)
    PairCache(folder).close()  # writes its index, once
    return folder


@pytest.mark.parametrize("name", ["phase_dino_vit_nano", "paired_dense_resenc_tiny"])
def test_pairs_without_a_displacement_are_told_or_refused(name: str, tmp_path: Path) -> None:
    def built(displaced: tuple[str, ...], phases: tuple[str, ...], *more: str) -> Pretraining:
        folder = tmp_path / "-".join((*displaced, *phases, *more, "cache"))
        for patient in ("a", "b"):
            pair = _pair(patient, "train", (3.0, 3.0, 3.0), phases)
            write_pair(pair if patient in displaced else dataclasses.replace(pair, displacement=None), folder)
        return build_pretraining(_recipe(name, *more), folder)

    both = ("exhale", "inhale")
    with pytest.raises(
        DataError, match=r"none of the 2 training patients .* set data\.matched_by=affine .*, such as croco"
    ):
        built((), both)
    assert "WARNING: 1 of 2 pairs have no displacement" in "".join(built(("a",), both).reasons)
    assert "WARNING" not in "".join(built(("a", "b"), both).reasons)
    for more in ("data.matched_by=affine", "data.phases=exhale"):
        assert "WARNING" not in "".join(built((), both, more).reasons)
    assert "no training patient has both phases" in "".join(built((), ("exhale",)).reasons)


def test_a_teacher_that_matches_needs_no_displacement(tmp_path: Path) -> None:
    pair = dataclasses.replace(_pair("a", "train", (3.0, 3.0, 3.0), ("exhale", "inhale")), displacement=None)
    write_pair(pair, tmp_path / "cache")
    recipe = _recipe("paired_dense_resenc_tiny", "method.matched_by=teacher", "train.steps=1", "train.eval_every=1")
    assert pretrain(recipe, data=tmp_path / "cache", out=tmp_path / "run")["step"] == 1
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert kept["method"]["momentum"] == pytest.approx(0.95)  # found for the run's size


def _state(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{step}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def test_every_method_is_among_those_that_are_resumed() -> None:
    methods = [recipe.method.name for name in (*RECIPES, *SWAPPED) if (recipe := _recipe(name)).method is not None]
    assert set(methods) == set(METHODS)


@pytest.mark.parametrize("name", [*RECIPES, *SWAPPED])
def test_every_method_resumes_bit_exactly_after_sigterm(name: str, cache: Path, tmp_path: Path) -> None:
    pretrain(_recipe(name), data=cache, out=tmp_path / "whole")

    original = Pretraining.prepare

    def prepare(self: Pretraining, crops: CropBatch, index: int) -> Any:
        if index == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, crops, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "prepare", prepare)
        summary = pretrain(_recipe(name), data=cache, out=tmp_path / "parts")
    assert (summary["step"], summary["stopped_by"]) == (3, "SIGTERM")
    summary = pretrain(_recipe(name), data=cache, out=tmp_path / "parts", resume=True)
    assert (summary["step"], summary["stopped_by"]) == (6, None)
    whole, parts = _state(tmp_path / "whole", 6), _state(tmp_path / "parts", 6)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [
        [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("whole", "parts")
    ]
    assert lines[0] == lines[1]


def test_a_killed_command_resumes_bit_exactly(cache: Path, tmp_path: Path) -> None:
    arguments = ["pretrain", "dino_vit_nano", "--data", str(cache), *RECIPES["dino_vit_nano"]]
    code = (
        "import os, signal, sys, torch\nfrom lungssl.pretraining import Pretraining\nfrom lungssl.cli import main\n"
        "torch.set_num_threads(1)\n"
        "original = Pretraining.prepare\n"
        "def prepare(self, crops, index):\n"
        "    if index == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, crops, index)\n"
        "Pretraining.prepare = prepare\n"
        "main(sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "a")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "a/checkpoints").iterdir()] == ["step_2"]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--resume"]) == 0
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 0
    first, second = _state(tmp_path / "a", 6), _state(tmp_path / "b", 6)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_config_encoder_and_verdict(cache: Path, tmp_path: Path) -> None:
    summary = pretrain(_recipe("mae_vit_nano"), data=cache, out=tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert config["backbone"]["spacing_mm"] == 3.0  # the cache's, not the recipe's 9
    encoder = load_encoder(tmp_path / "export/encoder.safetensors")
    assert encoder.spacing_mm == 3.0
    saved = _state(tmp_path, 6)
    assert all(torch.equal(value, saved[f"encoder.{name}"]) for name, value in encoder.state_dict().items())
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary["held_out_split"] == "val" and isinstance(summary["learned"], bool)
    assert str(cache) not in (tmp_path / "summary.json").read_text(encoding="utf-8")


def test_the_teacher_is_what_dino_exports(cache: Path, tmp_path: Path) -> None:
    pretrain(_recipe("dino_vit_nano"), data=cache, out=tmp_path)
    saved = _state(tmp_path, 6)
    for name, value in load_encoder(tmp_path / "export/encoder.safetensors").state_dict().items():
        assert torch.equal(value, saved[f"teacher_encoder.{name}"])


def test_held_out_figures_are_the_same_whenever_they_are_taken(cache: Path) -> None:
    parts = build_pretraining(_recipe("dino_vit_nano"), cache)
    first = parts.evaluate(0)
    torch.manual_seed(5)
    parts.method.train()
    assert parts.evaluate(3)["loss"] == first["loss"]


def test_the_seed_decides_the_weights_and_the_views(cache: Path) -> None:
    def build(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = build_pretraining(_recipe("mae_vit_nano", f"seed={seed}"), cache)
        return next(parts.method.parameters()), parts.prepare(parts.read(0), 0).views[0].image

    (weight, image), (same_weight, same_image), (other_weight, other_image) = build(1), build(1), build(2)
    assert torch.equal(weight, same_weight) and torch.equal(image, same_image)
    assert not torch.equal(weight, other_weight) and not torch.equal(image, other_image)


def test_a_dry_run_writes_nothing_and_says_what_it_would_cost(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert main(["pretrain", "mae_resenc_tiny", "--data", str(cache), "--dry-run", *RECIPES["mae_resenc_tiny"]]) == 0
    text = capsys.readouterr().out
    for part in (
        "3 training patients, 1 held out (val)",
        "M trained parameters",
        "peak memory",
        "6 steps",
        "GFLOP a step",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "{absent}", "--out", "{out}"], 3, "no such cache folder; make it with `lungssl cache build`"),
        (
            ["--data", "{cache}", "--out", "{out}", "views.global_vox=20"],
            2,
            "views.global_vox: 20 is not a multiple of",
        ),
        (["--data", "{cache}", "--out", "{out}", "data.labels=lobes"], 3, "with lobes"),
        (["--data", "{cache}", "--out", "{out}", "views.locals_per_slot=1"], 2, "set globals_per_slot to at least 1"),
        (["--data", "{cache}", "--out", "{out}", "--device", "nonsense"], 2, "--device nonsense: not usable here"),
        (["--data", "{cache}", "--out", "{out}", "--resume", "--overwrite"], 2, "exclude each other"),
    ],
)
def test_what_cannot_run_says_so_in_one_line(
    arguments: list[str],
    code: int,
    message: str,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"cache": cache, "out": tmp_path / "run", "absent": tmp_path / "absent"}
    words = [word.format(**places) for word in arguments]
    assert main(["pretrain", "mae_vit_nano", *RECIPES["mae_vit_nano"], *words]) == code
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_fine_tuning_recipe_is_not_for_pretraining(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is for `lungssl finetune`"):
        pretrain(load_recipe("finetune/segment"), data=cache, out=tmp_path / "run")


def test_a_cache_without_val_patients_is_judged_on_training_patients_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(_pair("a", "train", (3.0, 3.0, 3.0), ("exhale",)), tmp_path / "cache")
    summary = pretrain(_recipe("mae_vit_nano"), data=tmp_path / "cache", out=tmp_path / "run")
    assert summary["held_out_split"] == "train"
    assert "WARNING: the cache has no val patients" in capsys.readouterr().err


def test_a_cache_of_several_voxel_sizes_is_refused(tmp_path: Path) -> None:
    write_pair(_pair("a", "train", (1.5, 2.0, 2.5), ("exhale",)), tmp_path)
    with pytest.raises(DataError, match=r"voxels of 1\.5, 2, 2\.5 mm; an encoder needs one isotropic size"):
        build_pretraining(_recipe("mae_vit_nano"), tmp_path)


def test_too_few_evaluations_are_not_judged() -> None:
    assert judge([{"step": 0, "val/loss": 1.0}, {"step": 5, "loss": 0.5}]) == {
        "learned": None,
        "verdict": "Not judged: 1 held-out evaluations; lower train.eval_every",
    }
    lonely = judge([{"step": step, "val/loss": 0.0} for step in range(5)])
    assert lonely["learned"] is None and "without a second held-out patient" in lonely["verdict"]
    fallen = [{"step": step, "val/loss": 1.0 - 0.1 * step} for step in range(5)]
    assert judge(fallen)["learned"] is True


def test_what_the_runs_size_decides_is_found_with_its_reason_and_kept_by_a_longer_resumed_run(
    cache: Path, tmp_path: Path
) -> None:
    left_open = ["method.prototypes=auto", "train.lr=auto", "method.head_hidden=16"]
    recipe = _recipe("dino_resenc_tiny", *left_open, "train.steps=2")
    pretrain(recipe, data=cache, out=tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text("utf-8")
    assert "# method.prototypes: 64  (8 teacher rows in the run, 32 to a prototype" in text
    assert "# train.lr: 8.84e-05  (0.001 * sqrt(2 samples a step / 256)" in text
    assert "# method.centering: ema  (4 teacher rows a step; Sinkhorn from 256 on" in text
    again = load_recipe(tmp_path / "run" / "config.yaml")
    assert again.method is not None and again.method.config.prototypes == 64 and again.train.lr == 8.84e-05
    # Four thousand steps would ask for 256 prototypes, which the saved head doesn't have.
    longer = _recipe("dino_resenc_tiny", *left_open, "train.steps=4000")
    parts = build_pretraining(longer, cache, recorded=yaml.safe_load(text))
    assert parts.recipe.method is not None and parts.recipe.method.config.prototypes == 64
    assert "method.prototypes: 64  (as the run that is resumed has it)" in parts.reasons
    anew = build_pretraining(longer, cache).recipe.method
    assert anew is not None and anew.config.prototypes == 256


def test_accumulation_is_refused_where_samples_of_one_forward_are_compared(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.accumulate: 3, but dino with these settings .*centering to ema"):
        build_pretraining(_recipe("dino_resenc_tiny", "method.centering=sinkhorn", "train.accumulate=3"), cache)
    # 2 x 2 x 100 teacher rows would call for Sinkhorn, which would see 4 of them at a time.
    parts = build_pretraining(_recipe("dino_resenc_tiny", "method.centering=auto", "train.accumulate=100"), cache)
    assert parts.recipe.method is not None and parts.recipe.method.config.centering == "ema"
    assert any("100 accumulated micro-batches" in reason for reason in parts.reasons)


def test_a_step_without_a_number_is_replayed_from_its_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = Pretraining.prepare

    def poisoned(self: Pretraining, crops: CropBatch, index: int) -> PairBatch:
        batch = healthy(self, crops, index)
        if index == 3:
            batch.views[0].image[0, 0, 2, 2, 2] = torch.nan
        return batch

    monkeypatch.setattr(Pretraining, "prepare", poisoned)
    recipe = _recipe("mae_resenc_tiny")
    with pytest.raises(NotFiniteError, match="loss is nan at step 4"):
        pretrain(recipe, data=cache, out=tmp_path / "run")
    kept = tmp_path / "run/nan/step_4.safetensors"
    assert f"--replay {kept}" in capsys.readouterr().err
    arguments = ["pretrain", str(tmp_path / "run/config.yaml"), "--data", str(cache), "--replay", str(kept)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "step 4: loss was nan" in said and "micro-batch 3: loss nan" in said
    assert "a global view of slot 0 holds values that are no numbers" in said
    # The step itself is repeated: with what was read healed, its loss is that of a run without the fault.
    monkeypatch.setattr(Pretraining, "prepare", healthy)
    assert main(arguments) == 0
    again = capsys.readouterr().out
    pretrain(recipe, data=cache, out=tmp_path / "sound")
    loss = next(
        line["loss"] for line in read_metrics(tmp_path / "sound/metrics.jsonl") if line["step"] == 4 if "lr" in line
    )
    assert f"micro-batch 3: loss {loss:.6g}" in again and "0 of" in again
    other = _recipe("dino_resenc_tiny")
    with pytest.raises(ConfigError, match="of another model than"):
        replay(other, kept, data=cache)


def test_held_out_lines_hold_the_figures_of_the_probe_set(cache: Path, tmp_path: Path) -> None:
    summary = pretrain(_recipe("dino_vit_nano"), data=cache, out=tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "val/loss" in line]
    assert len(lines) == 4 and summary["alarms"] == []
    for line in lines:
        assert line["probe/effective_rank"] > 1 and 0 <= line["probe/embedding_std"] <= 1
        assert 1 <= line["val/prototypes_used"] <= 32
    assert lines[0]["probe/patch_gram_drift"] == 0 < lines[-1]["probe/patch_gram_drift"]


def test_methods_that_predict_voxels_are_not_judged_by_their_mean_features(cache: Path) -> None:
    bounds = {name: alarm_bounds(build_pretraining(_recipe(name), cache).method) for name in RECIPES}
    assert {name for name, one in bounds.items() if one.spread_share == 0 and one.rank_share == 0} == {
        *("mae_vit_nano", "mae_resenc_tiny", "spark_resenc_tiny", "croco_vit_nano")
    }
