"""`lungssl analyze` on a phantom's files: known recruitment, what an aerated-only mask can't tell, doubts."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from lungssl import analyzing, registering
from lungssl.cli import main
from lungssl.quality import tissue_peak_hu
from lungssl_backbones import create_backbone
from lungssl_backbones.weights import save_encoder
from lungssl_data.pair import PhaseScan
from lungssl_data.phantom import PhantomConfig, make_phantom, write_phantom
from lungssl_data.readers import read_labels, read_volume, write_labels
from lungssl_data.volume import LabelMap
from lungssl_tasks.registration.descent import DescentConfig
from lungssl_tasks.registration.trust import cut_share
from scipy.ndimage import binary_erosion


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "JANE-DOE-1970"
    write_phantom(make_phantom(PhantomConfig(preset="ards", seed=50, spacing_mm=3.0, trees=False)), folder)
    return folder


def sitk_values(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def analyze(patient: Path, output: Path, *more: object) -> int:
    images = ["--exhale", patient / "exhale.nii.gz", "--inhale", patient / "inhale.nii.gz"]
    return main(["analyze", *map(str, images), "-o", str(output), "--preset", "fast", "--no-viewer", *map(str, more)])


def lobes(patient: Path) -> list[str]:
    return [
        "--exhale-lobes", str(patient / "exhale_lobes.nii.gz"), "--inhale-lobes", str(patient / "inhale_lobes.nii.gz")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def analysed(patient: Path) -> Path:
    """The page of the pair with its true lobes, and maps."""
    page = patient.parent / "page.html"
    encoder = patient.parent / "encoder.safetensors"
    save_encoder(create_backbone("resenc_tiny", spacing_mm=4.0, widths=(8, 8, 8), depths=(1, 1, 1)), encoder)
    images = ["--exhale", patient / "exhale.nii.gz", "--inhale", patient / "inhale.nii.gz", *lobes(patient)]
    more = ["-o", page, "--preset", "fast", "--maps", patient.parent / "maps", "--encoder", encoder]
    more += ["--exhale-landmarks", patient / "landmarks.csv", "--inhale-landmarks", patient / "landmarks.csv"]
    assert main(["analyze", *map(str, [*images, *more])]) == 0
    return page


@pytest.fixture(autouse=True)
def search_alone(analysed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't about `analysed` needs no descent."""
    quick = dataclasses.replace(registering.PRESETS["fast"], descent=DescentConfig(levels=()))
    monkeypatch.setitem(registering.PRESETS, "fast", quick)


def test_recruitment_of_a_phantom_with_noise(patient: Path, analysed: Path) -> None:
    truth = json.loads((patient / "phantom.json").read_text())["truth"]
    found = json.loads(analysed.with_suffix(".json").read_text())
    lungs = found["parts"]["lungs"]["pair"]
    assert truth["unmatched_recruited_percent"] > 10
    assert lungs["net_recruited_percent"] == pytest.approx(truth["unmatched_recruited_percent"], abs=2.0)
    assert lungs["tidal_volume_ml"] == pytest.approx(truth["tidal_volume_ml"], rel=0.05)
    assert lungs["recruited_g"] == pytest.approx(truth["recruited_g"], rel=0.2)
    assert "Net recruitment" in found["headline"] and found["research_use_only"]
    assert set(found["parts"]) >= {"lungs", "right", "left", "RUL", "LLL", "gravity_01", "gravity_10"}
    with analysed.with_suffix(".csv").open() as file:
        rows = {(row["part"], row["of"], row["figure"]): row["value"] for row in csv.DictReader(file)}
    assert float(rows["lungs", "pair", "net_recruited_percent"]) == pytest.approx(
        lungs["net_recruited_percent"], rel=1e-5
    )


def test_the_page_needs_no_other_file_and_names_nobody(analysed: Path) -> None:
    page = analysed.read_text()
    assert len(page) < 15e6 and "http:" not in page and "https:" not in page and "src=" in page
    assert "An encoder's features" in page and 'id="viewer-volume-2"' in page
    assert "Research use only" in page and "Net recruitment" in page and "not measurable" not in page
    for path in analysed.parent.glob("page.*"):
        assert "JANE-DOE" not in path.read_text(), path.name


