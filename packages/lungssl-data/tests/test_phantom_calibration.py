"""`deep` phantoms against the ten DIR-Lab COPDgene patients, where their masks and landmarks are at hand."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PATIENTS = ROOT.parent / "shared" / "data" / "copdgene_masks_landmarks"


@pytest.mark.skipif(not PATIENTS.is_dir(), reason="COPDgene masks and landmarks are not part of the repository")
def test_deep_phantoms_breathe_like_the_ten_patients() -> None:
    spec = importlib.util.spec_from_file_location("calibrate_phantom", ROOT / "benchmarks" / "calibrate_phantom.py")
    assert spec is not None
    assert spec.loader is not None
    calibrate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(calibrate)
    patients = calibrate.real(PATIENTS / "copd_masks.zip", PATIENTS / "copd_landmarks_mm.npz")
    phantoms = calibrate.phantoms(6)
    for name in ("volume_ratio", "spread_mm", "exhale_l", "inhale_l"):
        assert min(patients[name]) <= min(phantoms[name]), name
        assert max(phantoms[name]) <= max(patients[name]), name
    # The patients' identity TRE before the shift to the lung box, as published: 12.3-30.9 mm (domain.md C2).
    assert 12.3 <= min(phantoms["identity_tre_mm"])
    assert max(phantoms["identity_tre_mm"]) <= 30.9
