"""Trains every method for three steps on one process and on two: `python two_ranks.py`, run by test_ranks.py.

Prints one JSON object: for each case, of two ranks and of two accumulated micro-batches against one batch, the greatest
difference of a step's loss (relative above 1) and of a parameter, and the greatest change of a parameter by training.
Samples differ in their voxels, one has less lung than the others, and all of another is padding. Against micro-batches
they have the same lung, all of it measured, and the same masks and points: a mean of two micro-batches' means is the
mean of all only where both count as much.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lungssl_backbones import create_backbone
from lungssl_data.batch import PairBatch, View
from lungssl_methods import METHODS, dino, method_class
from lungssl_methods.method import Gather, LocalGather
from lungssl_methods.ranks import RanksGather
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

STEPS = 3
SAMPLES = 4
SIDE = 16
ENCODERS = {"spark": ("resenc_tiny", {"widths": (8, 12), "depths": (1, 1)})}
VIT = ("vit3d_nano", {"dim": 24, "depth": 1, "heads": 2, "patch_vox": 4})
HEAD = {"prototypes": 16, "head_hidden": 16, "head_bottleneck": 8}
DECODER = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2, "mask_unit_tokens": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS}
CASES["dino"] = ("dino", {**HEAD, "centering": "ema"})
CASES["phase_dino"] = ("phase_dino", {**HEAD, "centering": "ema"})
CASES["dino_sinkhorn"] = ("dino", {**HEAD, "centering": "sinkhorn"})
CASES["dino_koleo"] = ("dino", {**HEAD, "centering": "ema", "koleo_weight": 0.1})
CASES["mae"] = ("mae", DECODER)
CASES["croco"] = ("croco", DECODER)
CASES["spark"] = ("spark", {"mask_unit_tokens": 2})
CASES["simmim"] = ("simmim", {"mask_unit_tokens": 1})
CASES["vicreg"] = ("vicreg", {"expander": (16, 16)})
CASES["barlow_twins"] = ("vicreg", {"expander": (16, 16), "objective": "barlow_twins"})
CASES["simclr"] = ("simclr", {"hidden": 16, "out": 8})
CASES["vox2vec"] = ("vox2vec", {"points": 12, "hidden": 16, "out": 8})
CASES["paired_dense"] = ("paired_dense", {"points": 12})
IBOT = {"patch_weight": 1.0, "mask_unit_tokens": 1, "mask_share": 1.0, "mask_ratio": (0.5, 0.5)}
CASES["dino_ibot"] = ("dino", {**HEAD, **IBOT, "centering": "sinkhorn", "koleo_weight": 0.1, "gram_weight": 1.0})
CASES["phase_dino_ibot"] = ("phase_dino", {**HEAD, **IBOT, "centering": "ema"})
CASES["paired_dense_taught"] = ("paired_dense", {"points": 12, "matched_by": "teacher", "momentum": 0.9})


DOUBLE = ("simclr", "vicreg", "paired_dense", "mae", "simmim", "croco", "spark", "jepa")
"""In float64, so that the order of a sum doesn't show: batch norms of four rows blow it up."""


def same_for_every_row(draw: Any, shape: tuple[int, ...]) -> Tensor:
    """A draw's first row, for all: a rank that has half of the samples draws what one with all of them does."""
    row = draw((1, *shape[1:]), generator=torch.Generator().manual_seed(1))
    return row.expand(shape).clone()


@contextmanager
def same_draws() -> Iterator[None]:
    """One row for all, of torch.rand and torch.randint as the methods call them."""
    rand, randint = torch.rand, torch.randint

    def patched_rand(*shape: Any, generator: Any = None) -> Tensor:
        size = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
        if not size:
            return rand((), generator=torch.Generator().manual_seed(1))
        return same_for_every_row(rand, size)

    def patched_randint(low: int, high: int, shape: tuple[int, ...], generator: Any = None) -> Tensor:
        return same_for_every_row(lambda size, generator: randint(low, high, size, generator=generator), shape)

    torch.rand, torch.randint = patched_rand, patched_randint
    try:
        yield
    finally:
        torch.rand, torch.randint = rand, randint