def test_maps_show_where_tissue_opened(patient: Path, analysed: Path) -> None:
    maps = analysed.parent / "maps"
    events = read_labels(maps / "map_events.nii.gz")
    lung = read_labels(maps / "map_lung.nii.gz")
    assert events.geometry.same_grid(lung.geometry)
    recruited = events.labels == 1
    assert recruited.sum() > 100 and not (recruited & (lung.labels == 0)).any()
    back = np.argwhere(recruited)[:, 1].mean() - np.argwhere(lung.labels > 0)[:, 1].mean()
    assert back > 0  # collapse, and what opens of it, lies in the back
    assert {path.name for path in maps.iterdir()} == set(analyzing.MAPS)
    stretch, jacobian = (sitk_values(maps / f"map_{name}.nii.gz") for name in ("stretch", "jacobian"))
    inside = binary_erosion(lung.labels > 0, iterations=2)
    assert (stretch[inside] > 0.99 * np.cbrt(jacobian[inside])).mean() > 0.99  # the largest of three with that product
    assert 1.05 < np.median(stretch[inside]) < 1.5 and not stretch[lung.labels == 0].any()


def test_a_mask_of_aerated_lung_only_gives_no_recruitment(
    patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze(patient, tmp_path / "page.html") == 0
    found = json.loads((tmp_path / "page.json").read_text())
    assert found["masks"] == "aerated"
    for name in ("net_recruited_g", "net_recruited_percent", "recruited_g", "recruited_gas_ml", "exhale_mass_g"):
        assert found["parts"]["lungs"]["pair"][name] is None
    for name in ("non_g", "non_ml", "non_mass_percent", "mass_g", "poor_mass_percent"):
        assert found["parts"]["lungs"]["exhale"][name] is None  # or recruitment would be one subtraction away
    assert found["parts"]["lungs"]["pair"]["tidal_volume_ml"] > 100
    assert "not measurable: aerated-only mask" in capsys.readouterr().out
    assert "not measurable: aerated-only mask" in (tmp_path / "page.html").read_text()
    assert "not measurable: aerated-only mask" in (tmp_path / "page.csv").read_text()


def test_masks_made_by_a_threshold_are_doubted(
    patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = []
    for phase in ("exhale", "inhale"):
        ct, lung = read_volume(patient / f"{phase}.nii.gz"), read_labels(patient / f"{phase}_lung.nii.gz")
        aerated = np.where(ct.hu < -300, lung.labels, np.uint8(0))
        write_labels(tmp_path / f"{phase}.nii.gz", LabelMap(labels=aerated, geometry=lung.geometry))
        masks += [f"--{phase}-mask", str(tmp_path / f"{phase}.nii.gz")]
    assert analyze(patient, tmp_path / "page.html", *masks) == 0
    assert "recruitment can't be told from it" in capsys.readouterr().out


def test_figures_of_a_scan_do_not_hang_on_what_it_is_registered_at(tmp_path: Path) -> None:
    """Cubes of 3 mm blur the lung's edge with the chest wall; the scan's own voxels of 2 mm don't."""
    phantom = make_phantom(PhantomConfig(preset="deep", seed=2, spacing_mm=2.0, trees=False, noise_hu=0.0))
    write_phantom(phantom, tmp_path / "p")
    assert analyze(tmp_path / "p", tmp_path / "page.html", *lobes(tmp_path / "p")) == 0
    found = json.loads((tmp_path / "page.json").read_text())["parts"]["lungs"]
    truth = phantom.truth.figures
    for phase in ("exhale", "inhale"):
        assert found[phase]["mass_g"] == pytest.approx(truth[f"{phase}_mass_g"], rel=0.03)
        assert found[phase]["poor_mass_percent"] == pytest.approx(truth[f"{phase}_poor_mass_percent"], abs=1.5)


def test_a_lone_left_lung_is_left_and_different_lungs_are_refused(
    patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = []
    for phase in ("exhale", "inhale"):
        lung = read_labels(patient / f"{phase}_lung.nii.gz")
        alone = np.where(lung.labels == 2, np.uint8(1), np.uint8(0))  # as of one lung, without saying which
        write_labels(tmp_path / f"{phase}.nii.gz", LabelMap(labels=alone, geometry=lung.geometry))
        left += [f"--{phase}-mask", str(tmp_path / f"{phase}.nii.gz")]
    assert analyze(patient, tmp_path / "page.html", *left) == 0
    parts = json.loads((tmp_path / "page.json").read_text())["parts"]
    assert "left" in parts and "right" not in parts
    both = ["--exhale-mask", str(patient / "exhale_lung.nii.gz"), *left[2:]]
    assert analyze(patient, tmp_path / "2.html", *both) == 3
    assert "exhale shows the right and left lung, inhale the left" in capsys.readouterr().err


def test_an_input_is_not_written_over(patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for phase in ("exhale", "inhale"):
        held = patient / f"{phase}_lung.nii.gz"
        name = "map_lung.nii.gz" if phase == "exhale" else "inhale.nii.gz"
        (tmp_path / name).write_bytes(held.read_bytes())
        files += [f"--{phase}-mask", tmp_path / name]
    assert analyze(patient, tmp_path / "page.html", *files, "--maps", tmp_path, "--overwrite") == 2
    assert "would be written over" in capsys.readouterr().err


def test_swapped_phases_are_doubted(patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for name, other in (("exhale", "inhale"), ("inhale", "exhale")):
        for kind in ("", "_lobes"):
            (swapped / f"{name}{kind}.nii.gz").symlink_to(patient / f"{other}{kind}.nii.gz")
    assert analyze(swapped, tmp_path / "page.html", *lobes(swapped)) == 0
    assert "are the scans swapped?" in capsys.readouterr().out


def test_landmarks_are_joined_and_judged(analysed: Path) -> None:
    held = json.loads(analysed.with_suffix(".json").read_text())
    errors = held["registration"]["landmarks"]
    assert errors["points"] > 100 and errors["mean_mm"] < 0.5 * errors["identity_mm"]
    told = next(check for check in held["checks"] if check["name"] == "landmarks")
    assert told["found"].startswith(f"{errors['points']} missed by {errors['mean_mm']:.2f} mm")
    assert (told["doubt"] is None) == (errors["mean_mm"] <= 2)
    assert "Landmarks of exhale joined" in analysed.read_text()


def test_landmarks_of_another_scan_are_refused(
    patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = np.loadtxt(patient / "landmarks.csv", delimiter=",", skiprows=1)
    header = (patient / "landmarks.csv").read_text().splitlines()[0]
    turned = tmp_path / "ras.csv"
    np.savetxt(
        turned, points * [-1, -1, 1, -1, -1, 1] + [900, 0, 0, 900, 0, 0], "%.2f", ",", header=header, comments=""
    )
    files = ["--exhale-landmarks", turned, "--inhale-landmarks", patient / "landmarks.csv"]
    assert analyze(patient, tmp_path / "page.html", *files) == 3
    assert "ras.csv: point 1 lies beyond --exhale; points must be in LPS mm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--inhale-landmarks", "x.csv"], "--exhale-landmarks and --inhale-landmarks belong together"),
        (["--aerated-masks"], "about given masks"),
        (["--exhale-mask", "x.nii.gz"], "--exhale-mask and --inhale-mask belong together"),
        (["--preset", "fats"], "did you mean 'fast'"),
        (["--model", "m", "--exhale-lobes", "a", "--inhale-lobes", "b"], "exclude each other"),
    ],
)
def test_options_that_do_not_fit(
    patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert analyze(patient, tmp_path / "page.html", *more) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_lobes_in_other_codes_are_refused(patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = read_labels(patient / "exhale_lobes.nii.gz")
    write_labels(tmp_path / "lobes.nii.gz", LabelMap(labels=given.labels * np.uint8(10), geometry=given.geometry))
    other = ["--exhale-lobes", tmp_path / "lobes.nii.gz", "--inhale-lobes", patient / "inhale_lobes.nii.gz"]
    assert analyze(patient, tmp_path / "page.html", *other) == 3
    assert "expected lobes 1 RUL" in capsys.readouterr().err


def test_the_share_of_surface_that_a_scan_cuts() -> None:
    lung = np.zeros((6, 6, 6), np.uint8)
    lung[0:4, 2:4, 2:4] = 1
    scan = PhaseScan(
        ct_hu=np.where(lung, -800, 45).astype(np.int16),
        valid=np.ones_like(lung),
        lung=lung,
        spacing_mm=(2.0, 2.0, 2.0),
        origin_mm=(0.0, 0.0, 0.0),
    )
    assert cut_share(scan) == pytest.approx(4 / (4 * 8 + 2 * 4))  # one end of a prism of 2 x 2 x 4 voxels
    assert tissue_peak_hu(scan) == pytest.approx(45, abs=6)
