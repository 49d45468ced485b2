from collections.abc import Callable

import numpy as np
import pytest
from lungssl_data.phantom import Phantom, PhantomConfig, make_phantom
from lungssl_data.phantom.points import trace
from lungssl_data.phantom.rasterise import LUMEN_HU, VESSEL_HU, draw_trees
from lungssl_data.phantom.trees import AIRWAY, ARTERY, VEIN, Pieces, Tree, carry_trees
from lungssl_data.volume import Geometry
from scipy.ndimage import label

Phantoms = Callable[..., Phantom]
WEIBEL_MM = (12.2, 8.3, 5.6, 4.5, 3.5, 2.8, 2.3)
"""Mean airway diameters of generations 1-7 (domain.md D3)."""


def of_kind(p: Phantom, kind: int) -> Tree:
    return next(tree for tree in p.trees if tree.kind == kind)


@pytest.mark.parametrize(("preset", "seed"), [("deep", 1), ("ards", 0)])
def test_diameters_and_volumes_are_anatomical(phantom: Phantoms, preset: str, seed: int) -> None:
    p = phantom(preset, seed)
    airway = of_kind(p, AIRWAY)
    mean = [2 * airway.radius_mm[airway.generation == g].mean() for g in range(7)]
    np.testing.assert_allclose(mean, WEIBEL_MM, rtol=0.3)
    pieces = carry_trees(p.trees, p.subject.chest, p.subject.exhale, p.subject.exhale)
    assert 120 <= pieces.volume_ml(ARTERY) + pieces.volume_ml(VEIN) <= 250
    for tree in p.trees:
        # Murray: a parent is never thinner than its children.
        ends_at = {int(node): radius for (_, node), radius in zip(tree.ends, tree.radius_mm, strict=True)}
        for (first, _), radius in zip(tree.ends, tree.radius_mm, strict=True):
            assert radius <= ends_at.get(int(first), np.inf)


def test_every_branch_starts_where_another_ends(phantom: Phantoms) -> None:
    for tree in phantom("deep", 1).trees:
        orphans = ~np.isin(tree.ends[:, 0], tree.ends[:, 1])
        assert orphans.sum() == 2  # one root for each lung
        assert not tree.generation[orphans].any()


def test_vessels_keep_their_blood_and_airways_widen(phantom: Phantoms) -> None:
    p = phantom("deep", 1)
    s = p.subject
    at_exhale = carry_trees(p.trees, s.chest, s.exhale, s.exhale)
    at_inhale = carry_trees(p.trees, s.chest, s.exhale, s.inhale)
    for kind in (ARTERY, VEIN):
        assert at_inhale.volume_ml(kind) == pytest.approx(at_exhale.volume_ml(kind), rel=1e-6)
    airway = at_exhale.kind == AIRWAY
    growth = (at_inhale.radius_mm[airway] / at_exhale.radius_mm[airway]) ** 3
    lung = p.jacobian[p.exhale.lung > 0]
    assert lung.min() * 0.8 < growth.min() < growth.mean() < growth.max() < lung.max() * 1.25


def test_forks_lie_in_the_lungs_and_nearly_everywhere(phantom: Phantoms) -> None:
    p = phantom("deep", 1)
    s = p.subject
    pieces = carry_trees(p.trees, s.chest, s.exhale, s.inhale)
    region, _, _ = trace(s.chest, s.exhale, s.inhale, s.exhale, pieces.end_mm)
    assert np.isin(region, (1, 2)).mean() > 0.98
    # Vessels reach everywhere but into the sharp edges of the recesses.
    at = np.argwhere(p.inhale.lung > 0)[::997, ::-1] * 3.0 + p.inhale.ct.geometry.origin_mm
    away = np.linalg.norm(at[:, None] - pieces.end_mm[None], axis=-1).min(1)
    assert np.median(away) < 6.0
    assert np.percentile(away, 99) < 18.0


def test_a_tube_has_its_volume_at_any_width() -> None:
    geometry = Geometry(shape=(20, 24, 28), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(0.3, 0.1, 0.7), direction=np.eye(3))
    start, end = np.array([[9.0, 10.0, 12.0]]), np.array([[42.0, 33.0, 27.0]])
    for radius in (0.5, 1.1, 1.3, 2.5, 4.0):
        pieces = Pieces(kind=np.array([ARTERY]), start_mm=start, end_mm=end, radius_mm=np.array([radius]))
        hu = np.full(geometry.shape, -1000.0, np.float32)
        shown, _ = draw_trees(pieces, geometry, np.ones(geometry.shape, np.uint8), hu)
        volume = ((shown + 1000) / (1000 + VESSEL_HU)).sum() * 8.0
        length = np.linalg.norm(end - start)
        # Half a ball closes either end.
        assert volume == pytest.approx(np.pi * radius**2 * length, rel=0.15 if radius > 2 else 0.08)


def test_trees_change_no_parenchyma_and_show_in_scan_and_labels(phantom: Phantoms) -> None:
    p = phantom("deep", 1)
    bare = make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=3.0, trees=False))
    assert bare.trees == ()
    for name in ("exhale", "inhale"):
        with_trees, without = getattr(p, name), getattr(bare, name)
        np.testing.assert_array_equal(with_trees.parenchyma_hu, without.parenchyma_hu)
        np.testing.assert_array_equal(with_trees.lung, without.lung)
        assert not without.tree.any()
        lung = with_trees.lung > 0
        vessel = np.isin(with_trees.tree, (ARTERY, VEIN))
        assert with_trees.clean_hu[vessel & lung].mean() > -350
        lumen = (with_trees.tree == AIRWAY) & lung
        assert with_trees.clean_hu[lumen].mean() < -700
        # Trachea, main bronchi and the widest branches are one piece.
        pieces = np.zeros(with_trees.tree.shape, np.int32)
        label(with_trees.tree == AIRWAY, np.ones((3, 3, 3)), output=pieces)
        sizes = np.bincount(pieces[pieces > 0])
        assert sizes.max() > 0.5 * sizes.sum()
        assert (with_trees.clean_hu[(with_trees.tree == AIRWAY) & ~lung] == LUMEN_HU).mean() > 0.9


def test_trees_do_not_depend_on_the_grid(phantom: Phantoms) -> None:
    coarse = make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=8.0))
    for one, other in zip(coarse.trees, phantom("deep", 1).trees, strict=True):
        np.testing.assert_array_equal(one.nodes, other.nodes)
        np.testing.assert_array_equal(one.radius_mm, other.radius_mm)


def test_trees_do_not_depend_on_the_signs_that_lapack_leaves_open(
    phantom: Phantoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigh, rng = np.linalg.eigh, np.random.default_rng(0)

    def other_signs(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, axes = eigh(matrices)
        return values, axes * rng.choice([-1.0, 1.0], (*values.shape[:-1], 1, values.shape[-1]))

    monkeypatch.setattr(np.linalg, "eigh", other_signs)
    other = make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=8.0))
    for one, same in zip(other.trees, phantom("deep", 1).trees, strict=True):
        np.testing.assert_array_equal(one.nodes, same.nodes)
