from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from lungssl_data.aeration_checks import airless
from lungssl_data.building.patient import pair_from_source
from lungssl_data.fit_checks import check_fit
from lungssl_data.layouts import read_layout
from lungssl_data.pair import CacheError, Displacement, Landmarks, PhasePair
from lungssl_data.phantom import PhantomConfig, make_phantom, write_phantom
from lungssl_data.prepare import PrepareConfig


@cache
def phantom_pair(preset: Any = "deep") -> PhasePair:
    """A phantom as a lab would hand it in, with lobes, landmarks and field."""
    with TemporaryDirectory() as folder:
        made = make_phantom(PhantomConfig(preset=preset, seed=3, spacing_mm=5.0, trees=False))
        write_phantom(made, Path(folder) / "p")
        (source,) = read_layout("folder", Path(folder))
        return pair_from_source(source, config=PrepareConfig(spacing_mm=5.0), split="train")


def with_exhale(**changes: Any) -> PhasePair:
    pair = phantom_pair()
    assert pair.exhale is not None
    return replace(pair, exhale=replace(pair.exhale, **changes))


def lobes() -> np.ndarray:
    exhale = phantom_pair().exhale
    assert exhale is not None and exhale.lobes is not None
    return exhale.lobes


def field(change: Callable[[np.ndarray], np.ndarray]) -> PhasePair:
    pair = phantom_pair()
    assert isinstance(pair.displacement, Displacement)
    return replace(pair, displacement=replace(pair.displacement, u_mm=change(pair.displacement.u_mm)))


def points(change: Callable[[Landmarks], Landmarks]) -> PhasePair:
    pair = phantom_pair()
    return replace(pair, landmarks={kind: change(given) for kind, given in pair.landmarks.items()})


@pytest.mark.parametrize("preset", ["deep", "ards", "peep", "healthy"])
def test_what_belongs_together_is_neither_refused_nor_odd(preset: str) -> None:
    pair = phantom_pair(preset)
    assert pair.landmarks and pair.displacement is not None
    assert check_fit(pair) == []
    assert [airless(pair.scan(phase)) for phase in pair.phases()] == [None, None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_exhale(lobes=np.roll(lobes(), 25, axis=0)), r"exhale lobes: \d+% of them lie in the lungs"),
        (lambda: with_exhale(lobes=np.array([0, 4, 4, 5, 1, 3], np.uint8)[lobes()]), "lung of the other side"),
        (lambda: with_exhale(lesion=np.ones_like(lobes())), "exhale lesion: every voxel"),
        (lambda: points(lambda p: replace(p, inhale_mm=p.inhale_mm[::-1].copy())), "landmarks: they lie"),
        (lambda: points(lambda p: replace(p, exhale_mm=p.exhale_mm * [-1, -1, 1])), "landmarks: they lie"),
        (lambda: field(lambda u: u + np.float32(100)), "displacement's points: they lie"),
        (lambda: field(lambda u: np.full_like(u, np.nan)), "displacement: it knows no point"),
    ],
)
def test_what_cannot_belong_to_the_scan_is_refused(make: Callable[[], PhasePair], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        check_fit(make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_exhale(lobes=np.where(lobes() == 1, 1, 0).astype(np.uint8)), "1 of 5 lobes"),
        (lambda: with_exhale(lobes=lobes() * np.uint8(0)), "outside of what is kept"),
        (
            lambda: with_exhale(lobes=None, lung=np.array([0, 2, 1], np.uint8)[phantom_pair().scan("exhale").lung]),
            "sides are exchanged",
        ),
        (
            lambda: points(lambda p: Landmarks(exhale_mm=p.inhale_mm, inhale_mm=p.exhale_mm)),
            "with exhale and inhale exchanged",
        ),
        (lambda: field(lambda u: -u), "exchanged"),
    ],
)
def test_what_is_odd_is_said(make: Callable[[], PhasePair], message: str) -> None:
    found = check_fit(make())
    assert any(message in text for text in found), found


@pytest.mark.parametrize(
    "change",
    [
        lambda hu: (-hu).astype(np.int16),
        lambda hu: (hu / 1000).astype(np.int16),
        lambda hu: ((hu + 1000) // 8).astype(np.int16),
        lambda hu: (hu + 1024).astype(np.int16),
    ],
)
def test_lungs_without_air_are_no_lungs_in_hounsfield_units(change: Callable[[np.ndarray], np.ndarray]) -> None:
    scan = phantom_pair("ards").scan("exhale")
    problem = airless(replace(scan, ct_hu=change(scan.ct_hu)))
    assert problem is not None and "Hounsfield" in problem


def test_white_lungs_with_some_air_are_lungs() -> None:
    scan = phantom_pair("ards").scan("exhale")
    white = np.where(np.random.default_rng(0).random(scan.ct_hu.shape) < 0.1, -500, 40).astype(np.int16)
    assert airless(replace(scan, ct_hu=white)) is None


@pytest.mark.parametrize(("axis", "name"), [(0, "head and feet"), (1, "front and back")])
def test_a_scan_turned_over_against_its_partner_is_told(axis: int, name: str) -> None:
    inhale = phantom_pair("ards").inhale
    assert inhale is not None
    turned = replace(phantom_pair("ards"), inhale=replace(inhale, lung=np.flip(inhale.lung, axis).copy()), landmarks={})
    found = check_fit(replace(turned, displacement=None))
    assert any(f"fit better with {name} of one exchanged" in text for text in found)
