"""`lungssl register` and `lungssl warp` on a phantom's files, at voxels too coarse for anything but a test."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from lungssl import registering
from lungssl.cli import main
from lungssl_backbones import create_backbone
from lungssl_backbones.weights import save_encoder
from lungssl_data.cache import write_pair
from lungssl_data.field import read_field, write_field
from lungssl_data.pair import Displacement, Landmarks, PhasePair, PhaseScan
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.points import read_points, write_points
from lungssl_data.readers import read_labels, read_volume, write_labels, write_volume
from lungssl_data.volume import Geometry, LabelMap, Volume
from lungssl_tasks.registration import RegistrationConfig
from lungssl_tasks.registration.descent import DescentConfig, Level
from lungssl_tasks.registration.search import SearchConfig

COARSE = RegistrationConfig(
    spacing_mm=8.0,
    search=SearchConfig(grid_mm=16.0, reach_mm=32.0),
    descent=DescentConfig(levels=(Level(spacing_mm=8.0, iterations=20, rim=1),)),
)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    phantom = make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=8.0))
    for name, phase in (("exhale", phantom.exhale), ("inhale", phantom.inhale)):
        padded = phase.ct.hu.copy()
        padded[:, :2, :2] = -3024  # as a scanner fills corners
        write_volume(folder / f"{name}.nii.gz", Volume(hu=padded, geometry=phase.ct.geometry))
        write_labels(folder / f"{name}_lung.nii.gz", LabelMap(labels=phase.lung, geometry=phase.ct.geometry))
    return folder


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registering.PRESETS, "default", COARSE)


def command(scans: Path, output: Path, *more: object) -> list[str]:
    masks = ["--fixed-mask", str(scans / "exhale_lung.nii.gz"), "--moving-mask", str(scans / "inhale_lung.nii.gz")]
    images = ["--fixed", str(scans / "exhale.nii.gz"), "--moving", str(scans / "inhale.nii.gz")]
    return ["register", *images, *masks, "-o", str(output), *map(str, more)]


def lung_points_mm(mask: LabelMap) -> np.ndarray:
    affine = mask.geometry.index_to_mm()
    return np.argwhere(mask.labels > 0)[::50, ::-1] @ affine[:, :3].T + affine[:, 3]


def test_all_that_can_be_written_agrees(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "inverse": "back.mha",
        "warped": "w.nii.gz",
        "jacobian": "j.nii.gz",
        "summary": "s.json",
        "picture": "p.png",
    }
    more = [word for option, name in names.items() for word in (f"--{option}", tmp_path / name)]
    assert main(command(scans, tmp_path / "u.nrrd", *more)) == 0
    assert "nothing speaks against it" in capsys.readouterr().out
    fixed, lung = read_volume(scans / "exhale.nii.gz"), read_labels(scans / "exhale_lung.nii.gz")
    _, grid = read_field(tmp_path / "u.nrrd")
    assert grid.same_grid(fixed.geometry)

    points = lung_points_mm(lung)
    write_points(tmp_path / "points.csv", points)
    warp = ["warp", "--field", str(tmp_path / "u.nrrd")]
    assert main([*warp, "--points", str(tmp_path / "points.csv"), "-o", str(tmp_path / "there.pts")]) == 0
    there = read_points(tmp_path / "there.pts")
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "u.nrrd"), sitk.sitkVectorFloat64))
    np.testing.assert_allclose(there, [transform.TransformPoint(p) for p in points.tolist()], atol=1e-5)
    assert np.linalg.norm(there - points, axis=1).mean() > 5

    back, back_grid = read_field(tmp_path / "back.mha")
    assert back_grid.same_grid(read_volume(scans / "inhale.nii.gz").geometry) and np.isfinite(back).all()
    again = registering.warp_points(there, back, back_grid)
    assert np.median(np.linalg.norm(again - points, axis=1)) < 0.5  # between voxels of 8 mm, the inverse isn't linear

    arguments = [*warp, "--image", str(scans / "inhale.nii.gz"), "-o", str(tmp_path / "w2.nii.gz")]
    assert main(arguments) == 0
    warped = read_volume(tmp_path / "w.nii.gz").hu
    assert (warped == read_volume(tmp_path / "w2.nii.gz").hu).all()
    moving_lung = scans / "inhale_lung.nii.gz"
    assert main([*warp, "--labels", str(moving_lung), "-o", str(tmp_path / "l.nii.gz")]) == 0
    inside, found = lung.labels > 0, read_labels(tmp_path / "l.nii.gz").labels > 0
    assert 2 * (inside & found).sum() / (inside.sum() + found.sum()) > 0.93

    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["trusted"] and summary["doubts"] == [] and summary["volume_ratio"] > 1.3
    jacobian = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "j.nii.gz")))
    assert jacobian[jacobian > 0].mean() == pytest.approx(summary["volume_ratio"], rel=0.1)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_how_a_scan_is_stored_does_not_matter(scans: Path, tmp_path: Path) -> None:
    """The same fixed scan with y as the fastest axis: the same field, on its own grid."""
    fixed, mask = read_volume(scans / "exhale.nii.gz"), read_labels(scans / "exhale_lung.nii.gz")
    hu, lung = (np.ascontiguousarray(values.transpose(0, 2, 1)) for values in (fixed.hu, mask.labels))
    swapped = np.eye(3)[[1, 0, 2]]
    grid = dataclasses.replace(fixed.geometry, shape=hu.shape, direction=swapped)
    write_volume(tmp_path / "f.nrrd", Volume(hu=hu, geometry=grid))
    write_labels(tmp_path / "m.nrrd", LabelMap(labels=lung, geometry=grid))
    arguments = command(scans, tmp_path / "u.nrrd")
    assert main(arguments) == 0
    arguments[2], arguments[6], arguments[-1] = (str(tmp_path / name) for name in ("f.nrrd", "m.nrrd", "v.nrrd"))
    assert main(arguments) == 0
    points = lung_points_mm(mask)
    u_mm, v_mm = read_field(tmp_path / "u.nrrd"), read_field(tmp_path / "v.nrrd", oblique=True)
    assert v_mm[1].same_grid(grid) and not v_mm[1].same_grid(u_mm[1])
    np.testing.assert_allclose(
        registering.warp_points(points, *v_mm), registering.warp_points(points, *u_mm), atol=0.05
    )


def test_a_coarser_field_has_voxels_of_the_image(scans: Path, tmp_path: Path) -> None:
    grid = Geometry(shape=(9, 10, 11), spacing_mm=(1.0, 1.5, 4.0), origin_mm=(1.0, 2.0, 3.0), direction=np.eye(3))
    coarse = registering.coarser(grid, 3.2)
    assert coarse.spacing_mm == (3.0, 3.0, 4.0) and coarse.shape == (9, 5, 4) and coarse.origin_mm == grid.origin_mm
    assert registering.coarser(grid, None) is grid


def test_windows_are_as_large_as_the_views_of_the_run(tmp_path: Path) -> None:
    encoder = create_backbone("resenc_tiny", spacing_mm=4.0)
    (tmp_path / "config.yaml").write_text("views: {global_vox: 24}\n")
    assert registering.window_mm_of(tmp_path, encoder) == 96.0
    assert registering.window_mm_of(tmp_path / "encoder.safetensors", encoder) == registering.WINDOW_MM


def test_an_encoders_features_take_part_in_the_search(scans: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_encoder(create_backbone("resenc_tiny", spacing_mm=8.0), tmp_path / "encoder.safetensors")
    more = ("--encoder", tmp_path / "encoder.safetensors")
    assert main(command(scans, tmp_path / "u.mha")) == 0 and main(command(scans, tmp_path / "v.mha", *more)) == 0
    without, with_it = (read_field(tmp_path / f"{name}.mha")[0] for name in "uv")
    lung = read_labels(scans / "exhale_lung.nii.gz").labels > 0
    apart = np.linalg.norm(without - with_it, axis=0)[lung]
    assert 0.01 < apart.mean() < 16  # random features lead elsewhere, but not astray


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    for seed, split in ((1, "train"), (2, "val"), (3, "test")):
        phantom = make_phantom(PhantomConfig(preset="deep", seed=seed, spacing_mm=8.0, texture_rho=1.0))
        grid = phantom.exhale.ct.geometry
        exhale, inhale = (
            PhaseScan(
                ct_hu=phase.ct.hu,
                valid=np.ones(phase.ct.hu.shape, np.uint8),
                lung=phase.lung,
                spacing_mm=phase.ct.geometry.spacing_mm,
                origin_mm=phase.ct.geometry.origin_mm,
            )
            for phase in (phantom.exhale, phantom.inhale)
        )
        points = np.argwhere(phantom.exhale.lung > 0)[::200]
        exhale_mm = points[:, ::-1] * grid.spacing_mm + grid.origin_mm
        landmarks = Landmarks(exhale_mm=exhale_mm, inhale_mm=exhale_mm + phantom.exhale_to_inhale_mm[:, *points.T].T)
        write_pair(
            PhasePair(
                patient=f"p{seed}",
                exhale=exhale,
                inhale=inhale,
                split=split,
                exhale_to_inhale=np.eye(3, 4),
                affine_provenance="none",
                displacement=Displacement(
                    u_mm=phantom.exhale_to_inhale_mm.astype(np.float32),
                    spacing_mm=grid.spacing_mm,
                    origin_mm=grid.origin_mm,
                    provenance="phantom",
                ),
                landmarks={"expert": landmarks},
            ),
            folder,
        )
    return folder


def test_a_network_is_trained_judged_and_used(
    scans: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train.steps=6", "train.eval_every=3", "task.model.width=8", "task.model.groups=2", "train.lr=3e-3"]
    small = ["backbone.widths=[8,16,16]", "backbone.depths=[1,1,1]"]
    command_line = ["finetune", "register", "--data", str(cohort), *train, *small]
    assert main([*command_line, "--dry-run"]) == 0
    assert "1 pairs; resenc_tiny from random weights" in capsys.readouterr().out
    assert main([*command_line, "--out", str(tmp_path / "net")]) == 0
    summary = json.loads((tmp_path / "net" / "summary.json").read_text())
    assert summary["patients"] == ["p1"] and 0 < summary["val"]["error_mm"] < 50

    evaluate = ["evaluate", "--data", str(cohort)]
    assert main([*evaluate, "--model", str(tmp_path / "net"), "--raw", "--out", str(tmp_path / "a")]) == 2
    assert "--raw is for models of lobes or lungs" in capsys.readouterr().err
    assert (
        main([*evaluate, "--model", str(tmp_path / "net"), "--register", "coarse", "--out", str(tmp_path / "a")]) == 0
    )
    assert main([*evaluate, "--register", "default", "--out", str(tmp_path / "b")]) == 0
    rows = list(csv.DictReader((tmp_path / "b" / "scores.csv").read_text().splitlines()))
    assert [(row["patient"], row["truth"]) for row in rows] == [("p3", "expert"), ("p3", "phantom")]
    for name in ("a", "b"):
        held = json.loads((tmp_path / name / "summary.json").read_text())
        assert held["expert"]["identity_mm"] == pytest.approx(held["phantom"]["identity_mm"], rel=0.2)
        assert held["expert"]["patients"] == 1 and held["expert"]["sd_mm"] is None
    assert held["phantom"]["mean_mm"] < held["phantom"]["affine_mm"] < held["phantom"]["identity_mm"]

    model = ("--model", tmp_path / "net")
    assert main(command(scans, tmp_path / "u.mha", *model)) == 0
    without = command(scans, tmp_path / "v.mha")
    assert "network after" in capsys.readouterr().out and main(without) == 0
    assert (read_field(tmp_path / "u.mha")[0] != read_field(tmp_path / "v.mha")[0]).any()


def turned(volume: Volume, mask: LabelMap, degrees: float, folder: Path) -> None:
    """The patient lies turned about the body's axis: the same voxels, resampled onto a grid of no direction."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    centre = volume.geometry.index_to_mm() @ [*(np.array(volume.hu.shape[::-1]) / 2), 1]
    for name, image, how, beyond in (
        ("inhale", sitk.GetImageFromArray(volume.hu), sitk.sitkLinear, -1000),
        ("inhale_lung", sitk.GetImageFromArray(mask.labels), sitk.sitkNearestNeighbor, 0),
    ):
        image.SetSpacing(volume.geometry.spacing_mm)
        image.SetOrigin(volume.geometry.origin_mm)
        rotation = sitk.AffineTransform(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).ravel().tolist(), [0.0, 0.0, 0.0])
        rotation.SetCenter(centre.tolist())
        size = [int(1.5 * n) for n in image.GetSize()]
        reference = sitk.Image(size, sitk.sitkInt16)
        reference.SetSpacing(volume.geometry.spacing_mm)
        reference.SetOrigin(
            [o - 0.25 * n * mm for o, n, mm in zip(image.GetOrigin(), image.GetSize(), image.GetSpacing(), strict=True)]
        )
        sitk.WriteImage(sitk.Resample(image, reference, rotation, how, beyond), str(folder / f"{name}.nii.gz"))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(
        [[c, s, 0], [-s, c, 0], [0, 0, 1]]
    )  # the patient's points, as the resampled scan has them
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre
    np.save(folder / "moved.npy", matrix)


