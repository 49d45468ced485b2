"""`lungssl cosegment` on a phantom's files: what is drawn, by whom, and what is refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lungssl import drawing_lesions
from lungssl.cli import main
from lungssl_backbones import create_backbone
from lungssl_data.phantom import Phantom, PhantomConfig, make_phantom
from lungssl_data.readers import read_labels, write_labels, write_volume
from lungssl_data.volume import LabelMap
from lungssl_tasks.cosegmentation.diameters import Diameters, Part, lesions_of
from lungssl_tasks.cosegmentation.diameters_file import write_diameters
from lungssl_tasks.metrics import dice
from torch import Tensor


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    config = PhantomConfig(preset="deep", seed=302, spacing_mm=4.0, trees=False, pathology=("consolidation",))
    return make_phantom(config)


@pytest.fixture(scope="module")
def patient(phantom: Phantom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patient")
    for phase in ("exhale", "inhale"):
        source = getattr(phantom, phase)
        write_volume(folder / f"{phase}.nii.gz", source.ct)
        write_labels(folder / f"{phase}_lung.nii.gz", LabelMap(labels=source.lung, geometry=source.ct.geometry))
    return folder


def largest(phantom: Phantom, phase: str) -> tuple[Part, Diameters]:
    source = getattr(phantom, phase)
    part = lesions_of(source.lesion)[0]
    return part, part.diameters(source.ct.geometry)


def cosegment(patient: Path, diameters: Path, output: Path, *more: object) -> int:
    files = [word for phase in ("exhale", "inhale") for word in (f"--{phase}", patient / f"{phase}.nii.gz")]
    files += [word for phase in ("exhale", "inhale") for word in (f"--{phase}-mask", patient / f"{phase}_lung.nii.gz")]
    return main(["cosegment", *map(str, [*files, "--diameters", diameters, "-o", output, *more])])


def test_grabcut_draws_a_scan_by_its_own_diameters(
    phantom: Phantom, patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, diameters = largest(phantom, "exhale")
    write_diameters(tmp_path / "d.csv", {("JANE DOE", "exhale"): [diameters]})
    assert cosegment(patient, tmp_path / "d.csv", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "inhale not drawn: no diameters there" in printed.out
    found = read_labels(tmp_path / "out" / "exhale_lesions.nii.gz")
    truth = np.zeros(found.labels.shape, bool)
    truth[tuple(slice(low, low + n) for low, n in zip(part.corner, part.mask.shape, strict=True))] = part.mask
    assert dice(found.labels == 1, truth) > 0.6
    assert not read_labels(tmp_path / "out" / "inhale_lesions.nii.gz").labels.any()
    rows = list(csv.DictReader((tmp_path / "out" / "lesions.csv").read_text().splitlines()))
    assert [(row["phase"], row["drawn_by"]) for row in rows] == [("exhale", "GrabCut"), ("inhale", "nobody")]
    assert rows[1]["volume_ml"] == rows[1]["mean_hu"] == ""
    assert float(rows[0]["volume_ml"]) == pytest.approx((found.labels == 1).sum() * 0.064, abs=1e-3)
    assert float(rows[0]["mean_hu"]) == pytest.approx(phantom.exhale.ct.hu[found.labels == 1].mean(), abs=0.1)
    assert "JANE" not in printed.out + printed.err + (tmp_path / "out" / "lesions.csv").read_text()
    assert cosegment(patient, tmp_path / "d.csv", tmp_path / "out") == 2
    assert "is in use" in capsys.readouterr().err
    mine = tmp_path / "out" / "lesions.csv"
    mine.write_bytes((tmp_path / "d.csv").read_bytes())
    assert cosegment(patient, mine, tmp_path / "out", "--overwrite") == 2
    assert "is an input and would be written over" in capsys.readouterr().err
    assert mine.read_bytes() == (tmp_path / "d.csv").read_bytes()


class Paints(torch.nn.Module):
    """Draws the ellipsoid that it is told, and a speck in a corner of the crop that nobody asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = create_backbone("resenc_tiny", widths=(8, 16, 16), depths=(1, 1, 1), spacing_mm=4.0)

    def forward(self, exhale_hu: Tensor, inhale_hu: Tensor, exhale_told: Tensor, inhale_told: Tensor) -> list[Tensor]:
        assert exhale_hu.shape == inhale_hu.shape == (1, 1, 32, 32, 32)
        found = []
        for told in (exhale_told, inhale_told):
            wanted = told - 0.5
            wanted[..., :2, :2, :2] = 1.0
            found.append(torch.cat([torch.zeros_like(wanted), wanted], dim=1))
        return found


def test_a_network_draws_in_both_phases(
    phantom: Phantom, patient: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing_lesions, "load_cosegmentation", lambda folder: (Paints(), 32))
    _, diameters = largest(phantom, "exhale")
    write_diameters(tmp_path / "d.csv", {("p", "exhale"): [diameters]})
    assert cosegment(patient, tmp_path / "d.csv", tmp_path / "out", "--model", tmp_path / "model") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "lesions.csv").read_text().splitlines()))
    assert [(row["phase"], row["diameters"], row["drawn_by"]) for row in rows] == [
        ("exhale", "own", "network"),
        ("inhale", "other phase", "network"),
    ]
    exhale = read_labels(tmp_path / "out" / "exhale_lesions.nii.gz")
    assert dice(exhale.labels == 1, diameters.ellipsoid(phantom.exhale.ct.geometry)) > 0.7  # without the speck
    inhale, (there, _) = read_labels(tmp_path / "out" / "inhale_lesions.nii.gz"), largest(phantom, "inhale")
    middle_mm = there.points_mm(phantom.inhale.ct.geometry).mean(axis=0)
    found_mm = lesions_of(inhale.labels)[0].points_mm(inhale.geometry).mean(axis=0)
    assert np.linalg.norm(found_mm - middle_mm) < 25  # by the lungs' boxes alone


def test_files_that_do_not_fit_are_refused(
    phantom: Phantom, patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, one = largest(phantom, "exhale")
    write_diameters(tmp_path / "two.csv", {("JANE", "exhale"): [one], ("JOHN", "exhale"): [one]})
    assert cosegment(patient, tmp_path / "two.csv", tmp_path / "out") == 2
    assert "2 patients; keep the lines of this pair's" in capsys.readouterr().err
    far = one.moved(np.array([0.0, 0.0, 900.0]))
    write_diameters(tmp_path / "far.csv", {("p", "exhale"): [far]})
    assert cosegment(patient, tmp_path / "far.csv", tmp_path / "out") == 3
    assert "lies outside of the exhale scan" in capsys.readouterr().err
    ras = Diameters(long_mm=one.long_mm * [-1, -1, 1], short_mm=one.short_mm * [-1, -1, 1])
    write_diameters(tmp_path / "ras.csv", {("JANE", "exhale"): [ras]})
    assert cosegment(patient, tmp_path / "ras.csv", tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert "ras.csv, line 2: " in said and "RAS" in said and "JANE" not in said
    write_diameters(tmp_path / "again.csv", {("JANE", "exhale"): [one, one]})
    assert cosegment(patient, tmp_path / "again.csv", tmp_path / "out") == 3
    assert "line 3: the same lesion as in" in capsys.readouterr().err
    write_diameters(tmp_path / "d.csv", {("JANE", "exhale"): [one]})
    twice = ["--inhale", str(patient / "exhale.nii.gz")]
    assert cosegment(patient, tmp_path / "d.csv", tmp_path / "out", *twice) == 3
    assert "are the same scan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
