"""A small thorax with two ellipsoid lungs, unequal in z, y and x and anisotropic, for every test of the package."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from lungssl_data.pair import PhasePair, PhaseScan
from lungssl_data.volume import Geometry, Volume
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid


def thorax_volume(
    *, inflation: float = 1.0, origin_mm: tuple[float, float, float] = (-150.0, -110.0, -300.0)
) -> Volume:
    """320 x 230 x 290 mm; lungs of about 1.9 l each at inflation 1; right lung at -x (LPS)."""
    shape, spacing = (58, 46, 80), np.array([4.0, 5.0, 5.0])
    z, y, x = np.indices(shape)
    place = np.stack([x, y, z], -1) * spacing + np.asarray(origin_mm)
    centre = np.asarray(origin_mm) + np.array([160.0, 115.0, 145.0])
    hu = np.full(shape, -1000, np.int16)
    body = (((place - centre)[..., :2] / [145, 105]) ** 2).sum(-1) < 1
    hu[body] = 40
    for side in (-1, 1):
        axes = np.array([48.0, 75.0, 110.0 * inflation])
        hu[(((place - centre - [side * 68, 0, 0]) / axes) ** 2).sum(-1) < 1] = -700
    hu[(((place - centre - [0, 60, 0])[..., :2]) ** 2).sum(-1) < 18**2] = 400
    geometry = Geometry(shape=shape, spacing_mm=(4.0, 5.0, 5.0), origin_mm=origin_mm, direction=np.eye(3))
    return Volume(hu=hu, geometry=geometry)


@pytest.fixture
def thorax() -> Callable[..., Volume]:
    return thorax_volume


@pytest.fixture
def make_pair() -> Callable[..., PhasePair]:
    """A pair with unequal grids whose inhale is the exhale stretched by 1.2 in z about index 0 and moved."""

    def make(
        patient: str = "p01", *, phases: tuple[str, ...] = ("exhale", "inhale"), split: str = "train"
    ) -> PhasePair:
        rng = np.random.default_rng(sum(map(ord, patient)))
        scans = {}
        for phase, shape, origin in (
            ("exhale", (37, 41, 45), (-40.0, 12.0, 5.0)),
            ("inhale", (44, 41, 45), (-35.0, 12.0, -9.0)),
        ):
            z, y, x = np.indices(shape)
            lung = ((((np.stack([z, y, x]).T / np.array(shape) - 0.5) / 0.4) ** 2).sum(-1) < 1).T
            scans[phase] = PhaseScan(
                ct_hu=rng.integers(-1000, 100, shape).astype(np.int16),
                valid=np.ones(shape, np.uint8),
                lung=np.where(lung, 1 + (x > shape[2] // 2), 0).astype(np.uint8),
                lobes=np.where(lung, 1 + (z > shape[0] // 2), 0).astype(np.uint8),
                spacing_mm=(1.5, 2.0, 2.5),
                origin_mm=origin,
            )
        scale = np.array([1.0, 1.0, 44 / 37])
        affine = np.concatenate([np.diag(scale), (np.array([-35, 12, -9]) - scale * [-40, 12, 5])[:, None]], 1)
        both = len(phases) == 2
        return PhasePair(
            patient=patient,
            **{phase: scans[phase] for phase in phases},
            exhale_to_inhale=affine if both else None,
            affine_provenance="test" if both else "",
            split=split,
            key=f"key-{patient}",
        )

    return make


@pytest.fixture
def write_series() -> Callable[..., np.ndarray]:
    """Writes a DICOM series of 6 slices of 5 x 7 pixels, 2.5 mm apart, and returns what is stored (z, y, x)."""
    return _write_series


def _write_series(
    folder: Path,
    edit: Callable[[int, pydicom.Dataset], None] = lambda _i, _data: None,
    *,
    axes: np.ndarray | None = None,
    stored: np.ndarray | None = None,
    prefix: str = "slice",
    syntax: str = ExplicitVRLittleEndian,
) -> np.ndarray:
    """Names and InstanceNumbers in a shuffled order; every text that may name a patient is a canary."""
    folder.mkdir(exist_ok=True, parents=True)
    stored = np.random.default_rng(0).integers(0, 2500, (6, 5, 7)).astype(np.int16) if stored is None else stored
    slices, rows, columns = stored.shape
    axes = np.eye(3)[:2] if axes is None else axes
    stride = 5 if slices % 5 else 7
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for i in range(slices):
        data = pydicom.Dataset()
        data.PatientName = data.StudyDescription = data.InstitutionName = data.StationName = "CanaryPatient"
        data.PatientID = data.AccessionNumber = data.ImageComments = "CanaryPatient"
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.InstanceNumber = (i * stride) % slices
        data.Rows, data.Columns, data.SamplesPerPixel = rows, columns, 1
        data.PhotometricInterpretation = "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 8 * stored.itemsize
        data.HighBit, data.PixelRepresentation = 8 * stored.itemsize - 1, int(stored.dtype.kind == "i")
        data.PixelSpacing = [0.9, 0.7]  # between rows (y), between columns (x)
        data.ImageOrientationPatient = [float(v) for v in axes.ravel()]
        place = np.array([-20.0, 10.0, -300.0]) + 2.5 * i * np.cross(axes[0], axes[1])
        data.ImagePositionPatient = [float(v) for v in place]
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = (
            stored[i].astype(stored.dtype.newbyteorder(">" if syntax == "1.2.840.10008.1.2.2" else "<")).tobytes()
        )
        edit(i, data)
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = UID(syntax)
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.save_as(folder / f"{prefix}{(i * stride + 3) % slices}.dcm", enforce_file_format=True)
    return stored


@lru_cache
def _phantom(preset: str, seed: int, motion: str) -> Any:
    # numba takes a second to import, and most tests do without.
    from lungssl_data.phantom import PhantomConfig, make_phantom

    return make_phantom(PhantomConfig(preset=preset, seed=seed, motion=motion, spacing_mm=3.0))


@pytest.fixture
def phantom() -> Callable[..., Any]:
    """Phantoms at 3 mm by preset, seed and motion, made once for all tests."""
    return lambda preset, seed, motion="charts": _phantom(preset, seed, motion)


@pytest.fixture
def voxels() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Some voxels of a phantom's phase where a mask holds: index (z, y, x), and LPS mm of their centres."""

    def some(phase: Any, where: np.ndarray, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
        index = np.argwhere(where)
        index = index[np.random.default_rng(0).permutation(len(index))[:n]]
        geometry = phase.ct.geometry
        return index, np.asarray(geometry.origin_mm) + index[:, ::-1] * np.asarray(geometry.spacing_mm)

    return some
