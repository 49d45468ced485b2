"""What the scanner does to a rendered phase: kernel, slice, noise and artefacts (`domain.md` D5).

Every draw is independent of the phase. Noise is not made from projections: its spectrum and its dependence on the path
through the body are, streaks and all else are schematic.
"""

import numpy as np
from jaxtyping import Float32, Int16, UInt8
from numpy import ndarray
from numpy.random import Generator
from scipy import fft, ndimage

SOFT_FWHM_MM, SHARP_FWHM_MM = (0.8, 1.0), (0.5, 0.6)
OVERSHOOT = (0.25, 0.5)
"""Of a sharp kernel: share of the image less a blurred one that is added."""
OVERSHOOT_WIDTH = 2.2
"""Width of that blur against the point spread."""
SLICE_MM = (0.6, 5.0)
"""Slice profile, drawn evenly on a logarithmic scale."""
NOISE_HU = (8.0, 25.0)
NOISE_PEAK = (0.2, 0.35)
"""Frequency per mm at which the noise is strongest in the slice; where the grid is too coarse for it (below 2.5 mm) the
spectrum rises to the grid's limit."""
HU_PER_PATH = 0.0025
"""Noise grows as exp(this x water-equivalent mm beyond the mean path): shoulders, 250 mm more, nearly double it."""
LOW_DOSE_NOISE = 2.0
"""A quarter of the dose."""
SCALE_ERROR = 0.005
"""5 HU at 1000."""
PADDING_HU = -2048
STEP_MM = (2.0, 5.0)


def scan(
    rng: Generator,
    hu: Float32[ndarray, "z y x"],
    body: UInt8[ndarray, "z y x"],
    *,
    spacing_mm: float,
    noise_hu: float | None,
    low_dose: bool = False,
    artefacts: tuple[str, ...] = (),
) -> tuple[Int16[ndarray, "z y x"], dict[str, float]]:
    """The scan of a phase, and what was drawn for it."""
    sharp = bool(rng.uniform() < 0.5)
    fwhm_mm = float(rng.uniform(*(SHARP_FWHM_MM if sharp else SOFT_FWHM_MM)))
    overshoot = float(rng.uniform(*OVERSHOOT)) if sharp else 0.0
    slice_mm = float(np.exp(rng.uniform(*np.log(SLICE_MM))))
    drawn_hu, peak = float(rng.uniform(*NOISE_HU)), float(rng.uniform(*NOISE_PEAK))
    sigma_hu = (drawn_hu if noise_hu is None else noise_hu) * (LOW_DOSE_NOISE if low_dose else 1.0)
    # A voxel averages over its width (variance 1/12) on top of the scanner's point spread; FWHM = 2.355 sigma.
    across = float(np.hypot(fwhm_mm / 2.355 / spacing_mm, 12**-0.5))
    along = max(slice_mm / spacing_mm, 1.0) * 12**-0.5
    seen = ndimage.gaussian_filter(hu, (along, across, across), mode="nearest", truncate=2.0)
    if sharp:
        wide = OVERSHOOT_WIDTH * across
        seen += np.float32(overshoot) * (
            seen - ndimage.gaussian_filter(seen, (0.0, wide, wide), mode="nearest", truncate=2.0)
        )
    if sigma_hu > 0:
        seen += noise(rng, body.shape, spacing_mm=spacing_mm, peak=peak, slice_mm=slice_mm) * (
            np.float32(sigma_hu) * _louder(hu, body, spacing_mm)
        )
    for artefact in artefacts:
        seen = _ARTEFACTS[artefact](rng, seen, body, spacing_mm)
    counts = np.rint(np.clip(seen, -1024, 3071, out=seen), out=seen).astype(np.int16)
    if "cropped_fov" in artefacts:
        counts[:, _outside_circle(rng, body)] = PADDING_HU
    return counts, {
        "sharp_kernel": float(sharp),
        "psf_fwhm_mm": fwhm_mm,
        "overshoot": overshoot,
        "slice_mm": slice_mm,
        "noise_hu": sigma_hu,
        "noise_peak_per_mm": peak,
    }


