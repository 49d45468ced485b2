import numpy as np
import pytest
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.phantom.config import Artefact
from lungssl_data.phantom.physics import noise, scan
from scipy.ndimage import minimum_filter


def test_noise_has_its_stated_size_and_is_drawn_apart_for_each_phase() -> None:
    noisy = make_phantom(PhantomConfig(seed=2, spacing_mm=4.0))
    still = make_phantom(PhantomConfig(seed=2, spacing_mm=4.0, noise_hu=0.0))
    np.testing.assert_array_equal(noisy.exhale.clean_hu, still.exhale.clean_hu)
    noise = []
    for name in ("exhale", "inhale"):
        with_noise, without = (getattr(p, name) for p in (noisy, still))
        chest = without.body > 0  # in air, HU are clipped at -1024
        noise.append((with_noise.ct.hu.astype(float) - without.ct.hu)[chest])
        assert noise[-1].std() == pytest.approx(noisy.parameters[f"{name}_scan"]["noise_hu"], rel=0.02)
        assert abs(noise[-1].mean()) < 0.5
    assert abs(np.corrcoef(*(n[:100_000] for n in noise))[0, 1]) < 0.02
    assert noisy.parameters["exhale_scan"] != noisy.parameters["inhale_scan"]


def test_low_dose_at_exhale_doubles_its_noise_only() -> None:
    usual = make_phantom(PhantomConfig(seed=2, spacing_mm=6.0)).parameters
    low = make_phantom(PhantomConfig(seed=2, spacing_mm=6.0, expiratory_low_dose=True)).parameters
    assert low["exhale_scan"]["noise_hu"] == pytest.approx(2 * usual["exhale_scan"]["noise_hu"])
    assert low["inhale_scan"] == usual["inhale_scan"]


def test_noise_peaks_where_it_says_and_is_louder_through_shoulders() -> None:
    field = noise(np.random.default_rng(0), (40, 128, 160), spacing_mm=0.8, peak=0.3, slice_mm=0.8)
    assert field.std() == pytest.approx(1, rel=1e-4)
    power = (np.abs(np.fft.rfft2(field)) ** 2).mean(0)
    radius = np.hypot(np.fft.fftfreq(128, 0.8)[:, None], np.fft.rfftfreq(160, 0.8))
    rings = np.arange(0.05, 0.6, 0.05)
    mean = [power[(radius >= r - 0.025) & (radius < r + 0.025)].mean() for r in rings]
    assert rings[int(np.argmax(mean))] == pytest.approx(0.3, abs=0.051)
    assert power[radius < 0.02].mean() < 0.1 * max(mean)
    # Two slabs of water, one twice as wide.
    body = np.zeros((20, 60, 120), np.uint8)
    body[:10, 10:50, 40:80], body[10:, 10:50, 10:110] = 1, 1
    hu = np.where(body > 0, 0, -1000).astype(np.float32)
    counts, _ = scan(np.random.default_rng(1), hu, body, spacing_mm=4.0, noise_hu=20.0)
    narrow, wide = counts[1:8, 15:45, 45:75].std(), counts[12:19, 15:45, 45:75].std()
    assert wide > 1.2 * narrow


def test_a_sharp_kernel_overshoots_at_an_edge_and_a_soft_one_does_not() -> None:
    hu = np.full((4, 40, 40), -800, np.float32)
    hu[:, :, 20:] = 0
    body = np.ones(hu.shape, np.uint8)
    seen = {}
    for seed in range(12):
        counts, drawn = scan(np.random.default_rng(seed), hu, body, spacing_mm=0.7, noise_hu=0.0)
        seen.setdefault(drawn["sharp_kernel"], []).append(int(counts.max()))
    assert min(seen[1.0]) > 10
    assert max(seen[0.0]) <= 0


@pytest.mark.parametrize("artefact", ["streaks", "cropped_fov", "scale_error", "step"])
def test_artefacts_change_the_scan_and_nothing_else(artefact: Artefact) -> None:
    plain = make_phantom(PhantomConfig(seed=1, spacing_mm=6.0, noise_hu=0.0))
    marred = make_phantom(PhantomConfig(seed=1, spacing_mm=6.0, noise_hu=0.0, artefacts=(artefact,)))
    np.testing.assert_array_equal(plain.exhale.clean_hu, marred.exhale.clean_hu)
    np.testing.assert_array_equal(plain.exhale.lung, marred.exhale.lung)
    change = marred.exhale.ct.hu.astype(int) - plain.exhale.ct.hu
    assert change.any()
    if artefact == "scale_error":
        assert np.abs(change).max() <= 16  # 0.5 % of at most 3071 HU
    if artefact == "cropped_fov":
        assert (~marred.exhale.ct.valid()).mean() > 0.1
    if artefact == "streaks":
        assert (change != 0).any((1, 2)).mean() < 0.2


def _features(patch: np.ndarray) -> list[float]:
    z = (patch - patch.mean()) / patch.std()
    along = [float((np.diff(z, axis=axis) ** 2).mean()) for axis in range(3)]
    return [*along, float((z**3).mean()), float((z**4).mean()), float(np.abs(z).mean())]


def test_noise_and_kernel_outside_the_lungs_do_not_tell_the_phase() -> None:  # (9)
    features, phase, group = [], [], []
    for seed in range(8):
        p = make_phantom(PhantomConfig(preset="ards", seed=seed, spacing_mm=6.0, trees=False, pathology=()))
        for number, scanned in enumerate((p.exhale, p.inhale)):
            near = minimum_filter(((scanned.region > 2) & (scanned.region != 5)).astype(np.uint8), 5, mode="constant")
            index = np.argwhere(near)
            index = index[np.random.default_rng(seed).permutation(len(index))[:60]]
            for k, j, i in index:
                features.append(_features(scanned.ct.hu[k - 2 : k + 3, j - 2 : j + 3, i - 2 : i + 3].astype(float)))
                phase.append(number)
                group.append(seed)
    x, y, group = np.asarray(features), np.asarray(phase, float), np.asarray(group)
    x = np.column_stack(((x - x.mean(0)) / x.std(0), np.ones(len(x))))
    score = np.empty(len(y))
    for fold in range(4):
        test = group % 4 == fold
        weight = np.zeros(x.shape[1])
        for _ in range(300):
            guess = 1 / (1 + np.exp(-x[~test] @ weight))
            weight -= 0.5 * (x[~test].T @ (guess - y[~test]) / (~test).sum() + 1e-3 * weight)
        score[test] = x[test] @ weight
    rank = score.argsort().argsort() + 1
    ones = y == 1
    auc = (rank[ones].sum() - ones.sum() * (ones.sum() + 1) / 2) / (ones.sum() * (~ones).sum())
    assert 0.4 <= auc <= 0.6
