"""Kill -9 and SIGTERM at random moments of training, on one process and on two: is anything lost?

Run: uv run python benchmarks/bench_faults.py [--kills 50] [--quick]

Small runs of `dino`, `mae` and `croco` (random volumes, 12 steps, a checkpoint every 3) are hit up to three times, each
time begun again with `--resume`, then left to finish. `--kills` counts kill -9, of one rank or of all; there are two
fifths as many SIGTERM, to one rank or to all. Lost are runs of which a state tensor of the last checkpoint, or a line
of metrics.jsonl but for `timing`, differs from the undisturbed run's, and runs that don't go on.

Two ranks are two processes that meet over gloo by torchrun's variables. As torchrun does, a rank whose neighbour has
died is given a moment and then killed. Processes are forked from one that has everything imported, so that a hit seldom
falls into the imports. A kill is not a power cut: what the disk itself loses is not tested here.
The last line is one JSON object.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lungssl.cli import main as lungssl
from lungssl.training.checkpoint import checkpoints
from lungssl.training.logs import read_metrics
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.pair import PhasePair, PhaseScan, Split
from lungssl_ops.measure import commit, machine
from safetensors.torch import load_file

HITS_PER_RUN = 3
AT_START = 0.25
"""Share of hits at any moment from the start of the processes on; the others come within a step of one of those left,
whichever part of a run takes how long on this machine."""
STEPS = 12
MOMENT_S = 5.0
"""What a rank is given to see that its neighbour has died."""
COMMON = (
    f"train.steps={STEPS} train.batch=2 train.checkpoint_every=3 train.eval_every=4 train.eval_batches=1 "
    "train.log_every=1 data.crop_vox=[20,24,22] views.global_vox=16 views.local_vox=8 backbone.dim=48"
).split()
DECODER = "method.decoder_width=24 method.decoder_depth=1 method.decoder_heads=2 method.mask_unit_tokens=1".split()
RUNS = {
    "dino": ["dino_vit_nano", *COMMON, "method.prototypes=32", "method.head_hidden=16", "method.head_bottleneck=8"],
    "mae": ["mae_vit_nano", *COMMON, *DECODER],
    "croco": ["croco_vit_nano", *COMMON, *DECODER],
}


@dataclass(frozen=True)
class Kind:
    """One sort of run."""

    method: str
    ranks: int

    def words(self, data: Path, out: Path) -> list[str]:
        """Of the command that starts or continues it."""
        return ["pretrain", *RUNS[self.method], "--data", str(data), "--out", str(out), "--resume"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="2 kills and 1 SIGTERM, mae alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    kinds = [Kind(method, ranks) for method in RUNS for ranks in (1, 2)]
    hits = ["SIGKILL"] * options.kills + ["SIGTERM"] * round(0.4 * options.kills)
    if options.quick:
        kinds, hits = [Kind("mae", 2)], ["SIGKILL", "SIGKILL", "SIGTERM"]
    torch.set_num_threads(1)
    for late in ("lungssl.pretraining", "torch._dynamo", "torch.utils.tensorboard.writer"):  # else each imports them
        importlib.import_module(late)
    rng.shuffle(hits)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small_cache(root / "data")
        whole_s: dict[Kind, float] = {}
        for kind in kinds:
            started = time.monotonic()
            codes = [wait(pid) for pid in start(kind, root / "data", root / name_of(kind))]
            if any(codes):
                raise RuntimeError(f"an undisturbed run of {kind} ended with {codes}:\n{told(root / name_of(kind))}")
            whole_s[kind] = time.monotonic() - started
        while hits:
            kind = kinds[len(rows) % len(kinds)]
            some, hits = hits[:HITS_PER_RUN], hits[HITS_PER_RUN:]
            row = disturbed(kind, root / "data", root / "out", some, rng, whole_s[kind])
            row["lost"] = row["codes"] if any(row["codes"]) else differences(root / name_of(kind), root / "out")
            if row["lost"]:
                print(told(root / "out"), file=sys.stderr)
            shutil.rmtree(root / "out")
            rows.append(row)
            print(row, flush=True)
    result = {
        "benchmark": "faults",
        "ratios": {},
        "checks": {
            "runs": len(rows),
            "lost": sum(bool(row["lost"]) for row in rows),
            "kills": sum(row["hits"].count("SIGKILL") for row in rows),
            "sigterms": sum(row["hits"].count("SIGTERM") for row in rows),
            "hits_before_the_end": sum(row["before_the_end"] for row in rows),
        },
        "machine": machine("cpu"),
        "commit": commit(),
        "rows": rows,
    }
    name = "faults_quick.json" if options.quick else "faults.json"
    (options.out / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


def name_of(kind: Kind) -> str:
    return f"{kind.method}-{kind.ranks}"


def disturbed(
    kind: Kind, data: Path, out: Path, hits: Sequence[str], rng: random.Random, whole_s: float
) -> dict[str, Any]:
    """Begin a run, hit it, go on, and leave the last alone."""
    moments, before_the_end, steps = [], 0, []
    for hit in hits:
        began, before = time.monotonic(), logged(out)
        children = start(kind, data, out)
        if rng.random() < AT_START or before >= STEPS:
            time.sleep(rng.random() * whole_s * 0.8)
        else:
            await_step(out, rng.randint(before + 1, STEPS), children)
            time.sleep(rng.random() * whole_s / STEPS)
        moment_s = time.monotonic() - began
        chosen = children if rng.random() < 0.5 else [rng.choice(children)]
        before_the_end += struck(children, chosen, getattr(signal, hit))
        moments.append(round(moment_s, 2))
        steps.append(int(found[-1].name[5:]) if (found := checkpoints(out / "checkpoints")) else 0)
    codes = [wait(pid) for pid in start(kind, data, out)]
    return {
        "method": kind.method,
        "ranks": kind.ranks,
        "hits": list(hits),
        "moments_s": moments,
        "before_the_end": before_the_end,
        "went_on_from": steps,
        "codes": codes,
    }


def logged(out: Path) -> int:
    """The last step that metrics.jsonl tells of, 0 without one."""
    file = out / "metrics.jsonl"
    lines = read_metrics(file) if file.is_file() else []
    return lines[-1]["step"] if lines else 0


def await_step(out: Path, step: int, children: Sequence[int]) -> None:
    """Until a step is logged, or one of the run's processes has ended."""
    while logged(out) < step:
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None for pid in children):
            return
        time.sleep(0.01)