def batch_of(step: int, samples: range, *, globals_per_slot: int, locals_per_slot: int, unequal: bool) -> PairBatch:
    """Voxels by step and sample alone; geometry and, unless `unequal`, masks the same for all."""
    views = []
    for kind, side, count in (("global", SIDE, globals_per_slot), ("local", SIDE // 2, locals_per_slot)):
        place = torch.meshgrid(*(2.0 * torch.arange(side),) * 3, indexing="ij")
        coords_mm = torch.stack(place[::-1]).expand(len(samples), 3, side, side, side)
        lung = (coords_mm[:, 0] > side / 2) & (coords_mm[:, 1] < 1.5 * side)
        valid = torch.ones_like(lung)
        if unequal:
            for row, sample in enumerate(samples):
                lung[row] &= coords_mm[row, 0] > (1.6 * side if sample == 0 else 0)
                valid[row] &= sample != 2
        for index in range(2 * count):
            slot: Literal[0, 1] = (0, 1)[index % 2]
            seeds = [1000 * step + 10 * sample + index + 100 * (kind == "local") for sample in samples]
            noise = [torch.randn(1, side, side, side, generator=torch.Generator().manual_seed(one)) for one in seeds]
            views.append(
                View(
                    image=0.3 + 0.2 * torch.stack(noise),
                    coords_mm=coords_mm,
                    partner_mm=coords_mm + 1.0 if slot == 0 else None,
                    valid=valid,
                    lung=lung,
                    slot=slot,
                    kind=kind,
                )
            )
    return PairBatch(
        views=tuple(views),
        slot_phase=torch.tensor([[0, 1]]).repeat(len(samples), 1),
        patient=torch.tensor(list(samples)),
        exhale_to_inhale=torch.eye(3, 4).repeat(len(samples), 1, 1),
    )


def built(case: str, gather: Gather) -> Any:
    """The case's method, with weights that depend on nothing else."""
    name, options = CASES[case]
    torch.manual_seed(0)
    backbone, size = ENCODERS.get(name, VIT)
    config = method_class(name).Config(**options)
    return config.build(create_backbone(backbone, **size), total_steps=8, effective_batch=SAMPLES, gather=gather)


Run = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]
"""Mean losses of the steps, and parameters before and after."""


def trained(case: str, rank: int, ranks: int, parts: int = 1, *, unequal: bool) -> Run:
    """`parts`: accumulated micro-batches."""
    name, method = CASES[case][0], built(case, RanksGather() if ranks > 1 else LocalGather())
    if name in DOUBLE:
        method = method.double()
    method.train()
    views = asdict(method.typical_views)
    before = {key: value.detach().clone() for key, value in method.named_parameters()}
    module = DistributedDataParallel(method, find_unused_parameters=True) if ranks > 1 else method
    # Plain gradient descent: Adam's first steps have one size whatever the gradient, which hides a factor.
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    share = SAMPLES // ranks // parts
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for part in range(parts):
            start = rank * SAMPLES // ranks + part * share
            batch = batch_of(step + 2, range(start, start + share), **views, unequal=unequal)
            if name in DOUBLE:
                batch = replace(batch, views=tuple(replace(view, image=view.image.double()) for view in batch.views))
            torch.manual_seed(step)
            loss = module(batch, step + 2).loss / parts
            loss.backward()
            total = total + loss.detach().double()
        optimizer.step()
        method.after_optimizer_step(step + 2)
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses, before, {key: value.detach().clone() for key, value in method.named_parameters()}


def compare(one: Any, other: Any) -> dict[str, float]:
    (losses, before, after), (other_losses, _, other_after) = one, other
    return {
        "loss": max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(losses, other_losses, strict=True)),
        "parameters": max(float((after[key] - other_after[key]).abs().max()) for key in after),
        "moved": max(float((after[key] - before[key]).abs().max()) for key in after),
    }


def worker(rank: int, folder: str) -> None:
    """One of two ranks; the first one compares."""
    torch.set_num_threads(1)
    dino.KOLEO_FROM_PATIENTS = 2
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        outcome = trained(case, rank, 2, unequal=True)
        if rank == 0:
            with same_draws():
                micro = compare(*(trained(case, 0, 1, parts, unequal=False) for parts in (1, 2)))
            found[case] = {
                "ranks": compare(trained(case, 0, 1, unequal=True), outcome),
                "micro": micro,
                "separable": built(case, LocalGather()).batch_separable,
            }
        dist.barrier()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder,), nprocs=2)
        sys.stdout.write((Path(folder) / "found.json").read_text())


if __name__ == "__main__":
    main()
