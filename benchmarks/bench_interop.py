"""The same 100 landmarks moved by us, SimpleITK, ANTs and transformix through fields that `lungssl register` wrote.

Run: uv run python benchmarks/bench_interop.py [--peer-python PYTHON] [--quick]

A phantom of 4 mm (`--quick`: 8 mm) on an oblique grid, with an odd origin, is registered by the command; its field is
written as .nrrd, .mha, .nii.gz and .h5, points go in as .csv, .txt and .pts. Each program reads each format that it
can, and moves the points; the figure is the largest distance in mm from where `lungssl warp` puts them. SimpleITK is
ours; ANTs (antspyx) and transformix (itk-elastix, its DeformationFieldTransform) are looked for in `--peer-python`.
Results go to `results/interop.json` unless `--quick`. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
LIMITS_MM = {"simpleitk": 0.01, "ants": 0.01, "transformix": 0.1}
"""What the registration issue asks for."""
POINTS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--moved-by", nargs=3, metavar=("PROGRAM", "FIELD", "POINTS.npy"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.moved_by:
        program, field, points = options.moved_by
        found = PROGRAMS[program](field, np.load(points))
        np.save(Path(points).with_name("moved.npy"), found)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder), options.peer_python, quick=options.quick)
    if not options.quick:
        lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
        (HERE / "results" / "interop.json").write_text(f"{{{lines}}}\n")
    print(json.dumps(result))


def measured(folder: Path, python: str, *, quick: bool) -> dict[str, Any]:
    """Largest distances, by program and format."""
    from lungssl_data.points import read_points, write_points
    from lungssl_ops.measure import commit, machine

    lung_mm = registered(folder, 8.0 if quick else 4.0)
    points = lung_mm[np.random.default_rng(0).permutation(len(lung_mm))[:POINTS]]
    ours = {}
    for suffix in (".csv", ".txt", ".pts"):
        write_points(folder / f"points{suffix}", points)
        lungssl(
            "warp", "--field", folder / "u.mha", "--points", folder / f"points{suffix}", "-o", folder / f"m{suffix}"
        )
        ours[suffix] = read_points(folder / f"m{suffix}")
    mm = {"lungssl": {name: apart(moved, ours[".csv"]) for name, moved in ours.items()}}
    missing = {}
    np.save(folder / "points.npy", points)
    for program in PROGRAMS:
        interpreter = sys.executable if program == "simpleitk" else python
        for suffix in FORMATS[program]:
            command = [interpreter, __file__, "--moved-by", program, f"u{suffix}", "points.npy"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                missing[f"{program} {suffix}"] = (done.stderr.strip().splitlines() or ["no message"])[-1]
                continue
            mm.setdefault(program, {})[suffix] = apart(np.load(folder / "moved.npy"), ours[".csv"])
    checks = {
        f"{program}_within_{limit:g}_mm": all(value <= limit for value in mm[program].values())
        for program, limit in LIMITS_MM.items()
        if program in mm
    }
    moved_mm = round(float(np.linalg.norm(ours[".csv"] - points, axis=1).mean()), 2)
    return {
        "benchmark": "interop",
        "points": len(points),
        "moved_mm": moved_mm,
        "largest_mm": mm,
        "missing": missing,
        "checks": checks,
        "commit": commit(),
        "machine": machine("cpu"),
    }


def registered(folder: Path, spacing_mm: float) -> np.ndarray:
    """Fields u.* of a phantom on an oblique grid, by the command; returns points of its lung, LPS mm."""
    from lungssl_data.phantom import PhantomConfig, make_phantom
    from lungssl_data.readers import write_labels, write_volume
    from lungssl_data.volume import Geometry, LabelMap, Volume

    phantom = make_phantom(PhantomConfig(preset="deep", seed=9004, spacing_mm=spacing_mm, texture_rho=0.5))
    c, s = np.cos(0.2), np.sin(0.2)
    turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    points = np.empty((0, 3))
    for name, phase in (("exhale", phantom.exhale), ("inhale", phantom.inhale)):
        old = phase.ct.geometry
        grid = Geometry(
            shape=old.shape,
            spacing_mm=old.spacing_mm,
            origin_mm=tuple(turned @ old.origin_mm + [17.3, -41.9, 803.1]),
            direction=turned @ old.direction,
        )
        write_volume(folder / f"{name}.nrrd", Volume(hu=phase.ct.hu, geometry=grid))
        write_labels(folder / f"{name}_lung.nrrd", LabelMap(labels=phase.lung, geometry=grid))
        if name == "exhale":
            affine = grid.index_to_mm()
            points = np.argwhere(phase.lung > 0)[:, ::-1] @ affine[:, :3].T + affine[:, 3]
    images = [word for role, name in (("fixed", "exhale"), ("moving", "inhale")) for word in (
        f"--{role}", folder / f"{name}.nrrd", f"--{role}-mask", folder / f"{name}_lung.nrrd"
    )]  # fmt: skip
    lungssl("register", *images, "-o", folder / "u.mha")
    from lungssl_data.field import read_field, write_field

    u_mm, grid = read_field(folder / "u.mha", oblique=True)
    for suffix in (".nrrd", ".nii.gz", ".h5"):
        write_field(folder / f"u{suffix}", u_mm, grid)
    return points


def lungssl(*words: object) -> None:
    """The command, as a user calls it."""
    from lungssl.cli import main as command

    with contextlib.redirect_stdout(sys.stderr):
        code = command([str(word) for word in words])
    assert code == 0, f"lungssl {words[0]} ended with {code}"


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return round(float(np.linalg.norm(a - b, axis=1).max()), 6)


def by_simpleitk(field: str, points: np.ndarray) -> np.ndarray:
    import SimpleITK as sitk

    if field.endswith(".h5"):
        transform = sitk.ReadTransform(field)
    else:
        transform = sitk.DisplacementFieldTransform(sitk.ReadImage(field, sitk.sitkVectorFloat64))
    return np.array([transform.TransformPoint(point) for point in points.tolist()])


def by_ants(field: str, points: np.ndarray) -> np.ndarray:
    import ants  # pyright: ignore[reportMissingImports]

    if field.endswith(".h5"):
        transform = ants.read_transform(field)
    else:
        transform = ants.transform_from_displacement_field(ants.image_read(field))
    return np.array([ants.apply_ants_transform_to_point(transform, point) for point in points.tolist()])


def by_transformix(field: str, points: np.ndarray) -> np.ndarray:
    """From outputpoints.txt, printed with six digits, of points in LPS mm."""
    import itk  # pyright: ignore[reportMissingImports]

    image = itk.imread(field)
    size, spacing, origin = image.GetLargestPossibleRegion().GetSize(), image.GetSpacing(), image.GetOrigin()
    direction = itk.array_from_matrix(image.GetDirection())
    parameters = itk.ParameterObject.New()
    parameters.AddParameterMap(
        {
            "Transform": ["DeformationFieldTransform"],
            "DeformationFieldFileName": [os.path.abspath(field)],
            "DeformationFieldInterpolationOrder": ["1"],
            "NumberOfParameters": ["0"],
            "InitialTransformParametersFileName": ["NoInitialTransform"],
            "HowToCombineTransforms": ["Compose"],
            "FixedImageDimension": ["3"],
            "MovingImageDimension": ["3"],
            "FixedInternalImagePixelType": ["float"],
            "MovingInternalImagePixelType": ["float"],
            "Size": [str(int(n)) for n in size],
            "Index": ["0", "0", "0"],
            "Spacing": [repr(float(mm)) for mm in spacing],
            "Origin": [repr(float(mm)) for mm in origin],
            "Direction": [repr(float(v)) for v in direction.T.ravel()],
            "UseDirectionCosines": ["true"],
        }
    )
    lines = ["point", str(len(points)), *(" ".join(f"{v:.9f}" for v in point) for point in points)]
    Path("in.pts").write_text("\n".join(lines) + "\n")
    shape = [int(n) for n in reversed(list(size))]
    moving = itk.image_from_array(np.zeros(shape, np.float32))
    moving.CopyInformation(image)
    out = Path("tx")
    out.mkdir(exist_ok=True)
    itk.transformix_filter(
        moving, parameters, fixed_point_set_file_name="in.pts", output_directory=str(out), log_to_console=False
    )
    text = (out / "outputpoints.txt").read_text().splitlines()
    return np.array([[float(v) for v in line.split("OutputPoint = [")[1].split("]")[0].split()] for line in text])


PROGRAMS: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
    "simpleitk": by_simpleitk,
    "ants": by_ants,
    "transformix": by_transformix,
}
FORMATS = {
    "simpleitk": (".nrrd", ".mha", ".nii.gz", ".h5"),
    "ants": (".nrrd", ".mha", ".nii.gz", ".h5"),
    "transformix": (".nrrd", ".mha"),
}


if __name__ == "__main__":
    main()
