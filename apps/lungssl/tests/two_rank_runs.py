"""Runs of `pretrain` on one process and on two, for test_ranks.py: `python two_rank_runs.py FOLDER CASE ...`.

Prints one JSON object. Processes are forked from one that has everything imported, which takes longer than the runs.
"""

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import test_pretraining as recipes
import torch
from lungssl import pretraining
from lungssl.cli import main
from lungssl.config import Recipe, load_recipe
from lungssl.pretraining import Pretraining, pretrain
from lungssl.training import loop
from lungssl.training.checkpoint import checkpoints
from lungssl.training.logs import read_metrics
from lungssl_data.batch import CropBatch, PairBatch
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.views import ViewSampler
from lungssl_methods import dino
from safetensors.torch import load_file, save_file

SMALL = (
    "train.steps=3 train.batch=4 train.log_every=1 train.eval_every=3 train.eval_batches=2 train.warmup=0 "
    "train.lr=3e-2 train.final_lr=1e-2 train.clip=1 train.precision=fp32"
).split()
CASES: dict[str, tuple[str, list[str]]] = {name: (name, []) for name in (*recipes.RECIPES, *recipes.SWAPPED)}
CASES["dino_sinkhorn_koleo"] = (
    "dino_vit_nano",
    "method.centering=sinkhorn method.koleo_weight=0.1 method.patch_weight=1 method.mask_unit_tokens=1".split(),
)
CASES["mae_accumulated"] = ("mae_vit_nano", ["train.accumulate=2"])
CASES["mae_dropping_paths"] = ("mae_vit_nano", ["backbone.drop_path=0.5", "backbone.depth=3"])


def launch(ranks: int, do: Callable[[int], None]) -> list[int]:
    """Fork `ranks` processes that meet by torchrun's variables; the exit codes, 0 where `do` returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_forked(rank, ranks, port, do) for rank in range(ranks)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _forked(rank: int, ranks: int, port: int, do: Callable[[int], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        do(rank)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def cache_in(folder: Path) -> Path:
    """Four patients, one of one phase, with displacements that are 0."""
    for patient, split in (("a", "train"), ("b", "train"), ("c", "train"), ("d", "val")):
        phases = ("exhale",) if patient == "c" else ("exhale", "inhale")
        write_pair(recipes._pair(patient, split, (3.0, 3.0, 3.0), phases), folder)
    PairCache(folder).close()
    return folder


def recipe_of(case: str, *more: str) -> Recipe:
    name, changes = CASES[case]
    base = recipes.SWAPPED.get(name)
    if base is not None:
        return load_recipe("mae_vit_nano", [*recipes.TINY, "backbone.dim=48", *base, *SMALL, *changes, *more])
    return load_recipe(name, [*recipes.RECIPES[name], *SMALL, *changes, *more])


def state(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    newest = checkpoints(run / "checkpoints")[-1]
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


def untimed(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl but for `timing`."""
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(run / "metrics.jsonl")]