@pytest.mark.parametrize("what", ["as they are", "thick slices", "padding", "far origins", "turned by 45 degrees"])
def test_however_the_inhale_is_stored_points_are_found(scans: Path, tmp_path: Path, what: str) -> None:
    """One phantom, its inhale stored in ways that scanners and archives have; errors by the exact displacement."""
    phantom = make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=8.0))
    volume, mask = read_volume(scans / "inhale.nii.gz"), read_labels(scans / "inhale_lung.nii.gz")
    moved = np.eye(4)
    hu, lung, grid = volume.hu.copy(), mask.labels, volume.geometry
    if what == "thick slices":  # 6 times as thick as wide: 4 mm beside 0.7 mm
        hu, lung = hu[::2].repeat(3, axis=1).repeat(3, axis=2), lung[::2].repeat(3, axis=1).repeat(3, axis=2)
        x, y, z = grid.origin_mm
        grid = Geometry(
            shape=hu.shape, spacing_mm=(8 / 3, 8 / 3, 16.0), origin_mm=(x - 8 / 3, y - 8 / 3, z), direction=np.eye(3)
        )
    elif what == "padding":
        far = np.indices(hu.shape[1:]) - np.array(hu.shape[1:]).reshape(2, 1, 1) / 2
        hu[:, np.hypot(*far) > min(hu.shape[1:]) / 2] = -3024
    elif what == "far origins":
        moved[:3, 3] = [5000.0, -3000.0, 800.0]
        x, y, z = grid.origin_mm
        grid = dataclasses.replace(grid, origin_mm=(x + 5000.0, y - 3000.0, z + 800.0))
    write_volume(tmp_path / "inhale.nii.gz", Volume(hu=hu, geometry=grid))
    write_labels(tmp_path / "inhale_lung.nii.gz", LabelMap(labels=lung, geometry=grid))
    if what == "turned by 45 degrees":
        turned(volume, mask, 45.0, tmp_path)
        moved = np.load(tmp_path / "moved.npy")
    arguments = command(scans, tmp_path / "u.mha", "--summary", tmp_path / "s.json")
    arguments[4], arguments[8] = (str(tmp_path / name) for name in ("inhale.nii.gz", "inhale_lung.nii.gz"))
    assert main(arguments) == 0
    index = np.argwhere(phantom.exhale.lung > 0)[::50]
    affine = phantom.exhale.ct.geometry.index_to_mm()
    points = index[:, ::-1] @ affine[:, :3].T + affine[:, 3]
    truth = (points + phantom.exhale_to_inhale_mm[:, *index.T].T) @ moved[:3, :3].T + moved[:3, 3]
    error = np.linalg.norm(registering.warp_points(points, *read_field(tmp_path / "u.mha")) - truth, axis=1)
    # Voxels of 8 mm: 4.8 mm as they are, 4.1 turned; slices of 16 mm cost 0.6.
    assert error.mean() < {"thick slices": 6.2}.get(what, 5.3)
    assert json.loads((tmp_path / "s.json").read_text())["doubts"] == []


