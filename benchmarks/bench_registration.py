"""Registration of inhale to exhale, ours and the peers: the same pairs, the same affine, each in its own process.

Run: uv run python benchmarks/bench_registration.py [--peer-python PYTHON] [--pairs NAMES] [--methods NAMES] [--quick]

Pairs: four semi-synthetic ones and a real one with landmarks from `../shared/data`, if there, and phantoms of 2 mm
(held-out seeds, both families of motion) whose whole displacement is known. TRE in mm at sub-voxel places, folding and
SD of ln J as `lungssl_tasks.registration.scores` defines them, seconds of registering (imports and files left out, the
affine's in) and peak memory of the process. `--peer-python`: an interpreter with antspyx, itk-elastix, convexAdam and
SimpleITK; peers that it lacks are named and left out. Results go on from `results/registration.json`, a method's rows
replaced when measured again; `--quick`: a phantom of 6 mm and ten steps of descent, apart. The last line is one JSON
object; a ratio is the peer's mean TRE by ours.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lungssl_data.pair import PhaseScan
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.prepare import PrepareConfig, prepare_scan
from lungssl_data.readers import read_labels, read_volume
from lungssl_data.volume import LabelMap
from lungssl_ops.measure import commit, machine
from lungssl_tasks.registration import PRESETS, Registration, RegistrationConfig, Trust, register
from lungssl_tasks.registration.alignment import AlignmentConfig, align
from lungssl_tasks.registration.common_grid import LUNG_HU, common_grid
from lungssl_tasks.registration.descent import DescentConfig, Level
from lungssl_tasks.registration.scores import field_scores, landmark_errors
from registration_peers import most_memory_mb

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data"
PEERS = ("affine", "convexadam", "demons", "syn", "elastix")
OPEN = ("o1_lung2_param", "o2_lung2_copd6", "o3_elxB_param", "o4_elxB_copd8")
PHANTOMS = {
    "phantom_deep": ("deep", "charts", 9001),
    "phantom_ards": ("ards", "charts", 9002),
    "phantom_ffd": ("deep", "ffd", 9003),
}
"""Preset, motion and seed. Weights were chosen on seeds 5001 and 6002."""
UNJUDGED = Trust(
    overlap=0.0,
    unseen_share=0.0,
    similarity=0.0,
    disagreement_mm=0.0,
    folded_share=0.0,
    jacobian_sd=0.0,
    volume_ratio=0.0,
    doubts=(),
)
"""Of fields that aren't ours."""
OURS = {
    **PRESETS,
    "default_diffeomorphic": dataclasses.replace(
        PRESETS["default"], descent=dataclasses.replace(PRESETS["default"].descent, diffeomorphic=True)
    ),
}
DENSE_POINTS = 20_000
"""Lung voxels that a phantom's end-point error is taken at."""
NEAR_PLEURA_MM = 10.0
FEW_POINTS = 50
"""Of so few landmarks each one's error is kept: what methods err alike is the landmarks' own."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair, as the preset's voxels show it, and points whose places are known."""

    fixed: PhaseScan
    moving: PhaseScan
    points_mm: np.ndarray
    true_mm: np.ndarray
    near_pleura: np.ndarray | None
    """Of the points, which lie near the lung's edge; where the whole displacement is known."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--pairs", default=None)
    parser.add_argument("--methods", default=None)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    known = ["phantom_quick"] if options.quick else [*OPEN, "elastix_real", *PHANTOMS]
    pairs = options.pairs.split(",") if options.pairs else known
    methods = options.methods.split(",") if options.methods else [*OURS, *PEERS]
    if options.quick and not options.methods:
        methods = ["fast", "affine"]
    out = HERE / "results" / f"registration{'_quick' if options.quick else ''}.json"
    rows = {(row["pair"], row["method"]): row for row in json.loads(out.read_text())["rows"]} if out.is_file() else {}
    for pair in pairs:
        if pair not in known:
            parser.error(f"unknown pair {pair}; known: {', '.join(known)}")
        if not pair.startswith("phantom") and not DATA.is_dir():
            print(f"{pair}: {DATA.name} isn't here, left out", file=sys.stderr)
            continue
        for method, row in measured(pair, methods, options.peer_python, quick=options.quick):
            rows[pair, method] = {"pair": pair, "method": method, **row, "commit": commit(), "machine": machine("cpu")}
            print(json.dumps(rows[pair, method]), file=sys.stderr, flush=True)
            lines = ",\n".join(json.dumps(one) for one in rows.values())
            out.write_text(f'{{"benchmark": "registration", "rows": [\n{lines}\n]}}\n')
    print(json.dumps({"benchmark": "registration", **verdict(list(rows.values())), "commit": commit()}))


def measured(pair: str, methods: list[str], python: str, *, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one pair, method by method."""
    for method in methods:
        config = OURS.get(method, PRESETS["default"])
        if quick:
            level = Level(spacing_mm=6.0, iterations=10)
            config = RegistrationConfig(spacing_mm=6.0, descent=DescentConfig(levels=(level,)))
        case = load(pair, config.spacing_mm)
        with tempfile.TemporaryDirectory() as folder:
            if method in OURS:
                found, seconds, peak_mb = apart(ours, case, config)
            else:
                answer = by_peer(method, case, python, Path(folder))
                if isinstance(answer, str):
                    print(f"{method}: left out, {answer}", file=sys.stderr)
                    continue
                found, seconds, peak_mb = answer
        yield method, {"seconds": round(seconds, 2), "peak_mb": round(peak_mb), **scored(case, found)}


