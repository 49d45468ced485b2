"""What frozen features are worth in a registration's search: encoders beside raw intensities and MIND-SSC.

Run: uv run python benchmarks/bench_frozen_features.py --runs DIR [--methods NAMES] [--seeds 0,1,2] [--patients N]
     [--network RUN]

`--runs`: the runs folder of a comparison of plan `methods` (`benchmarks/pilot.py --parts methods`), whose encoders were
pretrained on its phantoms of 4 mm for 160 steps and are read frozen. Judged on the test phantoms of that plan, which no
encoder saw, and on the open semi-synthetic pairs of `../shared/data`, if there, which are of other scanners: the
domain shift is part of the figure. The same affine for all; TRE in mm of `coarse` (the search alone) with the features
alone (share 1) and beside MIND-SSC (0.5), and of `default` with the search so led. Every pyramid level's features, each
of unit length, tokens 8 mm apart or less. `--network`: also a run of `finetune register`, whose answer takes the place
of the search; it is trained on pairs, and no frozen feature. Results in `results/frozen_features.json`; the last
line is one JSON object.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_registration import DATA, OPEN, Case, load
from lungssl.cohort import builtin_cohort
from lungssl.comparison.plan import Pretrain, load_plan, pretrain_runs
from lungssl.registering import encoder_features, network_start
from lungssl.registration_scoring import truths
from lungssl.segmenting import model_folder
from lungssl_backbones.encoder import Encoder
from lungssl_backbones.weights import load_encoder
from lungssl_data.cache import PairCache
from lungssl_data.pair import PhaseScan
from lungssl_ops.measure import commit, machine
from lungssl_tasks.model_folder import load_displacements
from lungssl_tasks.registration import PRESETS, RegistrationConfig, register
from lungssl_tasks.registration.alignment import AlignmentConfig, align
from lungssl_tasks.registration.common_grid import LUNG_HU
from lungssl_tasks.registration.network import DisplacementModel
from lungssl_tasks.registration.register import Start
from lungssl_tasks.registration.scores import landmark_errors
from scipy import ndimage

HERE = Path(__file__).parent
NAMES = ("untrained", "mae", "dino", "phase_dino", "croco", "untrained_cnn", "spark", "vox2vec", "paired_dense")
ENCODER_MM = 4.0
CPU = torch.device("cpu")
Features = Callable[[str, np.ndarray], torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A pair with its affine, as registration sees it and as encoders do."""

    group: str
    name: str
    case: Case
    affine: np.ndarray
    seen: dict[str, PhaseScan]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(NAMES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--patients", type=int, default=None)
    parser.add_argument("--network", type=Path, default=None)
    options = parser.parse_args()
    plan = load_plan("methods", [])
    assert plan.shift is not None
    data, shift = builtin_cohort(plan.phantoms, say=say), builtin_cohort(plan.shift, say=say)
    runs = pretrain_runs(plan, PairCache(data).fingerprint(), PairCache(shift).fingerprint())
    methods, seeds = options.methods.split(","), options.seeds.split(",")
    found = dict(encoders(options.runs, [run for run in runs if run.arm in methods and str(run.seed) in seeds]))
    windows_mm = {run.arm: run.window_vox * ENCODER_MM for run in runs}
    network = None if options.network is None else load_displacements(model_folder(options.network))
    path = HERE / "results" / "frozen_features.json"
    rows = (
        {(r["method"], r["seed"], r["pair"]): r for r in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    )
    for subject in subjects(PairCache(data), options.patients):
        todo: dict[tuple[str, str], Path | None] = {("mind", ""): None, ("raw", ""): None, **found}
        if network is not None:
            todo["network", ""] = None
        for (method, seed), weights in todo.items():
            row = {"group": subject.group, "pair": subject.name, "method": method, "seed": seed}
            if method == "network":
                assert network is not None
                row |= started_by(subject, network)
            else:
                row |= measured(subject, method, weights, windows_mm.get(method))
            rows[method, seed, subject.name] = row | {"commit": commit()}
            say(json.dumps(row))
        lines = ",\n".join(json.dumps(one) for one in rows.values())
        path.write_text(
            f'{{"benchmark": "frozen_features", "machine": {json.dumps(machine("cpu"))}, "rows": [\n{lines}\n]}}\n'
        )
    print(json.dumps({"benchmark": "frozen_features", **table(list(rows.values())), "commit": commit()}))


def encoders(folder: Path, runs: list[Pretrain]) -> Iterator[tuple[tuple[str, str], Path]]:
    """Weights by method and seed; what isn't there is said."""
    for run in runs:
        path = folder / run.id / "export" / "encoder.safetensors"
        if path.is_file():
            yield (run.arm, str(run.seed)), path
        else:
            say(f"{run.id}: no encoder in {folder.name}")


def subjects(cache: PairCache, most: int | None) -> Iterator[Subject]:
    """Test phantoms, then the open pairs."""
    for patient in cache.split("test")[:most]:
        pair = cache[patient]
        scans = {"fixed": pair.scan("exhale"), "moving": pair.scan("inhale")}
        here, there = next(iter(truths(cache, pair).values()))  # the displacement: phantoms have no landmarks
        case = Case(fixed=scans["fixed"], moving=scans["moving"], points_mm=here, true_mm=there, near_pleura=None)
        yield subject("phantoms", patient, case, scans)
    for name in OPEN if DATA.is_dir() else ():
        coarse = load(name, ENCODER_MM)
        yield subject("open", name, load(name, 2.0), {"fixed": coarse.fixed, "moving": coarse.moving})


def subject(group: str, name: str, case: Case, seen: dict[str, PhaseScan]) -> Subject:
    affine = align(case.fixed, case.moving, AlignmentConfig(), device=CPU)
    return Subject(group=group, name=name, case=case, affine=affine, seen=seen)


def measured(subject: Subject, method: str, weights: Path | None, window_mm: float | None) -> dict[str, Any]:
    """Mean TRE of the affine, of features alone and beside MIND-SSC, and after descent; seconds of the search alone."""
    case = subject.case
    features: Features | None = None
    if method == "raw":
        features = raw(subject.seen)
    elif weights is not None:
        assert window_mm is not None, f"plan methods has no arm {method}"
        encoder = load_encoder(weights)
        assert isinstance(encoder, Encoder)
        features = encoder_features(encoder, subject.seen, window_mm=window_mm)
    there = case.points_mm @ subject.affine[:, :3].T + subject.affine[:, 3]
    row = {"affine_mm": round(landmark_errors(there, case.true_mm, case.points_mm).mean_mm, 3)}
    beside = {} if features is None else {"beside_mm": (PRESETS["coarse"], 0.5)}
    for name, (preset, share) in {
        "alone_mm": (PRESETS["coarse"], 1.0),
        **beside,
        "default_mm": (PRESETS["default"], 1.0),
    }.items():
        config = dataclasses.replace(preset, search=dataclasses.replace(preset.search, given_share=share))
        row |= tre(case, config, subject.affine, features, name)
    return row


def started_by(subject: Subject, network: DisplacementModel) -> dict[str, Any]:
    """As `measured`, the network in place of the search."""
    there = subject.case.points_mm @ subject.affine[:, :3].T + subject.affine[:, 3]
    row = {"affine_mm": round(landmark_errors(there, subject.case.true_mm, subject.case.points_mm).mean_mm, 3)}
    start = network_start(network, subject.seen)
    for name, preset in {"alone_mm": "coarse", "default_mm": "default"}.items():
        row |= tre(subject.case, PRESETS[preset], subject.affine, None, name, start)
    return row


def tre(
    case: Case,
    config: RegistrationConfig,
    affine: np.ndarray,
    features: Features | None,
    name: str,
    start: Start | None = None,
) -> dict[str, Any]:
    started = time.perf_counter()
    found = register(case.fixed, case.moving, config, affine=affine, features=features, start=start)
    seconds = time.perf_counter() - started
    errors = landmark_errors(case.points_mm + found.at(case.points_mm), case.true_mm, case.points_mm)
    row = {name: round(errors.mean_mm, 3), name.replace("mm", "p95_mm"): round(errors.p95_mm, 3)}
    return row | ({"search_s": round(seconds, 2)} if name == "alone_mm" else {})


def raw(scans: dict[str, PhaseScan]) -> Features:
    """Clipped HU at points, linear between voxels."""

    def features(role: str, points_mm: np.ndarray) -> torch.Tensor:
        scan = scans[role]
        index = ((points_mm - scan.origin_mm) / np.asarray(scan.spacing_mm))[:, ::-1].T
        low, high = LUNG_HU
        hu = np.clip(scan.ct_hu, low, high).astype(np.float32)
        return torch.from_numpy(ndimage.map_coordinates(hu, index, order=1, mode="nearest"))[:, None]

    return features


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By group and method: means over pairs and seeds, and the standard deviation over seeds of the first."""
    held: dict[str, Any] = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        held[group] = {}
        for method in dict.fromkeys(row["method"] for row in rows):
            some = [row for row in rows if row["group"] == group and row["method"] == method]
            if not some:
                continue
            names = [name for name in some[0] if name.endswith(("_mm", "_s"))]
            held[group][method] = {name: round(float(np.mean([row[name] for row in some])), 2) for name in names}
            of_seed = {row["seed"]: [one["alone_mm"] for one in some if one["seed"] == row["seed"]] for row in some}
            seeds = [float(np.mean(values)) for values in of_seed.values()]
            held[group][method]["sd_of_seeds_mm"] = round(float(np.std(seeds, ddof=1)), 2) if len(seeds) > 1 else None
    return {"means": held}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