def test_landmarks_are_judged_by_and_a_page_is_written(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lung = read_labels(scans / "exhale_lung.nii.gz")
    points = lung_points_mm(lung)
    write_points(tmp_path / "here.csv", points)
    write_points(tmp_path / "there.csv", points + np.array([3.0, 4.0, 0.0]))
    marks = ("--fixed-landmarks", tmp_path / "here.csv", "--moving-landmarks", tmp_path / "there.csv")
    page, figures = tmp_path / "r.html", tmp_path / "s.json"
    assert main(command(scans, tmp_path / "u.mha", *marks, "--report", page, "--summary", figures)) == 0
    write_points(tmp_path / "far.csv", points + np.array([0.0, 0.0, 5000.0]))
    distant = ("--fixed-landmarks", tmp_path / "here.csv", "--moving-landmarks", tmp_path / "far.csv")
    assert main(command(scans, tmp_path / "v.mha", *distant)) == 3
    assert "far.csv: point 1 lies beyond --moving" in capsys.readouterr().err
    errors = json.loads(figures.read_text())["landmarks"]
    assert errors["points"] == len(points) and errors["identity_mm"] == pytest.approx(5.0)
    moved = registering.warp_points(points, *read_field(tmp_path / "u.mha"))
    expected = np.linalg.norm(moved - points - [3.0, 4.0, 0.0], axis=1)
    assert errors["mean_mm"] == pytest.approx(expected.mean(), abs=0.05)
    text = page.read_text()
    assert f"{errors['mean_mm']:.2f} (" in text and "Nothing speaks against it" in text
    assert text.count("data:image/png") == 1 and "<script" not in text and "http" not in text


def test_masks_without_sides_are_of_both_lungs(scans: Path, tmp_path: Path) -> None:
    mask = read_labels(scans / "exhale_lung.nii.gz")
    write_labels(tmp_path / "one.nii.gz", LabelMap(labels=(mask.labels > 0).astype(np.uint8), geometry=mask.geometry))
    arguments = command(scans, tmp_path / "u.mha", "--summary", tmp_path / "s.json")
    arguments[6] = str(tmp_path / "one.nii.gz")
    assert main(arguments) == 0
    assert json.loads((tmp_path / "s.json").read_text())["doubts"] == []


@pytest.mark.parametrize("kind", ["lobes", "left"])
def test_masks_of_lobes_and_of_one_lung(scans: Path, tmp_path: Path, kind: str) -> None:
    """Lobes are lungs with more codes; a mask of 2 alone is of the left lung, and the other right one is left out."""
    mask = read_labels(scans / "exhale_lung.nii.gz")
    codes = [0, 2, 5] if kind == "lobes" else [0, 0, 2]
    write_labels(tmp_path / "m.nii.gz", LabelMap(labels=np.array(codes, np.uint8)[mask.labels], geometry=mask.geometry))
    arguments = command(scans, tmp_path / "u.mha", "--summary", tmp_path / "s.json")
    arguments[6] = str(tmp_path / "m.nii.gz")
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "s.json").read_text())
    expected = [] if kind == "lobes" else ["only the moving scan shows a right lung, of which the field says nothing"]
    assert summary["doubts"] == expected