def ours(case: Case, config: RegistrationConfig) -> tuple[Registration, float]:
    """Kernels are loaded on a small part first, as imports are."""
    part = [
        dataclasses.replace(
            s, **{n: getattr(s, n)[::4, ::4, ::4] for n in ("ct_hu", "valid", "lung")}, lobes=None, lesion=None
        )
        for s in (case.fixed, case.moving)
    ]
    register(
        part[0],
        part[1],
        dataclasses.replace(config, descent=DescentConfig(levels=(Level(spacing_mm=config.spacing_mm, iterations=1),))),
    )
    started = time.perf_counter()
    found = register(case.fixed, case.moving, config)
    return found, time.perf_counter() - started


def apart(function: Any, *arguments: Any) -> tuple[Registration, float, float]:
    """In a process of its own, for its peak memory in MB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (found, seconds), peak_mb = pool.apply(_with_peak, (function, arguments))
    return found, seconds, peak_mb


def _with_peak(function: Any, arguments: tuple[Any, ...]) -> tuple[Any, float]:
    found = function(*arguments)
    return found, most_memory_mb()


def by_peer(method: str, case: Case, python: str, folder: Path) -> tuple[Registration, float, float] | str:
    """A peer's field after our affine, or why there is none."""
    device = torch.device("cpu")
    started = time.perf_counter()
    affine = align(case.fixed, case.moving, AlignmentConfig(), device=device)
    affine_s = time.perf_counter() - started
    pair = common_grid(case.fixed, case.moving, affine, multiple=1, device=device)
    arrays = {
        "fixed": pair.fixed_hu.clamp(*LUNG_HU),
        "moving": pair.moving_hu.clamp(*LUNG_HU),
        "fixed_lung": pair.fixed_lung,
        "moving_lung": pair.moving_lung,
    }
    held = {name: values[0, 0].numpy() for name, values in arrays.items()}
    np.savez(folder / "in.npz", allow_pickle=False, spacing_mm=np.array(pair.spacing_mm), **held)
    command = [python, str(HERE / "registration_peers.py"), method, str(folder / "in.npz"), str(folder / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    with np.load(folder / "out.npz") as held:
        v_mm, seconds, peak_mb = held["v_mm"], float(held["seconds"]), float(held["peak_mb"])
    grid = case.fixed.geometry()
    return Registration(affine=affine, v_mm=v_mm, grid=grid, trust=UNJUDGED), seconds + affine_s, peak_mb


def scored(case: Case, found: Registration) -> dict[str, Any]:
    """TRE, regularity, inverse consistency, and for phantoms the error near the pleura by that of the whole lung."""
    predicted = case.points_mm + found.at(case.points_mm)
    error = landmark_errors(predicted, case.true_mm, case.points_mm)
    scan = case.fixed
    field = field_scores(found.on_grid(scan.geometry()), scan.lung > 0, scan.spacing_mm)
    back = np.linalg.norm(predicted + found.back(predicted) - case.points_mm, axis=1)
    row = {name: round(value, 3) for name, value in dataclasses.asdict(error).items()}
    row |= {name: round(value, 5) for name, value in dataclasses.asdict(field).items()}
    row |= {"inverse_p95_mm": round(float(np.nanpercentile(back, 95)), 3), "no_inverse": float(np.isnan(back).mean())}
    if len(case.points_mm) <= FEW_POINTS:
        row["residuals_mm"] = (predicted - case.true_mm).round(2).tolist()
    if case.near_pleura is not None:
        each = np.linalg.norm(predicted - case.true_mm, axis=1)
        row["pleura_ratio"] = round(float(each[case.near_pleura].mean() / each.mean()), 3)
    return row


def load(pair: str, spacing_mm: float) -> Case:
    """A pair brought to cubes of `spacing_mm`, as `lungssl register` brings it."""
    if pair.startswith("phantom"):
        return phantom_case(
            *PHANTOMS.get(pair, ("deep", "charts", 9000)), spacing_mm=spacing_mm, fine=pair != "phantom_quick"
        )
    if pair == "elastix_real":
        folder = DATA / "elastix_lung"
        names = {"fixed": "3DCT_lung_baseline", "moving": "3DCT_lung_followup"}
        table = np.loadtxt(folder / "landmarks_open.csv", delimiter=",", skiprows=1)[:, 1:]
        scans = {
            role: prepared(folder / f"{name}.mha", folder / f"{name}_mask.mha", spacing_mm)
            for role, name in names.items()
        }
    else:
        folder = DATA / "registration_open" / pair
        table = np.loadtxt(folder / "landmarks.csv", delimiter=",", skiprows=1)
        scans = {
            role: prepared(folder / f"{role}.nii.gz", folder / f"{role}_mask.nii.gz", spacing_mm)
            for role in ("fixed", "moving")
        }
    return Case(
        fixed=scans["fixed"], moving=scans["moving"], points_mm=table[:, :3], true_mm=table[:, 3:], near_pleura=None
    )


def prepared(image: Path, mask: Path, spacing_mm: float) -> PhaseScan:
    """With one code for all that is lung."""
    labels = read_labels(mask)
    lung = LabelMap(labels=(labels.labels > 0).astype(np.uint8), geometry=labels.geometry)
    return prepare_scan(read_volume(image), config=PrepareConfig(spacing_mm=spacing_mm), lung=lung)


def phantom_case(preset: Any, motion: Any, seed: int, *, spacing_mm: float, fine: bool) -> Case:
    """Scanned at 2 mm (at `spacing_mm` unless `fine`), brought to `spacing_mm`; half the texture in common."""
    import edt

    voxel_mm = 2.0 if fine else spacing_mm
    phantom = make_phantom(PhantomConfig(preset=preset, motion=motion, seed=seed, spacing_mm=voxel_mm, texture_rho=0.5))
    fixed, moving = (
        prepare_scan(
            phase.ct,
            config=PrepareConfig(spacing_mm=spacing_mm),
            lung=LabelMap(labels=phase.lung, geometry=phase.ct.geometry),
        )
        for phase in (phantom.exhale, phantom.inhale)
    )
    lung, grid = phantom.exhale.lung > 0, phantom.exhale.ct.geometry
    index = np.argwhere(lung)
    index = index[np.random.default_rng(0).permutation(len(index))[:DENSE_POINTS]]
    u_mm = phantom.exhale_to_inhale_mm[:, *index.T].T
    known = np.isfinite(u_mm).all(axis=1)
    affine = grid.index_to_mm()
    points = index[:, ::-1] @ affine[:, :3].T + affine[:, 3]
    depth_mm = edt.edt(lung, anisotropy=grid.spacing_mm[::-1])[tuple(index.T)]
    return Case(
        fixed=fixed,
        moving=moving,
        points_mm=points[known],
        true_mm=(points + u_mm)[known],
        near_pleura=(depth_mm < NEAR_PLEURA_MM)[known],
    )


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of mean TRE over the pairs that both have, and what the issue asks for."""
    by = {(row["pair"], row["method"]): row for row in rows}
    pairs = sorted({pair for pair, _ in by})
    ratios = {}
    for preset in PRESETS:
        for peer in PEERS:
            both = [pair for pair in pairs if (pair, preset) in by and (pair, peer) in by]
            if both:
                means = [statistics.fmean(by[pair, method]["mean_mm"] for pair in both) for method in (peer, preset)]
                ratios[f"{preset}_vs_{peer}"] = round(means[0] / means[1], 2)
    checks = {}
    mine = {pair: by[pair, "default"] for pair in pairs if (pair, "default") in by}
    for pair, row in mine.items():
        peers = [by[pair, peer] for peer in PEERS if (pair, peer) in by]
        if peers:
            checks[f"{pair}_lowest_mean"] = all(row["mean_mm"] < peer["mean_mm"] for peer in peers)
            checks[f"{pair}_lowest_p95"] = all(row["p95_mm"] < peer["p95_mm"] for peer in peers)
        checks[f"{pair}_regular"] = row["folded_share"] == 0 and row["sdlogj"] <= 0.25
    return {"ratios": ratios, "checks": checks}


if __name__ == "__main__":
    main()