def struck(children: Sequence[int], chosen: Sequence[int], number: int) -> bool:
    """Send a signal to some of a run's processes and wait for all; whether one of those was still there."""
    hit = False
    for pid in chosen:
        hit |= os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        os.kill(pid, number)  # a child that nobody has waited for is there to be signalled, if only as a zombie
    left, until = set(children), time.monotonic() + 600.0
    while left:
        ended = {pid: status for pid in left for found, status in [os.waitpid(pid, os.WNOHANG)] if found == pid}
        left -= set(ended)
        if any(ended.values()):  # killed, or SIGTERM before training listens: its neighbour waits for it in vain
            until = min(until, time.monotonic() + MOMENT_S)
        if left and time.monotonic() > until:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return hit


def start(kind: Kind, data: Path, out: Path) -> list[int]:
    """Fork the processes of a run that starts or goes on; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [forked(kind, rank, port, data, out) for rank in range(kind.ranks)]


def forked(kind: Kind, rank: int, port: int, data: Path, out: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{kind.ranks}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        code = lungssl(kind.words(data, out))
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a process that nobody hits."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def told(out: Path) -> str:
    """The end of what a run's processes printed."""
    return out.with_suffix(".log").read_text()[-3000:]


def differences(whole: Path, out: Path) -> list[str]:
    """Tensors of the last checkpoint that differ, and `metrics.jsonl` where a line does."""
    one, other = last_state(whole), last_state(out)
    found = [
        name
        for name in sorted({*one, *other})
        if name not in one or name not in other or unlike(one[name], other[name])
    ]
    lines = [
        [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(run / "metrics.jsonl")]
        for run in (whole, out)
    ]
    return found + ["metrics.jsonl"] * (lines[0] != lines[1])


def unlike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype != other.dtype or not torch.equal(one, other)


def last_state(run: Path) -> Mapping[str, torch.Tensor]:
    newest = checkpoints(run / "checkpoints")[-1]
    state = load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")
    return state | {newest.name: torch.zeros(1)}


def small_cache(folder: Path) -> None:
    """Pairs of noisy balls with a lung in them: three patients to train on, one held out."""
    splits: tuple[Split, ...] = ("train", "train", "train", "val")
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        scans = {}
        for phase, shape, lung_hu in (("exhale", (26, 30, 33), -650), ("inhale", (31, 30, 33), -800)):
            z, y, x = (np.indices(shape).T / shape - 0.5).T
            lung = z**2 + y**2 + x**2 < 0.16
            scans[phase] = PhaseScan(
                ct_hu=(np.where(lung, lung_hu, 40) + rng.normal(0, 60, shape)).astype(np.int16),
                valid=np.ones(shape, np.uint8),
                lung=np.where(lung, 1 + (x > 0), 0).astype(np.uint8),
                spacing_mm=(3.0, 3.0, 3.0),
                origin_mm=(-40.0, 12.0, 5.0),
            )
        pair = PhasePair(
            patient=f"p{number}",
            exhale=scans["exhale"],
            inhale=scans["inhale"],
            exhale_to_inhale=np.eye(3, 4),
            affine_provenance="none",
            split=split,
            key=f"key-{number}",
        )
        write_pair(pair, folder)
    PairCache(folder).close()  # writes its index, once


if __name__ == "__main__":
    main()