def test_landmarks_of_both_phases_in_one_table(scans: Path, tmp_path: Path) -> None:
    table = tmp_path / "landmarks.csv"
    affine = read_labels(scans / "exhale_lung.nii.gz").geometry.index_to_mm()
    here = np.array([[10, 10, 10], [12, 11, 9]]) @ affine[:, :3].T + affine[:, 3]
    table.write_text(
        ",".join(f"{phase}_{axis}_mm" for phase in ("exhale", "inhale") for axis in "xyz")
        + "".join("\n" + ",".join(f"{v:.3f}" for v in [*row, *(row + 1)]) for row in here)
    )
    volumes = {
        role: read_volume(scans / f"{phase}.nii.gz") for role, phase in (("fixed", "exhale"), ("moving", "inhale"))
    }
    first, second = registering.read_landmarks((table, table), volumes)
    np.testing.assert_allclose(second - first, 1.0, atol=1e-9)


def test_inputs_are_not_written_over(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(scans)
    arguments = command(scans, tmp_path / "u.mha", "--warped", tmp_path / "link" / "inhale.nii.gz", "--overwrite")
    assert main(arguments) == 2 and "would be written over" in capsys.readouterr().err
    labels = scans / "inhale_lung.nii.gz"
    arguments = ["warp", "--field", "u.mha", "--labels", str(labels), "-o", str(labels), "--overwrite"]
    assert main(arguments) == 2 and "would be written over" in capsys.readouterr().err


def test_where_a_field_is_not_known(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is air in the warped scan, not the scan as it was; points are refused; indices count in the fixed scan."""
    moving = read_volume(scans / "inhale.nii.gz")
    u_mm = np.zeros((3, *moving.hu.shape), np.float32)
    u_mm[:, 5:8] = np.nan
    write_field(tmp_path / "u.nrrd", u_mm, moving.geometry)
    warped = registering.warp_volume(moving, u_mm, moving.geometry).hu
    assert (warped[5:8] == -1000).all()
    np.testing.assert_array_equal(warped[8:, 3:], moving.hu[8:, 3:])
    affine = moving.geometry.index_to_mm()
    write_points(tmp_path / "p.csv", (affine[:, :3] @ [4, 4, 6] + affine[:, 3])[None])
    command = ["warp", "--field", str(tmp_path / "u.nrrd"), "-o", str(tmp_path / "q.csv"), "--points"]
    assert main([*command, str(tmp_path / "p.csv")]) == 3
    assert "where the field is not known" in capsys.readouterr().err
    (tmp_path / "p.pts").write_text("index\n1\n4 4 9\n")
    assert main([*command, str(tmp_path / "p.pts")]) == 2 and "--fixed" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "p.pts"), "--fixed", str(scans / "inhale.nii.gz")]) == 0
    np.testing.assert_allclose(read_points(tmp_path / "q.csv")[0], affine[:, :3] @ [4, 4, 9] + affine[:, 3], atol=1e-3)


def test_what_cannot_be_registered_is_said(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "u.nrrd"
    mask = read_labels(scans / "exhale_lung.nii.gz")
    empty, elsewhere = tmp_path / "empty.nii.gz", tmp_path / "elsewhere.nii.gz"
    write_labels(empty, LabelMap(labels=np.zeros_like(mask.labels), geometry=mask.geometry))
    far = Geometry(
        shape=mask.geometry.shape, spacing_mm=(8.0, 8.0, 8.0), origin_mm=(9e3, 0.0, 0.0), direction=np.eye(3)
    )
    write_labels(elsewhere, LabelMap(labels=mask.labels, geometry=far))
    output.touch()
    for change, code, said in (
        ({10: str(tmp_path / "u.txt")}, 2, "expected a name that ends with .nrrd"),
        ({10: str(tmp_path / "no" / "u.mha")}, 2, "name a file in a folder that exists"),
        ({}, 2, "exists; name another file or give --overwrite"),
        ({6: str(empty), 11: "--overwrite"}, 3, "--fixed-mask is empty"),
        ({6: str(elsewhere), 11: "--overwrite"}, 3, "lie within --fixed; is it of another scan?"),
        ({2: str(tmp_path / "none.mha"), 11: "--overwrite"}, 3, "no such file"),
        ({11: "--preset=defualt", 12: "--overwrite"}, 2, "did you mean 'default'"),
        ({11: f"--inverse={output}", 12: "--overwrite"}, 2, "two outputs have the same name"),
        ({11: "--fixed-landmarks=a.csv", 12: "--overwrite"}, 2, "belong together"),
        ({11: "--encoder=a", 12: "--model=b", 13: "--overwrite"}, 2, "exclude each other"),
        ({11: "--model=nowhere", 12: "--overwrite"}, 2, "is not a model folder"),
    ):
        arguments = command(scans, output, *(word for at, word in change.items() if at > 10))
        for at, word in change.items():
            if at <= 10:
                arguments[at] = word
        assert main(arguments) == code, said
        assert said in capsys.readouterr().err


def test_what_cannot_be_warped_is_said(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    field = tmp_path / "u.nrrd"
    geometry = Geometry(shape=(3, 4, 5), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    write_field(field, np.zeros((3, 3, 4, 5), np.float32), geometry)
    warp = ["warp", "--field", str(field), "-o", str(tmp_path / "out.csv")]
    assert main(warp) == 2
    assert "give one of --image, --labels and --points" in capsys.readouterr().err
    (tmp_path / "points.txt").write_text("1 1 1\n9 9 9\n")
    assert main([*warp, "--points", str(tmp_path / "points.txt")]) == 3
    assert "point 2 of 2 lies beyond the field" in capsys.readouterr().err