def equal(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same bits and told the same figures."""
    one, other = state(a), state(b)
    same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return same and untimed(a) == untimed(b)


def difference(a: Path, b: Path) -> dict[str, float]:
    """Greatest difference of training and held-out losses (relative above 1) and of a tensor, and a tensor's move."""
    losses = [
        [line.get("loss", line.get("val/loss")) for line in untimed(run) if "loss" in line or "val/loss" in line]
        for run in (a, b)
    ]
    one, other, start = state(a), state(b), load_file(a / "start.safetensors")
    floats = [name for name, value in one.items() if value.is_floating_point()]
    return {
        "loss": max(abs(x - y) / max(1.0, abs(x)) for x, y in zip(*losses, strict=True)),
        "parameters": max(float((one[name] - other[name]).abs().max()) for name in floats),
        "moved": max(float((one[name] - start[name]).abs().max()) for name in floats if name in start),
        "lines": len(losses[0]),
    }


def without_rounding() -> None:
    """All in float64, by plain gradient descent: AdamW's first steps have one size whatever the gradient, so that the
    rounding of a gradient that should be 0 would show as a step."""
    make_optimizer, build, narrow = loop.make_optimizer, pretraining.build_pretraining, torch.Tensor.float

    def built(*arguments: Any, **options: Any) -> Pretraining:
        parts = build(*arguments, **options)
        return replace(parts, method=parts.method.double())

    def widened(sample: Callable[..., PairBatch]) -> Callable[..., PairBatch]:
        def views(*arguments: Any) -> PairBatch:
            torch.Tensor.float = narrow  # what is not the method's stays as it is
            torch.set_default_dtype(torch.float32)
            batch = sample(*arguments)
            torch.set_default_dtype(torch.float64)
            torch.Tensor.float = torch.Tensor.double
            return _double(replace(batch, views=tuple(_double(view) for view in batch.views)))

        return views

    loop.make_optimizer = lambda module, config: torch.optim.SGD(make_optimizer(module, config).param_groups, lr=1e-3)
    pretraining.build_pretraining = built
    Pretraining.probe_set = lambda self: None
    ViewSampler.__call__, ViewSampler.plain = widened(ViewSampler.__call__), widened(ViewSampler.plain)
    torch.Tensor.float = torch.Tensor.double


def _double(data: Any) -> Any:
    """A dataclass with its floating-point tensors widened."""
    values = {one.name: getattr(data, one.name) for one in fields(data)}
    floats = {k: v.double() for k, v in values.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return replace(data, **floats)


def compare(folder: Path, cases: list[str]) -> dict[str, Any]:
    """One process with all samples, and two with half each."""
    data, found = cache_in(folder / "cache"), {}
    dino.KOLEO_FROM_PATIENTS = 2
    for case in cases:
        for ranks in (1, 2):
            out = folder / f"{case}-{ranks}"

            def train(rank: int, out: Path = out, case: str = case) -> None:
                without_rounding()
                begin = pretraining.build_pretraining(recipe_of(case), data).method.state_dict()
                pretrain(recipe_of(case), data=data, out=out)
                if rank == 0:
                    save_file({name: value.clone() for name, value in begin.items()}, out / "start.safetensors")

            codes = launch(ranks, train)
            if any(codes):
                raise RuntimeError(f"{case} on {ranks} ranks ended with {codes}")
        found[case] = difference(folder / f"{case}-1", folder / f"{case}-2")
    return found


def trained(data: Path, out: Path, *more: str, fault: tuple[int, int, str] | None = None, resume: bool = False) -> Any:
    """A function for `launch`: six steps of mae; `fault`: at rank and micro-batch, a signal's name, or "nan"."""
    arguments = ["pretrain", "mae_vit_nano", *recipes.RECIPES["mae_vit_nano"], *SMALL, "train.steps=6"]
    arguments += ["train.eval_batches=0", "train.checkpoint_every=2", *more]
    arguments += ["--data", str(data), "--out", str(out), *(["--resume"] if resume else [])]

    def do(rank: int) -> None:
        original = Pretraining.prepare

        def prepare(self: Pretraining, crops: CropBatch, index: int) -> Any:
            views = original(self, crops, index)
            if fault is not None and fault[:2] == (rank, index):
                if fault[2] == "nan":
                    views.views[0].image[:] = torch.nan
                else:
                    os.kill(os.getpid(), getattr(signal, fault[2]))
            return views

        Pretraining.prepare = prepare
        raise SystemExit(main(arguments))

    return do


def newest(run: Path) -> str:
    return checkpoints(run / "checkpoints")[-1].name


def faults(folder: Path) -> dict[str, Any]:
    """What one rank's trouble does to both, and what is left of it."""
    data, found = cache_in(folder / "cache"), {}
    one, two = folder / "whole1", folder / "whole2"
    found["whole"] = [launch(1, trained(data, one)), launch(2, trained(data, two))]
    for name in ("SIGTERM", "SIGKILL"):
        out = folder / name
        micro = 2 if name == "SIGTERM" else 3
        entry = {"codes": launch(2, trained(data, out, fault=(1, micro, name))), "newest": newest(out)}
        found[name.lower()] = entry | {"resumed": launch(2, trained(data, out, resume=True)), "equal": equal(two, out)}
    out = folder / "nan"
    found["nan"] = {"codes": launch(2, trained(data, out, fault=(1, 3, "nan"))), "newest": newest(out)}
    found["nan"]["kept"] = sorted(path.name for path in (out / "nan").iterdir())
    found["odd"] = launch(2, trained(data, folder / "odd", "train.batch=5"))
    found["auto"] = [launch(2, trained(data, folder / "auto", "train.batch=auto"))]
    found["auto"].append((folder / "auto/train.log").read_text())
    # Two ranks, then one, then two again: steps 1 to 2, 3 to 4, 5 to 6.
    out = folder / "moved"
    found["moved"] = [launch(2, trained(data, out, fault=(0, 1, "SIGUSR1")))]
    found["moved"].append(launch(1, trained(data, out, fault=(0, 3, "SIGTERM"), resume=True)))
    found["moved"].append(launch(2, trained(data, out, resume=True)))
    losses = [[line["loss"] for line in untimed(run) if "lr" in line] for run in (one, out)]
    found["moved_loss"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    found["log"] = (out / "train.log").read_text()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for late in ("torch._dynamo", "torch.utils.tensorboard.writer"):  # else each process imports them
        importlib.import_module(late)
    where = Path(sys.argv[1])
    with open(where / "stderr", "w+") as told:  # not a pipe: processes that are left alone would fill it
        os.dup2(told.fileno(), 2)
        answer = {"compared": compare(where / "compared", sys.argv[2:]), **faults(where / "faults")}
    sys.stdout.write(json.dumps(answer | {"stderr": (where / "stderr").read_text()}))
