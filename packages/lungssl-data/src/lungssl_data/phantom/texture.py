"""Parenchymal texture in material space."""

import numpy as np
from jaxtyping import Float32
from numpy import ndarray
from numpy.random import Generator
from scipy import fft

TEXTURE_SPACING_MM = 1.5
TEXTURE_SHAPE = (192, 120, 160)
"""One period of the texture, 288 x 180 x 240 mm (z, y, x): a lung's width and depth never see it twice."""


def texture(rng: Generator, correlation_mm: float) -> Float32[ndarray, "z y x"]:
    """Periodic band-limited Gaussian noise, mean 0, variance 1.

    White noise through exp(-(pi f l)^2 / 2), less the lowest fifth of that band: the autocorrelation falls to 1/e near
    l = `correlation_mm` (`domain.md` D2: 2-6 mm), and drifts over tens of mm are left to the density profile.
    """
    white = rng.standard_normal(TEXTURE_SHAPE, dtype=np.float32)
    z, y = (np.fft.fftfreq(n, TEXTURE_SPACING_MM).astype(np.float32) for n in TEXTURE_SHAPE[:2])
    x = np.fft.rfftfreq(TEXTURE_SHAPE[2], TEXTURE_SPACING_MM).astype(np.float32)
    squared = (np.pi * correlation_mm) ** 2 * (z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)
    band = np.exp(-squared / 2) - np.exp(-squared * 25 / 2)
    field = np.asarray(fft.irfftn(fft.rfftn(white, workers=2) * band, s=TEXTURE_SHAPE, workers=2), np.float32)
    return field / field.std()
