"""From files to the cache: one 512 x 512 x 400 pair from .nii.gz at 1.5 mm, and a DICOM series of 400 slices.

Run: uv run python benchmarks/bench_prepare.py [--quick]

The pair is a phantom rendered at 4 mm and resampled, with 20 HU of noise (a scan without any would be unpacked faster
than real ones) and a round field of view with padding. It is built in a process of its own, whose kernels a small pair
has compiled before; `pair_s` and `peak_gib` are that process's. The series are read in turn by us and by SimpleITK's
ImageSeriesReader, and compared.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from lungssl_data.build import build_cache
from lungssl_data.layouts import read_layout
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.prepare import PrepareConfig
from lungssl_data.readers import read_volume, write_volume
from lungssl_data.resample import resample_hu
from lungssl_data.volume import PADDING_BELOW_HU, Geometry, Volume
from lungssl_ops.measure import commit, machine
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING_MM = 1.5
NOISE_HU = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 x 256 x 100 voxels, 100 slices, one repeat")
    quick = parser.parse_args().quick
    shape = (100, 256, 256) if quick else (400, 512, 512)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        exhale = write_phantom(root / "raw" / "p1", shape)
        write_phantom(root / "small" / "p0", (40, 48, 56))
        write_series(root / "series", exhale)
        del exhale
        build = run_apart(root)
        dicom = compare_dicom(root / "series", repeats=1 if quick else 5)
    name = "prepare_quick" if quick else "prepare"
    result = {
        "benchmark": "prepare",
        "ratios": {"dicom_vs_simpleitk": round(dicom["simpleitk_s"] / dicom["ours_s"], 2)},
        "checks": {
            "pair_s": build["pair_s"],
            "peak_gib": build["peak_gib"],
            "pair_within_8_s": build["pair_s"] <= 8,
            "peak_within_2.5_gib": build["peak_gib"] <= 2.5,
            "dicom_equal": dicom["equal"],
        },
        "machine": machine("cpu") | {"load": round(os.getloadavg()[0], 1)} | {"quick": quick},
        "commit": commit(),
        "rows": {"shape": shape, "build": build, "dicom": dicom},
    }
    out = Path(__file__).parent / "results" / f"{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


def write_phantom(folder: Path, shape: tuple[int, int, int]) -> Volume:
    """A pair at `shape`; returns its exhale scan."""
    folder.mkdir(parents=True)
    phantom = make_phantom(PhantomConfig(seed=1, spacing_mm=4.0))
    rng = np.random.default_rng(0)
    y, x = np.ogrid[: shape[1], : shape[2]]
    outside = (y - shape[1] / 2) ** 2 + (x - shape[2] / 2) ** 2 > (0.51 * shape[2]) ** 2
    volumes = []
    for phase in ("exhale", "inhale"):
        scan = getattr(phantom, phase).ct
        dx, dy, dz = (
            float(mm * few / many)
            for mm, few, many in zip(scan.geometry.spacing_mm, scan.hu.shape[::-1], shape[::-1], strict=True)
        )
        grid = Geometry(
            shape=shape,
            spacing_mm=(dx, dy, dz),
            origin_mm=scan.geometry.origin_mm,
            direction=scan.geometry.direction,
        )
        hu, _ = resample_hu(scan, grid)
        for plane in hu:
            plane += (NOISE_HU * rng.standard_normal(plane.shape, dtype=np.float32)).astype(np.int16)
        hu[:, outside] = -2048
        volumes.append(Volume(hu=hu, geometry=grid))
        write_volume(folder / f"{phase}.nii.gz", volumes[-1])
    return volumes[0]


def write_series(folder: Path, volume: Volume) -> None:
    """The volume as uncompressed DICOM slices, stored as HU + 1024."""
    folder.mkdir()
    dx, dy, dz = volume.geometry.spacing_mm
    series, frame, study = generate_uid(), generate_uid(), generate_uid()
    for index, plane in enumerate(np.maximum(volume.hu, -1024)):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        data.Modality, data.PatientPosition = "CT", "HFS"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.InstanceNumber = index + 1
        x, y, z = volume.geometry.origin_mm
        data.ImagePositionPatient = [f"{x:.6g}", f"{y:.6g}", f"{z + index * dz:.8g}"]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing = [f"{dy:.8g}", f"{dx:.8g}"]
        data.SliceThickness = f"{dz:.8g}"
        data.Rows, data.Columns = plane.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleIntercept, data.RescaleSlope = -1024, 1
        data.PixelData = (plane + np.int16(1024)).tobytes()
        data.save_as(folder / f"{index:04d}.dcm", enforce_file_format=True)


def run_apart(root: Path) -> dict[str, Any]:
    """Build in a fresh process, so that its peak memory is the build's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_build, args=(root, theirs))
    process.start()
    result = ours.recv()
    process.join()
    return result


def _build(root: Path, pipe: Any) -> None:
    config = PrepareConfig(spacing_mm=SPACING_MM)
    for built in build_cache(read_layout("folder", root / "small"), root / "small-cache", config=config):
        assert built.outcome == "built", built.message
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    built = next(iter(build_cache(read_layout("folder", root / "raw"), root / "cache", config=config)))
    pair_s = time.perf_counter() - started
    assert built.outcome == "built", built.message
    after = resource.getrusage(resource.RUSAGE_SELF)
    pipe.send(
        {
            "pair_s": round(pair_s, 2),
            "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
            "peak_gib": round(after.ru_maxrss / 2**20, 2),
            "built": built.message,
        }
    )


def compare_dicom(folder: Path, *, repeats: int) -> dict[str, Any]:
    """Median and quartiles of reading the series, in turn; the page cache is warm for both."""

    def theirs() -> np.ndarray:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        return sitk.GetArrayFromImage(reader.Execute())

    def ours() -> np.ndarray:
        return read_volume(folder).hu

    runs = {"ours": ours, "simpleitk": theirs}
    images = {name: run() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            started = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - started)
    measured = images["simpleitk"] >= PADDING_BELOW_HU
    result: dict[str, Any] = {"equal": bool((images["ours"] == images["simpleitk"])[measured].all())}
    for name, seconds in times.items():
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        result |= {
            f"{name}_s": round(statistics.median(seconds), 3),
            f"{name}_p25_p75_s": [round(low, 3), round(high, 3)],
        }
    return result


if __name__ == "__main__":
    main()
