import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.batch import PairBatch, StepOutput
from lungssl_methods import METHODS, list_methods, method_class
from lungssl_methods.auto import BaseRate
from lungssl_methods.method import LocalGather, Method
from torch import nn

NEEDS = {"jepa": "vit3d_nano", "phase_jepa": "vit3d_nano", "spark": "resenc_tiny"}
"""Methods that work with one kind of backbone only, and the one that their error names."""


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_keeps_the_contract(name: str, encoder: nn.Module, make_batch: Callable[..., PairBatch]) -> None:
    assert isinstance(method_class(name).base_rate, BaseRate)
    method = method_class(name).Config().build(encoder, total_steps=10, effective_batch=4, gather=LocalGather())
    assert isinstance(method, Method) and isinstance(method, nn.Module)
    assert isinstance(method.batch_separable, bool)
    views = asdict(method.typical_views)
    method.check_views(**views)
    output = method(make_batch(2, **views, global_size=(32, 32, 32)), 0)
    assert isinstance(output, StepOutput)
    output.loss.backward()
    assert all(p.grad is not None for n, p in method.encoder.named_parameters() if n != "mask_token")
    assert all(value.ndim == 0 and not value.requires_grad for value in output.metrics.values())
    assert "loss" in output.metrics
    method.after_optimizer_step(0)
    exported = method.export_encoder().state_dict()
    assert exported.keys() == encoder.state_dict().keys()


@pytest.mark.parametrize("backbone", ["vit3d_nano", "resenc_tiny"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_trains_both_kinds_of_backbone_or_names_the_kind_that_it_needs(
    name: str, backbone: str, make_batch: Callable[..., PairBatch]
) -> None:
    if backbone in NEEDS.get(name, backbone):
        method = method_class(name).Config().build(create_backbone(backbone), total_steps=4)
    else:
        with pytest.raises(ValueError, match=NEEDS[name]):
            method_class(name).Config().build(create_backbone(backbone), total_steps=4)
        return
    sizes = {"global_size": (32, 16, 48), "local_size": (16, 16, 24)}
    batch = make_batch(2, **asdict(method.typical_views), **sizes)
    for step in (2, 3):  # mae's first step moves only its last layer, which starts at 0
        method.zero_grad()
        method(batch, step).loss.backward()
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        method.after_optimizer_step(step)
    untouched = {name for name, p in method.encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched <= {"mask_token", "mask_value"}
    method.export_encoder()(batch.views[0].image)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_held_out_batches_move_no_state_and_repeat_exactly(
    name: str, encoder: nn.Module, make_batch: Callable[..., PairBatch]
) -> None:
    method = method_class(name).Config().build(encoder, total_steps=10).eval()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    batch = make_batch(2, **asdict(method.typical_views), global_size=(32, 32, 32))
    first, second = method(batch, 0).loss, method(batch, 9).loss
    assert first.item() == second.item()
    assert all((before[key] == value).all() for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_module_that_is_no_encoder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"Linear is not an Encoder .*create_backbone"):
        method_class(name).Config().build(nn.Linear(2, 2), total_steps=10)


def test_a_misspelt_method_is_corrected() -> None:
    assert list_methods() == list(METHODS)
    with pytest.raises(ValueError, match="unknown method 'dnio'; did you mean 'dino'"):
        method_class("dnio")
    with pytest.raises(ValueError, match="unknown method 'zzz'; known: dino, mae, phase_dino, "):
        method_class("zzz")


def test_listing_methods_imports_no_torch() -> None:
    code = "import sys, lungssl_methods; lungssl_methods.list_methods(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_new_method_is_one_file_and_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoder: nn.Module,
    convolutional_encoder: nn.Module,
    make_batch: Callable[..., PairBatch],
) -> None:
    (tmp_path / "my_method.py").write_text(
        """
from dataclasses import dataclass

from lungssl_data.batch import StepOutput
from lungssl_methods.auto import BaseRate
from lungssl_methods.method import ViewCounts, checked_encoder
from torch import nn


class Brightness(nn.Module):
    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=0)
    needs_correspondences = False
    may_collapse = True
    batch_separable = True
    base_rate = BaseRate(lr=1e-3, source="a test")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        scale: float = 1.0

        def build(self, encoder, *, total_steps, effective_batch=32, gather=None):
            return Brightness(self, encoder)

    def __init__(self, config, encoder):
        super().__init__()
        self.encoder = encoder
        self.predict = nn.Linear(checked_encoder(encoder).dim, 1)

    def check_views(self, *, globals_per_slot, locals_per_slot):
        pass

    def forward(self, batch, step):
        error = 0.0
        for view in batch.global_views():
            found = self.predict(self.encoder(view.image).tokens.square()).mean((1, 2))
            error = error + (found - view.image.mean((1, 2, 3, 4))).square().mean()
        return StepOutput(loss=error, metrics={"loss": error.detach()})

    def after_optimizer_step(self, step):
        pass

    def export_encoder(self):
        return self.encoder
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "brightness", "my_method:Brightness")
    assert "brightness" in list_methods()
    test_every_method_keeps_the_contract("brightness", encoder, make_batch)
    test_held_out_batches_move_no_state_and_repeat_exactly("brightness", convolutional_encoder, make_batch)
    test_a_module_that_is_no_encoder_is_refused("brightness")
