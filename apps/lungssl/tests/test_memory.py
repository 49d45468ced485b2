"""Steps that hold less, and batches that memory holds."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lungssl import auto_batch
from lungssl.auto_batch import settle_batch
from lungssl.comparison.cost import measure
from lungssl.comparison.plan import Pretrain
from lungssl.config import Recipe
from lungssl.errors import ConfigError, TrainingError
from lungssl.finetuning import encoder_of
from lungssl.pretraining import Pretraining, build_pretraining, dry_run, pretrain
from lungssl.training import memory
from lungssl.training.memory import batch_by_doubling, batch_by_line, budget_mb, free_bytes
from lungssl.training.precision import autocast
from lungssl.training.ranks import ALONE, Ranks
from lungssl.training.recompute import recompute_blocks
from lungssl.training.sharding import blocks_of
from lungssl_backbones import create_backbone
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.pair import PhasePair, PhaseScan
from torch import Tensor

CPU = torch.device("cpu")


def _step(parts: Pretraining) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss and gradients of one step, and the bytes that were kept for the backward pass."""
    kept = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(0)
    views = parts.prepare(parts.read(0), 0)
    parts.method.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        autocast(CPU, parts.recipe.train.precision, parts.method),
    ):
        loss = parts.method(views, 0).loss
    after_forward = kept
    loss.backward()
    gradients = {name: p.grad for name, p in parts.method.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, after_forward


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (name, precision)
        for name in ("dino_vit_nano", "mae_vit_nano", "croco_vit_nano")
        for precision in ("fp32", "bf16")
    ]
    + [(name, "fp32") for name in ("simclr", "vicreg", "simmim", "jepa", "phase_jepa")],
)
def test_blocks_made_again_give_the_same_bits_and_hold_less(
    name: str, precision: str, tiny_pair: ModuleType, noise_cohort: Path
) -> None:
    words = ["backbone.drop_path=0.5", "train.eval_batches=0", f"train.precision={precision}"]
    results = []
    for again in ("false", "true"):
        recipe = tiny_pair._recipe(name, *words, f"train.recompute={again}")
        results.append(_step(build_pretraining(recipe, noise_cohort, device="cpu")))
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = results
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    for gradient_name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[gradient_name]), gradient_name
    assert kept_again < 0.6 * kept  # what heads and decoders keep stays


