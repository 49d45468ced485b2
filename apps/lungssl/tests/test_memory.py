"""Steps that hold less, and batches that memory holds."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from lungssl import auto_batch
from lungssl.errors import ConfigError
from lungssl.pretraining import Pretraining, build_pretraining, dry_run, pretrain
from lungssl.training import memory
from lungssl.training.memory import budget_mb, free_bytes, largest_batch
from lungssl.training.precision import autocast
from lungssl.training.recompute import recompute_blocks
from lungssl_backbones import create_backbone
from lungssl_ops.measure import peak_mb
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dino_vit_nano", "mae_vit_nano", "croco_vit_nano"])
def test_blocks_made_again_give_the_same_bits_and_hold_less(
    name: str, precision: str, tiny_pair: ModuleType, noise_cohort: Path
) -> None:
    words = [*tiny_pair.RECIPES[name], "backbone.drop_path=0.5", "train.eval_batches=0", f"train.precision={precision}"]
    results = []
    for again in ("false", "true"):
        recipe = tiny_pair.load_recipe(name, [*words, f"train.recompute={again}"])
        results.append(_step(build_pretraining(recipe, noise_cohort, device="cpu")))
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = results
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    for gradient_name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[gradient_name]), gradient_name
    assert kept_again < 0.6 * kept  # what heads and decoders keep stays


def test_names_of_weights_stay_and_copies_make_their_blocks_again_too() -> None:
    import copy

    encoder = create_backbone("vit3d_nano")
    names = list(encoder.state_dict())
    recompute_blocks(encoder)
    twin = copy.deepcopy(encoder)
    assert list(encoder.state_dict()) == names
    with torch.no_grad():
        twin.blocks[0].qkv.weight.zero_()  # pyright: ignore
    x = torch.rand(1, 1, 16, 16, 16)
    assert not torch.equal(twin(x).tokens, encoder(x).tokens)  # each its own weights


def test_encoders_without_blocks_are_refused(tiny_pair: ModuleType, noise_cohort: Path) -> None:
    recipe = tiny_pair.load_recipe("mae_resenc_tiny", [*tiny_pair.RECIPES["mae_resenc_tiny"], "train.recompute=true"])
    with pytest.raises(ConfigError, match=r"resenc_tiny has none; take a vit3d_\* or primus_\* backbone"):
        build_pretraining(recipe, noise_cohort, device="cpu")


def test_the_largest_batch_grows_with_the_budget_and_its_step_stays_within() -> None:
    def step(number: int) -> Callable[[], Tensor]:
        return lambda: torch.zeros(number, 500_000).sum()  # 1.9 MiB each

    found = [largest_batch(step, device=CPU, budget_mb=budget, most=100) for budget in (1.0, 5.0, 20.0)]
    assert [fit.batch for fit in found] == [1, 2, 10]  # one always
    assert peak_mb(step(10), "cpu") <= 20.0 < peak_mb(step(11), "cpu")
    assert largest_batch(step, device=CPU, budget_mb=1e4, most=7).batch == 7
    assert "MiB with one patient and 2 more with each" in found[0].reason()


def test_out_of_memory_with_two_patients_leaves_one() -> None:
    def step(number: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            if number > 1:
                raise torch.OutOfMemoryError("no")
            return torch.zeros(3)

        return call

    assert largest_batch(step, device=CPU, budget_mb=1e4, most=7).batch == 1


@pytest.mark.parametrize(("most", "used", "left"), [("max", "5", []), ("1000", "400", [600]), ("1000", "1400", [-400])])
def test_a_containers_limit_counts(tmp_path: Path, most: str, used: str, left: list[int]) -> None:
    (tmp_path / "memory.max").write_text(most)
    (tmp_path / "memory.current").write_text(used)
    assert memory._container_bytes(tmp_path) == left
    assert memory._container_bytes(tmp_path / "none") == []
    assert 0 < budget_mb(CPU) < free_bytes() / 2**20


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
    assert "train.batch: 2  (a step holds" in dry_run(recipe, data=noise_cohort, device="cpu")

    monkeypatch.setattr(auto_batch, "budget_mb", lambda device: 0.0)
    pretrain(recipe, data=noise_cohort, out=tmp_path / "run", device="cpu")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["batch"] == 1
    monkeypatch.undo()
    longer = tiny_pair.load_recipe("mae_vit_nano", [*words, "train.batch=auto", "train.steps=8"])
    pretrain(longer, data=noise_cohort, out=tmp_path / "run", device="cpu", resume=True)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["batch"] == 1
    assert "train.batch: 1  (as the run that is resumed has it)" in (tmp_path / "run/train.log").read_text()


def test_finetuning_wants_a_number(tiny_pair: ModuleType) -> None:
    recipe = tiny_pair.load_recipe("finetune/segment", ["train.batch=auto"])
    with pytest.raises(ConfigError, match=r"train\.batch: auto is for pretraining; give a number"):
        recipe.train.patients()
