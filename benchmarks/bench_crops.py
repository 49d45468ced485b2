"""Random crops from the pair cache beside its rivals, and paired crops through a torch DataLoader.

Run: uv run python benchmarks/bench_crops.py [--quick] [--scans FOLDER]

Rivals are optional: pip install blosc2 torchio monai. Each is given its best case: nnU-Net's float32 holds whole
Hounsfield units (z-scored ones compress worse), torchio and MONAI read uncompressed .nii, MONAI holds the whole cohort
decoded in memory, as int16 and uint8. All readers take turns within each round; a ratio is a median rate over a median
rate of the same run, for pairs each at its own best number of workers.
"""

import argparse
import importlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from lungssl_data.batch import PHASES
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.pair import AIR_HU, PhasePair, PhaseScan
from lungssl_ops.measure import commit, machine
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CROP = (96, 96, 96)
BATCH = 4
QUEUE = 32
"""Crops in torchio's queue: 8 each of 4 volumes."""
SIZE_LIMIT = 0.60
_BOX = tuple[int, tuple[int, int, int]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table; rates are per second."""

    table: str
    """`crops`: int16 blocks of 96**3 in one process. `pairs`: exhale + inhale + both lung masks through a loader."""
    reader: str
    workers: int
    median_rate: float
    p25_rate: float
    p75_rate: float
    size_of_raw: float | None
    """Bytes on disk over those of raw int16."""
    equal: bool | None
    """Twenty crops equal the source; None where the rival draws the places itself."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time random crops from the pair cache beside other stores.")
    parser.add_argument("--quick", action="store_true", help="two small phantoms, few rounds, under a minute")
    parser.add_argument("--scans", type=Path, help="folder of real volumes instead of phantoms, read in pairs by name")
    options = parser.parse_args()
    out = Path(__file__).parent / "results" / ("crops_quick.json" if options.quick else "crops.json")
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), quick=options.quick, scans=options.scans)
    print(markdown_table(result["rows"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


def run(folder: Path, *, quick: bool, scans: Path | None) -> dict[str, Any]:
    """Both tables as {"benchmark", "ratios", "shares", "checks", "machine", "commit", "rows"}."""
    pairs = _real_pairs(scans) if scans else _phantom_pairs(2 if quick else 4, spacing_mm=2.5 if quick else 1.4)
    for pair in pairs:
        write_pair(pair, folder / "cache")
    rows = _crop_rows(folder, pairs, rounds=5 if quick else 12, count=40 if quick else 250)
    rows += _pair_rows(folder, pairs, rounds=2 if quick else 5, batches=6 if quick else 40)
    crops = {row.reader: row for row in rows if row.table == "crops"}
    best: dict[str, float] = {}
    for row in rows:
        if row.table == "pairs":
            best[row.reader] = max(best.get(row.reader, 0.0), row.median_rate)
    ours = crops["ours"].median_rate
    ratios = {name: ours / crops[reader].median_rate for name, reader in _CROP_RATIOS.items() if reader in crops}
    ratios |= {f"pairs_vs_{name}": best["ours"] / best[name] for name in best.keys() - {"ours"}}
    size = crops["ours"].size_of_raw or 1.0
    return {
        "benchmark": "crops",
        "ratios": {name: round(value, 2) for name, value in sorted(ratios.items())},
        "shares": {
            "share_of_memmap": round(ours / crops["npy memmap"].median_rate, 2),
            "size_of_raw": round(size, 3),
        },
        "checks": {"size_ratio": size <= SIZE_LIMIT, "equal_to_source": all(row.equal is not False for row in rows)},
        "data": {
            "kind": "real scans" if scans else "phantoms (synthetic)",
            "shapes": [list(pair.scan(phase).ct_hu.shape) for pair in pairs for phase in pair.phases()],
        },
        "machine": machine("cpu") | {"quick": quick, "versions": _versions()},
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
    }


_CROP_RATIOS = {
    "crops_vs_nnunet": "nnU-Net v2 as shipped",
    "crops_vs_nnunet_int16": "nnU-Net rule, int16, kept open",
    "crops_vs_blosc2": "blosc2 tuned, int16, kept open",
}


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = [
        "| table | reader | workers | per s: median [p25, p75] | size / int16 | equal |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = "{median_rate:.0f} [{p25_rate:.0f}, {p75_rate:.0f}]".format_map(row)
        size = "" if row["size_of_raw"] is None else f"{row['size_of_raw']:.3f}"
        lines.append(f"| {row['table']} | {row['reader']} | {row['workers']} | {rate} | {size} | {row['equal']} |")
    return "\n".join(lines)


def nnunet_blocks(
    shape: tuple[int, ...], patch: tuple[int, ...], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Block and chunk shape by nnU-Net v2's rule (Isensee et al., github.com/MIC-DKFZ/nnUNet, Apache-2.0).

    Written from its description: blocks have sides that are powers of two, from the patch's size downwards, and at most
    128 KiB; chunks grow from them block by block to at most 6 MiB and 1.5 patches along an axis. For 96**3 that is
    32x32x32 in 128x128x96 at float32 and 64x32x32 in 144**3 at int16.
    """
    block = [2 ** int(np.ceil(np.log2(side))) for side in patch]
    while np.prod(block) * itemsize > 128 * 1024:
        axis = max(range(len(block)), key=lambda a: (block[a] / patch[a], a))
        block[axis] //= 2
    block = [min(b, s) for b, s in zip(block, shape, strict=True)]
    most = [min(int(1.5 * p), s) for p, s in zip(patch, shape, strict=True)]
    chunk = list(block)
    while True:
        for axis in sorted(range(len(chunk)), key=lambda a: chunk[a] / block[a]):
            grown = [*chunk]
            grown[axis] = min(chunk[axis] + block[axis], most[axis])
            if grown[axis] > chunk[axis] and np.prod(grown) * itemsize <= 6 * 2**20:
                chunk = grown
                break
        else:
            return tuple(block), tuple(chunk)


def _crop_rows(folder: Path, pairs: list[PhasePair], *, rounds: int, count: int) -> list[Row]:
    volumes = [pair.scan(phase).ct_hu for pair in pairs for phase in pair.phases()]
    readers, sizes = _crop_readers(folder, pairs, volumes)
    rng = np.random.default_rng(0)

    def boxes(n: int) -> list[_BOX]:
        places = rng.integers(len(volumes), size=n)
        return [(int(k), _start(rng, volumes[k].shape)) for k in places]

    trial = boxes(20)
    equal = {
        name: all(np.array_equal(read(*box), volumes[box[0]][_slices(box[1])]) for box in trial)
        for name, read in readers.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(-1, rounds):  # turn -1 warms up
        drawn = boxes(count)
        names = list(readers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            read = readers[name]
            began = time.perf_counter()
            for box in drawn:
                read(*box)
            if turn >= 0:
                rates[name].append(count / (time.perf_counter() - began))
    raw = sum(volume.nbytes for volume in volumes)
    return [_row("crops", name, 0, rates[name], size=sizes[name] / raw, equal=equal[name]) for name in readers]


def _crop_readers(
    folder: Path, pairs: list[PhasePair], volumes: list[ndarray]
) -> tuple[dict[str, Callable[..., ndarray]], dict[str, int]]:
    """Readers (volume, start) -> crop, each with its files written, and the files' sizes."""
    cache = PairCache(folder / "cache")
    names = [(pair.patient, phase) for pair in pairs for phase in pair.phases()]
    stored = 0
    for patient, phase in names:
        with h5py.File(folder / "cache" / f"{patient}.h5") as file:
            stored += file[f"{phase}/ct"].id.get_storage_size()  # pyright: ignore[reportAttributeAccessIssue]
    for k, volume in enumerate(volumes):
        np.save(folder / f"{k}.npy", volume)
    maps = [np.load(folder / f"{k}.npy", mmap_mode="r") for k in range(len(volumes))]
    readers: dict[str, Callable[..., ndarray]] = {
        "ours": lambda k, start: cache.read(names[k][0], names[k][1], "ct", start, CROP),
        "npy memmap": lambda k, start: np.array(maps[k][_slices(start)]),
    }
    sizes = {"ours": stored, "npy memmap": sum(volume.nbytes for volume in volumes)}
    blosc2 = _optional("blosc2")
    if blosc2 is None:
        return readers, sizes
    # As nnU-Net sets them; a worker of a loader is one thread for everybody here.
    reading: dict[str, Any] = {"mode": "r", "dparams": {"nthreads": 1}, "mmap_mode": "r"}

    def write(stem: str, dtype: Any, blocks: Any, codec: str, filters: list[str]) -> list[str]:
        """Each volume with the better filter of `filters`, as nnU-Net chooses it per image."""
        paths = []
        for k, volume in enumerate(volumes):
            block, chunk = blocks(volume.shape, np.dtype(dtype).itemsize)
            tried: dict[str, int] = {}
            for name in filters:
                path = str(folder / f"{stem}_{k}_{name}.b2nd")
                cparams = {
                    "codec": blosc2.Codec[codec],
                    "clevel": 5,
                    "filters": [blosc2.Filter[name]],
                    "nthreads": 1,
                }
                data = np.ascontiguousarray(volume, dtype)
                blosc2.asarray(data, chunks=chunk, blocks=block, cparams=cparams, urlpath=path, mode="w")
                tried[path] = Path(path).stat().st_size
            paths.append(min(tried, key=lambda path: tried[path]))
        return paths

    def rule(shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return nnunet_blocks(shape, CROP, itemsize)

    def tuned(shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (16, 16, 16), tuple(min(128, side) for side in shape)

    both = ["NOFILTER", "SHUFFLE"]
    shipped = write("nnunet", np.float32, rule, "LZ4HC", both)
    int16 = write("nnunet_int16", np.int16, rule, "LZ4HC", both)
    best = write("tuned", np.int16, tuned, "LZ4", ["BITSHUFFLE"])
    int16_open, best_open = ([blosc2.open(path, **reading) for path in paths] for paths in (int16, best))
    readers |= {
        "nnU-Net v2 as shipped": lambda k, start: blosc2.open(shipped[k], **reading)[_slices(start)],
        "nnU-Net rule, int16, kept open": lambda k, start: int16_open[k][_slices(start)],
        "blosc2 tuned, int16, kept open": lambda k, start: best_open[k][_slices(start)],
    }
    for name, paths in zip(list(readers)[2:], (shipped, int16, best), strict=True):
        sizes[name] = sum(Path(path).stat().st_size for path in paths)
    return readers, sizes


class _OurPairs(Dataset[tuple[Tensor, Tensor]]):
    """Batches of ct int16 and lung uint8 [b, 2, z, y, x], each from a random place in a random patient.

    Boxes are read to their place in the batch: nothing is left to collate.
    """

    def __init__(self, cache: PairCache, samples: int) -> None:
        self.cache, self.samples = cache, samples

    def __len__(self) -> int:
        return self.samples

    def __getitems__(self, samples: list[int]) -> tuple[Tensor, Tensor]:
        shape = (len(samples), 2, *CROP)
        ct, lung = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=torch.uint8)
        for sample, ct_hu, mask in zip(samples, ct.numpy(), lung.numpy(), strict=True):
            patient, start = _place(self.cache, sample)
            for slot, phase in enumerate(PHASES):
                self.cache.read_into(patient, phase, "ct", start, ct_hu[slot])
                self.cache.read_into(patient, phase, "lung", start, mask[slot])
        return ct, lung


def _as_it_is(batch: Any) -> Any:
    return batch


def _place(cache: PairCache, sample: int) -> tuple[str, tuple[int, int, int]]:
    rng = np.random.default_rng(sample)
    patient = cache.patients[rng.integers(len(cache))]
    return patient, _start(rng, cache.phase_record(patient, "exhale").shape)


def _pair_rows(folder: Path, pairs: list[PhasePair], *, rounds: int, batches: int) -> list[Row]:
    cache = PairCache(folder / "cache")
    samples = (batches + 1) * BATCH
    loaders: dict[str, Callable[[int], Iterable[Any]]] = {
        "ours": lambda workers: DataLoader(
            _OurPairs(cache, samples), batch_size=BATCH, num_workers=workers, collate_fn=_as_it_is
        )
    }
    patients = _write_nifti(folder, pairs)
    if tio := _optional("torchio"):
        loaders["torchio"] = lambda workers: _torchio_loader(tio, patients, samples, workers)
    if _optional("monai.data"):
        cached = _monai_cache(patients)
        loaders["monai"] = lambda workers: _monai_loader(cached, samples, workers)
    equal = all(
        np.array_equal(block, getattr(pair.scan(phase), name)[_slices(start)])
        for sample in range(20)
        for patient, start in [_place(cache, sample)]
        for pair in [next(pair for pair in pairs if pair.patient == patient)]
        for name, both in zip(("ct_hu", "lung"), _OurPairs(cache, samples).__getitems__([sample]), strict=True)
        for phase, block in zip(pair.phases(), both[0].numpy(), strict=True)
    )
    rates: dict[tuple[str, int], list[float]] = {(name, workers): [] for name in loaders for workers in range(3)}
    for turn in range(rounds):
        keys = list(rates)
        for name, workers in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            # Whole fillings of torchio's queue, and fewer: it is some 20 times as slow as the others.
            batch_count = batches if name != "torchio" else max(batches // 24, 1) * (QUEUE // BATCH)
            loader = iter(loaders[name](workers))
            next(loader)  # workers start
            began = time.perf_counter()
            for _ in range(batch_count):
                next(loader)
            rates[name, workers].append(batch_count * BATCH / (time.perf_counter() - began))
            del loader
    return [
        _row("pairs", name, workers, taken, size=None, equal=equal if name == "ours" else None)
        for (name, workers), taken in rates.items()
    ]


def _torchio_loader(tio: Any, patients: list[dict[str, str]], samples: int, workers: int) -> Iterable[Any]:
    subjects = [
        tio.Subject(
            **{name: (tio.LabelMap if "lung" in name else tio.ScalarImage)(path) for name, path in patient.items()}
        )
        for patient in patients
    ]
    per_volume = 8
    repeated = [subjects[k % len(subjects)] for k in range((samples + 3 * QUEUE) // per_volume)]
    queue = tio.Queue(
        tio.SubjectsDataset(repeated),
        max_length=QUEUE,
        samples_per_volume=per_volume,
        sampler=tio.UniformSampler(CROP),
        num_workers=workers,
    )
    return tio.SubjectsLoader(queue, batch_size=BATCH, num_workers=0)


def _monai_cache(patients: list[dict[str, str]]) -> Any:
    from monai.data.dataset import CacheDataset
    from monai.transforms.compose import Compose
    from monai.transforms.croppad.dictionary import RandSpatialCropd
    from monai.transforms.io.dictionary import LoadImaged
    from monai.transforms.utility.dictionary import CastToTyped

    keys = list(patients[0])
    transform = Compose(
        [
            LoadImaged(keys, ensure_channel_first=True, image_only=True),
            CastToTyped(keys, dtype=[torch.uint8 if "lung" in key else torch.int16 for key in keys]),
            RandSpatialCropd(keys, roi_size=CROP, random_size=False),
        ]
    )
    return CacheDataset(patients, transform, copy_cache=False, progress=False, num_workers=0)


def _monai_loader(cached: Any, samples: int, workers: int) -> Iterable[Any]:
    from monai.data.dataloader import DataLoader as MonaiLoader
    from torch.utils.data import RandomSampler

    sampler = RandomSampler(cached, replacement=True, num_samples=samples)
    return MonaiLoader(cached, batch_size=BATCH, num_workers=workers, sampler=sampler)


def _write_nifti(folder: Path, pairs: list[PhasePair]) -> list[dict[str, str]]:
    """Uncompressed .nii of each pair, all four images on one grid, as torchio and MONAI want it."""
    import nibabel

    patients = []
    for pair in pairs:
        files = {}
        for phase in ("exhale", "inhale"):
            scan = pair.scan(phase)
            for name, data in ((phase, scan.ct_hu), (f"{phase}_lung", scan.lung)):
                path = folder / f"{pair.patient}_{name}.nii"
                nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(data.T), np.eye(4)), path)
                files[name] = str(path)
        patients.append(files)
    return patients


def _phantom_pairs(count: int, *, spacing_mm: float) -> list[PhasePair]:
    from lungssl_data.phantom import PhantomConfig, make_phantom

    pairs = []
    for seed in range(count):
        phantom = make_phantom(PhantomConfig(seed=seed, spacing_mm=spacing_mm))
        scans = [(phase.ct.hu, phase.lung) for phase in (phantom.exhale, phantom.inhale)]
        pairs.append(_pair(f"phantom{seed}", scans))
    return pairs


def _real_pairs(folder: Path) -> list[PhasePair]:
    """Volumes of a folder by name, two by two; of an odd number the last is paired with itself mirrored."""
    from lungssl_data.readers import read_volume

    files = sorted(p for p in folder.iterdir() if p.name.endswith((".nii.gz", ".nii", ".mha", ".nrrd")))
    volumes = [np.ascontiguousarray(np.maximum(read_volume(file).hu, AIR_HU)) for file in files]
    volumes = [np.pad(v, [(0, max(c - n, 0)) for n, c in zip(v.shape, CROP, strict=True)], "edge") for v in volumes]
    if not volumes:
        raise SystemExit(f"{folder}: no .nii, .nii.gz, .mha or .nrrd here; name a folder of CT volumes")
    if len(volumes) % 2:
        volumes.append(volumes[-1][:, :, ::-1])
    masked = [(v, ((v < -500) & (v > AIR_HU + 40)).astype(np.uint8)) for v in volumes]
    return [_pair(f"scan{k}", masked[2 * k : 2 * k + 2]) for k in range(len(masked) // 2)]


def _pair(patient: str, scans: list[tuple[ndarray, ndarray]]) -> PhasePair:
    """Both scans cut to a common shape: rivals demand one grid for all images of a subject."""
    shape = np.min([hu.shape for hu, _ in scans], axis=0)

    def scan(hu: ndarray, lung: ndarray) -> PhaseScan:
        cut = tuple(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(hu.shape, shape, strict=True))
        return PhaseScan(
            ct_hu=np.ascontiguousarray(hu[cut]),
            valid=np.ones(shape, np.uint8),
            lung=np.ascontiguousarray(lung[cut]),
            spacing_mm=(1.0, 1.0, 1.0),
            origin_mm=(0.0, 0.0, 0.0),
        )

    return PhasePair(patient=patient, exhale=scan(*scans[0]), inhale=scan(*scans[1]))


def _row(table: str, reader: str, workers: int, rates: list[float], *, size: float | None, equal: bool | None) -> Row:
    p25, median, p75 = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    return Row(
        table=table,
        reader=reader,
        workers=workers,
        median_rate=round(median, 1),
        p25_rate=round(p25, 1),
        p75_rate=round(p75, 1),
        size_of_raw=size,
        equal=equal,
    )


def _start(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, int, int]:
    z, y, x = (int(rng.integers(0, n - c + 1)) for n, c in zip(shape, CROP, strict=True))
    return z, y, x


def _slices(start: tuple[int, int, int]) -> tuple[slice, ...]:
    return tuple(slice(s, s + c) for s, c in zip(start, CROP, strict=True))


def _optional(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: its rows are left out")
        return None


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("h5py", "hdf5plugin", "numba", "torch", "blosc2", "torchio", "monai")
    return {name: version(name) for name in packages if _found(name)}


def _found(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


if __name__ == "__main__":
    main()