def _kept(encoder: torch.nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Tokens, and how many numbers are kept for the backward pass."""
    kept = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(0)  # of branches that are dropped
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return encoder(x).tokens, kept


@pytest.mark.parametrize("name", ["vit3d_nano", "primus_ti"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_names_of_weights_stay_and_copies_make_their_blocks_again_too(
    again: Callable[[torch.nn.Module], torch.nn.Module], name: str
) -> None:
    encoder, x = create_backbone(name), torch.rand(1, 1, 16, 16, 16)
    names = list(encoder.state_dict())
    tokens, kept = _kept(encoder, x)
    recompute_blocks(encoder)
    twin = again(encoder)
    assert list(encoder.state_dict()) == list(twin.state_dict()) == names
    for one in (encoder, twin):
        tokens_again, kept_again = _kept(one, x)
        assert torch.equal(tokens_again, tokens) and kept_again < 0.5 * kept
    with torch.no_grad():
        for parameter in blocks_of(twin)[0].parameters():
            parameter.zero_()
    assert not torch.equal(_kept(twin, x)[0], tokens)  # each its own weights
    assert torch.equal(_kept(encoder, x)[0], tokens)


def test_fine_tuning_makes_blocks_again_too(tiny_pair: ModuleType, noise_cohort: Path) -> None:
    kept = []
    for again in ("false", "true"):
        recipe = tiny_pair.load_recipe("finetune/segment", ["backbone.name=vit3d_nano", f"train.recompute={again}"])
        _, encoder = encoder_of(recipe, None, PairCache(noise_cohort))
        kept.append(_kept(encoder, torch.rand(1, 1, 32, 32, 32))[1])
    assert kept[1] < 0.5 * kept[0]


def test_encoders_without_blocks_are_refused(tiny_pair: ModuleType, noise_cohort: Path) -> None:
    recipe = tiny_pair.load_recipe("mae_resenc_tiny", [*tiny_pair.RECIPES["mae_resenc_tiny"], "train.recompute=true"])
    with pytest.raises(ConfigError, match=r"resenc_tiny has none; take a vit3d_\* or primus_\* backbone"):
        build_pretraining(recipe, noise_cohort, device="cpu")
    recipe = tiny_pair.load_recipe("finetune/segment", ["backbone.name=resenc_tiny", "train.recompute=true"])
    with pytest.raises(ConfigError, match=r"resenc_tiny has none; take a vit3d_\* or primus_\* backbone"):
        encoder_of(recipe, None, PairCache(noise_cohort))


def test_a_line_through_two_peaks_says_how_many_fit() -> None:
    def peak_mb(number: int) -> float:
        return 50.0 + 10 * number

    found = [batch_by_line(peak_mb, budget_mb=budget, most=100) for budget in (1.0, 69.0, 70.0, 161.0)]
    assert [fit.batch for fit in found] == [1, 1, 2, 11]  # one always
    assert batch_by_line(peak_mb, budget_mb=1e6, most=7).batch == 7
    assert batch_by_line(peak_mb, budget_mb=1e6, most=1000).batch == memory.MOST
    assert found[3].reason == (
        "a step holds 60 MiB with one patient and 10 more with each; of the free memory it may take 161 MiB"
    )
    assert batch_by_line(lambda number: 9.0, budget_mb=19.5, most=100).batch == 11  # no slope is noise's at least


def test_doubling_ends_at_the_budget_at_out_of_memory_and_at_the_last_patient() -> None:
    tried: list[int] = []

    def peak_mb(number: int) -> float:
        tried.append(number)
        if number > 40:
            raise torch.OutOfMemoryError("no")
        return 10.0 * number

    def found(budget_mb: float, most: int) -> tuple[int, list[int], str]:
        tried.clear()
        fit = batch_by_doubling(peak_mb, budget_mb=budget_mb, most=most)
        return fit.batch, list(tried), fit.reason.split("; ")[1]

    assert found(5.0, 100) == (1, [1], "one patient alone goes over it")
    assert found(85.0, 100) == (8, [1, 2, 4, 8, 16], "16 hold 160")
    assert found(1e4, 100) == (32, [1, 2, 4, 8, 16, 32, 64], "64 ran out of memory")
    assert found(1e4, 21) == (21, [1, 2, 4, 8, 16, 21], "no more patients to try")
    assert batch_by_doubling(lambda number: 1.0, budget_mb=2.0, most=1000).batch == memory.MOST


def _short(at: int, error: Exception) -> Callable[[int], float]:
    def peak_mb(number: int) -> float:
        if number >= at:
            raise error
        return 1.0

    return peak_mb


@pytest.mark.parametrize("search", [batch_by_line, batch_by_doubling])
@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("no")])
def test_out_of_memory_with_two_patients_leaves_one_and_with_one_is_told(
    search: Callable[..., memory.Fit], error: Exception
) -> None:
    found = search(_short(2, error), budget_mb=1e4, most=7)
    assert found.batch == 1 and "ran out of memory" in found.reason
    with pytest.raises(type(error)):
        search(_short(1, error), budget_mb=1e4, most=7)
    with pytest.raises(ValueError, match="another"):
        search(_short(2, ValueError("another")), budget_mb=1e4, most=7)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_all_groups_around_count_without_files_that_can_be_dropped(tmp_path: Path, version: int) -> None:
    names = {1: ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    names[2] = ("", "memory.max", "memory.current", "inactive_file")
    top, *files = names[version]
    for folder, most, used, dropped in (
        ("jobs", "5000", 4500, 100),
        ("jobs/7", "max", 3000, 0),
        ("", "9000", 6000, 50),
    ):
        inside = tmp_path / top / folder
        inside.mkdir(parents=True, exist_ok=True)
        (inside / files[0]).write_text(f"{most}\n")
        (inside / files[1]).write_text(f"{used}\n")
        (inside / "memory.stat").write_text(f"anon 3\n{files[2]} {dropped}\n")
    groups = tmp_path / "cgroup"
    named = "4:cpu,memory:" if version == 1 else "0::"
    groups.write_text(f"2:pids:/x\n{named}/jobs/7\n")
    assert memory._group_bytes(groups, tmp_path) == [600, 3050]
    groups.write_text(f"{named}/the/hosts/name\n")
    assert memory._group_bytes(groups, tmp_path) == [3050]
    assert memory._group_bytes(tmp_path / "none", tmp_path) == []
    assert 0 < budget_mb(CPU) < free_bytes() / 2**20


def _cohort(folder: Path, patients: int) -> Path:
    random = np.random.default_rng(0)
    side = np.ones((48, 48, 48), np.uint8)
    for number in range(patients):
        exhale, inhale = (
            PhaseScan(
                ct_hu=random.normal(-700, 200, side.shape).clip(-1000, 400).astype(np.int16),
                valid=side,
                lung=side,
                spacing_mm=(5.0, 5.0, 5.0),
                origin_mm=(0.0, 0.0, 0.0),
            )
            for _ in range(2)
        )
        pair = PhasePair(
            patient=f"p{number}", exhale=exhale, inhale=inhale, split="train", exhale_to_inhale=np.eye(3, 4)
        )
        write_pair(pair, folder)
    return folder


def test_the_batch_grows_with_the_budget_and_its_own_steps_stay_within(
    tiny_pair: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _cohort(tmp_path / "cache", 7)
    words = "train.batch=auto train.eval_batches=0 train.accumulate=1".split()
    recipe = tiny_pair.load_recipe("mae_vit_nano", words)
    step_mb, peaks = auto_batch._cpu_peak_mb, {}

    def peak_mb(tried: Recipe, data: Path, device: torch.device) -> float:
        number = tried.train.patients()
        if number not in peaks:
            peaks[number] = step_mb(tried, data, device)
        return peaks[number]

    monkeypatch.setattr(auto_batch, "_cpu_peak_mb", peak_mb)
    one, two = (peak_mb(auto_batch._with(recipe, number), data, CPU) for number in (1, 2))
    assert two - one > 20  # MiB: more than noise
    found = []
    for room in (2.5, 4.5):
        budget = one + room * (two - one)
        monkeypatch.setattr(auto_batch, "budget_mb", lambda device, budget=budget: budget)
        settled, _ = settle_batch(recipe, data=data, build=_none, patients=7, device=CPU, ranks=ALONE)
        found.append(settled.train.patients())
        assert peak_mb(settled, data, CPU) <= budget
    assert found == [3, 5]


def _none(recipe: Recipe) -> Pretraining:
    raise AssertionError("on a CPU other processes make the steps")


def test_ranks_take_what_the_one_with_the_least_room_holds(
    tiny_pair: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(Ranks):
        def all(self, value: Any) -> list[Any]:
            return [value, 3]

    monkeypatch.setattr(auto_batch, "_cpu_peak_mb", lambda recipe, data, device: 10.0 * recipe.train.patients())
    recipe = tiny_pair.load_recipe("mae_vit_nano", ["train.batch=auto"])

    def batch(budget: float, patients: int) -> int:
        monkeypatch.setattr(auto_batch, "budget_mb", lambda device: budget)
        settled, line = settle_batch(
            recipe, data=tmp_path, build=_none, patients=patients, device=CPU, ranks=Two(size=2)
        )
        assert ("another rank has room for 3" in line) == (settled.train.batch == 6)
        return settled.train.patients()

    assert [batch(1e4, 11), batch(20.0, 11), batch(1e4, 5)] == [6, 4, 4]  # of 11 patients each rank may take 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert batch(40.0, 11) == 4  # half of it each


def test_what_goes_wrong_in_a_tried_step_is_told(
    tiny_pair: ModuleType, tmp_path: Path, noise_cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_pair.RECIPES["mae_vit_nano"], "views.global_vox=32"]
    recipe = tiny_pair.load_recipe("mae_vit_nano", words)
    with pytest.raises(ConfigError, match=r"views\.global_vox: 32 is larger than data\.crop_vox"):
        auto_batch._cpu_peak_mb(recipe, noise_cohort, CPU)
    program = tmp_path / "python"
    monkeypatch.setattr("sys.executable", str(program))
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    with pytest.raises(MemoryError, match=r"tried a step with train\.batch=2 was killed"):
        auto_batch._cpu_peak_mb(recipe, noise_cohort, CPU)
    auto = tiny_pair.load_recipe("mae_vit_nano", [*words, "train.batch=auto", "train.shard=full"])
    with pytest.raises(ConfigError, match=r"all weights on each process, which doesn't fit; give a number"):
        build_pretraining(auto, noise_cohort, device="cpu")
    program.write_text("#!/bin/sh\necho oh dear >&2; exit 3\n")
    with pytest.raises(TrainingError, match=r"with 2 patients ended with 3 \(oh dear\); give a number"):
        auto_batch._cpu_peak_mb(recipe, noise_cohort, CPU)


def test_an_automatic_batch_is_found_said_kept_and_changes_nothing_else(
    tiny_pair: ModuleType, noise_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_pair.RECIPES["mae_vit_nano"], "train.eval_batches=0", "train.accumulate=1"]
    recipe = tiny_pair.load_recipe("mae_vit_nano", [*words, "train.batch=auto"])
    found = build_pretraining(recipe, noise_cohort, device="cpu")
    assert found.recipe.train.batch == 2  # all training patients
    given = build_pretraining(
        tiny_pair.load_recipe("mae_vit_nano", [*words, "train.batch=2"]), noise_cohort, device="cpu"
    )
    for one, other in zip(found.method.state_dict().values(), given.method.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert found.reasons[0].startswith("train.batch: 2  (a step holds ")

    monkeypatch.setattr(auto_batch, "_cpu_peak_mb", lambda recipe, data, device: 10.0 * recipe.train.patients())
    assert "train.batch: 2  (a step holds 10 MiB" in dry_run(recipe, data=noise_cohort, device="cpu")
    monkeypatch.setattr(auto_batch, "budget_mb", lambda device: 0.0)
    pretrain(recipe, data=noise_cohort, out=tmp_path / "run", device="cpu")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["batch"] == 1
    monkeypatch.undo()
    more = ["train.batch=auto", "train.steps=8", "train.recompute=true"]
    pretrain(
        tiny_pair.load_recipe("mae_vit_nano", [*words, *more]),
        data=noise_cohort,
        out=tmp_path / "run",
        device="cpu",
        resume=True,
    )
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["batch"] == 1
    assert "train.batch: 1  (as the run that is resumed has it)" in (tmp_path / "run/train.log").read_text()


def test_fine_tuning_and_comparisons_want_a_number(tiny_pair: ModuleType, noise_cohort: Path) -> None:
    recipe = tiny_pair.load_recipe("finetune/segment", ["train.batch=auto"])
    with pytest.raises(ConfigError, match=r"train\.batch: auto is for pretraining; give a number"):
        encoder_of(recipe, None, PairCache(noise_cohort))
    recipe = tiny_pair.load_recipe("mae_vit_nano", ["train.batch=auto"])
    arm = Pretrain(arm="A0", seed=0, recipe=recipe, pretrained=True, window_vox=32, id="A0-0")
    with pytest.raises(ConfigError, match=r"arm A0: train\.batch: auto takes what the machine's memory holds"):
        measure(arm, noise_cohort, test=())
