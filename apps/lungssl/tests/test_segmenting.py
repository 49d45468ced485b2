"""`segment --model` shows a model all of the lung, however far behind the last air."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lungssl.segmenting import segment_lungs, segment_with_model
from lungssl.structures import LESION_NAMES
from lungssl_data.volume import Geometry, Volume
from lungssl_tasks import inference, model_folder
from lungssl_tasks.aeration.parts import LOBE_NAMES

MM = 8.0


@pytest.fixture
def volume() -> Volume:
    """Two lungs of air in a body, and behind them 64 mm of lung without any, which a CT can't tell from muscle."""
    z, y, x = np.indices((36, 40, 44)) - np.array([18, 20, 22]).reshape(3, 1, 1, 1)
    hu = np.where((y / 18) ** 2 + (x / 20) ** 2 < 1, 0, -1000)
    lungs = ((abs(x) - 9) / 6) ** 2 + ((y + 4) / 6) ** 2 + (z / 10) ** 2 < 1
    hu[lungs] = -800
    behind = (y >= 0) & (y < 10) & (abs(abs(x) - 9) < 4) & (abs(z) < 7) & ~lungs
    hu[behind] = 60
    geometry = Geometry(shape=hu.shape, spacing_mm=(MM, MM, MM), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    return Volume(hu=hu.astype(np.int16), geometry=geometry)


def stub(monkeypatch: pytest.MonkeyPatch, folder: Path, names: dict[int, str]) -> list[tuple[int, ...]]:
    """A model that takes air and what is denser than the body for lung; returns the shapes it is shown."""
    shown = []

    def predict(model: Any, ct_hu: np.ndarray, **_: Any) -> np.ndarray:
        shown.append(ct_hu.shape)
        inside = np.zeros(ct_hu.shape, bool)
        inside[2:-2, 2:-2, 2:-2] = True  # air around the body is none
        lung = ((ct_hu < -400) & inside & (ct_hu > -900)) | (ct_hu > 10)
        sides = np.arange(ct_hu.shape[2]) < ct_hu.shape[2] // 2
        return np.where(lung, np.where(sides, 1, 4), 0).astype(np.uint8)

    card = SimpleNamespace(spacing_mm=(MM,) * 3, labels=names, roi_vox=(16,) * 3, backbone="stub", versions={})
    monkeypatch.setattr(inference, "predict_labels", predict)
    monkeypatch.setattr(model_folder, "load_model", lambda _: (None, card))
    (folder / model_folder.WEIGHTS).write_bytes(b"")
    return shown


def test_airless_lung_behind_the_last_air_is_found(
    volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stub(monkeypatch, tmp_path, dict(LOBE_NAMES))
    air = segment_lungs(volume).mask.labels > 0
    assert not air[volume.hu == 60].any()
    found = segment_with_model(volume, tmp_path).mask.labels > 0
    assert found[volume.hu == 60].mean() > 0.95
    assert len(shown) == 2 and np.prod(shown[1]) < np.prod(shown[0])  # then no more than is needed


def test_lesions_are_looked_for_where_there_is_air(
    volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stub(monkeypatch, tmp_path, dict(LESION_NAMES))
    segment_with_model(volume, tmp_path)
    assert len(shown) == 1
