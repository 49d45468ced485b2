"""A small thorax with two ellipsoid lungs, unequal in z, y and x and anisotropic, for every test of the package."""

from collections.abc import Callable

import numpy as np
import pytest
from lungssl_data.pair import PhasePair, PhaseScan
from lungssl_data.volume import Geometry, Volume


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