def noise(
    rng: Generator, shape: tuple[int, int, int], *, spacing_mm: float, peak: float, slice_mm: float
) -> Float32[ndarray, "z y x"]:
    """Noise of standard deviation 1: a difference of Gaussians with its peak at `peak` per mm in the slice, and a box
    of the slice's width along z."""
    white = rng.standard_normal(shape, dtype=np.float32)
    y = np.fft.fftfreq(shape[1], spacing_mm).astype(np.float32)
    x = np.fft.rfftfreq(shape[2], spacing_mm).astype(np.float32)
    # exp(-a f^2) - exp(-4 a f^2) peaks at f^2 = ln 4 / (3 a).
    squared = (np.log(4.0) / 3.0 / peak**2) * (y[:, None] ** 2 + x**2)
    band = (np.exp(-squared) - np.exp(-4.0 * squared)).astype(np.float32)
    field = fft.irfft2(fft.rfft2(white, workers=2) * band, s=shape[1:], workers=2)
    field = np.asarray(field, np.float32)
    width = round(slice_mm / spacing_mm)
    if width > 1:
        field = ndimage.uniform_filter1d(field, width, axis=0, mode="wrap")
    return field / field.std()


def _louder(
    hu: Float32[ndarray, "z y x"], body: UInt8[ndarray, "z y x"], spacing_mm: float
) -> Float32[ndarray, "z y x"]:
    """Noise relative to its root mean square over the body, from the water-equivalent paths along x and along y."""
    water = np.maximum(hu * np.float32(spacing_mm / 1000) + np.float32(spacing_mm), 0) * (body > 0)
    paths = [water.sum(axis, keepdims=True) for axis in (2, 1)]
    centre = [float(p[p > 0].mean()) for p in paths]
    parts = [np.exp(np.float32(HU_PER_PATH) * np.clip(p - c, -200, 400)) for p, c in zip(paths, centre, strict=True)]
    louder = 0.5 * (parts[0] + parts[1])
    return louder / np.sqrt(np.mean(louder[body > 0] ** 2, dtype=float)).astype(np.float32)


def _streaks(rng: Generator, hu: ndarray, body: ndarray, spacing_mm: float) -> ndarray:
    """Rays from two or three electrodes on the chest, bright and dark in turn, over a few slices each."""
    shape = hu.shape
    j, i = np.indices(shape[1:], np.float32)
    for _ in range(int(rng.integers(2, 4))):
        k = int(rng.integers(shape[0] // 4, 3 * shape[0] // 4))
        column = int(np.clip(rng.normal(shape[2] / 2, shape[2] / 8), 0, shape[2] - 1))
        skin = np.flatnonzero(body[k, :, column])
        row = int(skin[0]) if len(skin) else shape[1] // 4
        angle, rays, phase = np.arctan2(j - row, i - column), int(rng.integers(5, 12)), float(rng.uniform(0, 2 * np.pi))
        away_mm = np.hypot(j - row, i - column) * spacing_mm
        pattern = np.cos(rays * angle + phase) ** 7 * np.exp(-away_mm / 90.0)
        slices = slice(max(k - round(3 / spacing_mm), 0), k + round(3 / spacing_mm) + 1)
        hu[slices] += np.float32(rng.uniform(80, 200)) * pattern.astype(np.float32)
        hu[slices, max(row - 1, 0) : row + 1, max(column - 1, 0) : column + 2] = 2500.0
    return hu


def _scale_error(rng: Generator, hu: ndarray, body: ndarray, spacing_mm: float) -> ndarray:
    return hu * np.float32(1.0 + SCALE_ERROR * (1.0 if rng.uniform() < 0.5 else -1.0))


def _step(rng: Generator, hu: ndarray, body: ndarray, spacing_mm: float) -> ndarray:
    """The patient moved: everything above a slice lies some millimetres aside."""
    k = int(rng.integers(hu.shape[0] // 4, 3 * hu.shape[0] // 4))
    shift = np.rint(rng.choice([-1.0, 1.0], 2) * rng.uniform(*STEP_MM, 2) / spacing_mm).astype(int)
    hu[k:] = np.roll(hu[k:], tuple(shift), (1, 2))
    return hu


def _cropped(rng: Generator, hu: ndarray, body: ndarray, spacing_mm: float) -> ndarray:
    return hu


def _outside_circle(rng: Generator, body: ndarray) -> ndarray:
    """Beyond a circle that cuts the arms' sides of the body, at times the lungs."""
    rows, columns = np.nonzero(body.any(0))
    centre = rows.mean(), columns.mean()
    radius = float(rng.uniform(0.7, 0.9)) * 0.5 * (columns.max() - columns.min())
    j, i = np.indices(body.shape[1:])
    return np.hypot(j - centre[0], i - centre[1]) > radius


_ARTEFACTS = {"streaks": _streaks, "scale_error": _scale_error, "step": _step, "cropped_fov": _cropped}
"""Padding of the cropped field of view comes last, after the clipping."""
