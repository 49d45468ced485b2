"""Sharded runs of `pretrain` on two processes, for test_sharding.py: `python sharded_runs.py FOLDER CASE ...`.

Prints one JSON object: what differs from whole weights on two processes, and what becomes of runs that are broken off.
"""

import errno
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import two_rank_runs as runs
from lungssl.pretraining import build_pretraining, pretrain
from lungssl.training import sharded_files
from lungssl.training.checkpoint import checkpoints, load_checkpoint
from lungssl.training.watch import read_step
from lungssl_backbones.weights import load_encoder
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

# Of the three batches that are held out two ranks have not as many; gradients are clipped in each step.
SAME = ["train.steps=6", "train.eval_batches=3", "train.clip=0.05"]


def state(run: Path, case: str, data: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint of a run, whole, as one process reads it."""
    recipe = runs.recipe_of(case)
    method = build_pretraining(recipe, data).method
    optimizer = runs.loop.make_optimizer(method, recipe.train)
    load_checkpoint(checkpoints(run / "checkpoints")[-1], method, optimizer)
    moments = {f"{i}/{k}": v for i, entry in optimizer.state_dict()["state"].items() for k, v in entry.items()}
    return method.state_dict() | moments


def difference(a: Path, b: Path, case: str, data: Path) -> dict[str, Any]:
    """Greatest difference of a figure (relative above 1), of a tensor and of an exported weight; a tensor's move."""
    one, other, start = state(a, case, data), state(b, case, data), build_pretraining(runs.recipe_of(case), data).method
    begun = start.state_dict()
    lines = zip(runs.untimed(a), runs.untimed(b), strict=True)
    figures = [abs(x[k] - y[k]) / max(1.0, abs(x[k])) for x, y in lines for k in x if isinstance(x[k], float)]
    encoders = [load_encoder(run / "export/encoder.safetensors").state_dict() for run in (a, b)]
    return {
        "keys": one.keys() == other.keys(),
        "figures": max(figures),
        "parameters": _furthest(one, other),
        "moved": _furthest(begun, one),
        "encoder": _furthest(*encoders),
        "files": sorted(path.name.split("-")[0] for path in checkpoints(b / "checkpoints")[-1].iterdir()),
    }


def _furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel())


def compare(folder: Path, data: Path, cases: list[str]) -> dict[str, Any]:
    """Two ranks with all weights on each, and with half of each on each and blocks made again in the backward pass."""
    found = {}
    for case in cases:
        for shard in ("none", "full"):
            again = f"train.recompute={str(shard == 'full').lower()}"  # of blocks that are gathered and let go
            recipe = runs.recipe_of(case, *SAME, f"train.shard={shard}", again)

            def train(rank: int, out: Path = folder / f"{case}-{shard}", recipe: Any = recipe) -> None:
                pretrain(recipe, data=data, out=out)

            codes = runs.launch(2, train)
            if any(codes):
                raise RuntimeError(f"{case} with train.shard={shard} ended with {codes}")
        found[case] = difference(folder / f"{case}-none", folder / f"{case}-full", case, data)
    return found


def trained(data: Path, out: Path, *more: str, full: bool = True, **options: Any) -> Any:
    return runs.trained(data, out, f"train.shard={'full' if full else 'none'}", *more, **options)


def without_room(data: Path, out: Path) -> Any:
    """A run whose second rank finds the disk full at its second checkpoint."""
    train = trained(data, out)

    def do(rank: int) -> None:
        original, written = HuggingFaceStorageWriter.write_data, []

        def write_data(self: HuggingFaceStorageWriter, *arguments: Any) -> Any:
            written.append(self)
            if len(written) == 2 and rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(self, *arguments)

        sharded_files.HuggingFaceStorageWriter.write_data = write_data
        train(rank)

    return do


def faults(folder: Path) -> dict[str, Any]:
    """What is broken off and gone on with, on as many ranks and on others."""
    data, found = runs.cache_in(folder / "cache"), {}
    whole = folder / "whole"
    found["whole"] = runs.launch(2, trained(data, whole))
    out = folder / "stopped"
    found["stopped"] = [runs.launch(2, trained(data, out, fault=(1, 2, "SIGTERM")))]
    found["stopped"].append(runs.launch(2, trained(data, out, resume=True)))
    found["same_figures"] = runs.untimed(whole) == runs.untimed(out)
    found["same_state"] = _furthest(state(whole, "mae_vit_nano", data), state(out, "mae_vit_nano", data))
    kept, again = folder / "kept", folder / "again"
    for out, recompute in ((kept, "false"), (again, "true")):
        launched = runs.launch(2, trained(data, out, "train.precision=bf16", f"train.recompute={recompute}"))
        found[f"bf16_{out.name}"] = launched
    found["again_same_figures"] = runs.untimed(kept) == runs.untimed(again) != runs.untimed(whole)
    found["again_same_state"] = _furthest(state(kept, "mae_vit_nano", data), state(again, "mae_vit_nano", data))
    # Two ranks, then one with all weights, then two again: steps 1 to 2, 3 to 4, 5 to 6.
    out = folder / "moved"
    found["moved"] = [runs.launch(2, trained(data, out, fault=(0, 1, "SIGTERM")))]
    found["moved"].append(runs.launch(1, trained(data, out, resume=True)))
    found["moved"].append(runs.launch(1, trained(data, out, full=False, fault=(0, 3, "SIGTERM"), resume=True)))
    found["moved"].append(runs.launch(2, trained(data, out, resume=True)))
    losses = [[line["loss"] for line in runs.untimed(run) if "lr" in line] for run in (whole, out)]
    found["moved_loss"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    out = folder / "damaged"
    runs.launch(2, trained(data, out, fault=(0, 4, "SIGTERM")))
    (part,) = (out / "checkpoints/step_5").glob("shard-00002-*")
    part.write_bytes(part.read_bytes()[:-1])
    found["damaged"] = runs.launch(2, trained(data, out, resume=True))
    found["damaged_log"] = (out / "train.log").read_text()
    out = folder / "full"
    found["full"] = {"codes": runs.launch(2, without_room(data, out))}
    found["full"]["left"] = sorted(os.listdir(out / "checkpoints"))
    out = folder / "nan"
    found["nan"] = runs.launch(2, trained(data, out, "train.on_collapse=rollback", fault=(1, 3, "nan")))
    (kept,) = (out / "nan").iterdir()
    method = build_pretraining(runs.recipe_of("mae_vit_nano"), data).method
    method.load_state_dict(read_step(kept).state)  # raises where a part is missing
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for late in ("torch._dynamo", "torch.utils.tensorboard.writer"):  # else each process imports them
        importlib.import_module(late)
    where = Path(sys.argv[1])
    with open(where / "stderr", "w+") as told:  # not a pipe: processes that are left alone would fill it
        os.dup2(told.fileno(), 2)
        compared = compare(where / "compared", runs.cache_in(where / "cache"), sys.argv[2:])
        answer = {"compared": compared, **faults(where / "faults")}
    sys.stdout.write(json.dumps(answer | {"stderr": (where / "stderr").read_text()}))
