"""One registration by another package, in its own process: `bench_registration.py` calls it, with the packages' Python.

    python registration_peers.py METHOD IN.npz OUT.npz

IN: fixed, moving float32 [z, y, x] in HU clipped to -1000 .. 100, moving already brought onto the fixed grid by the
affine that all methods start from; fixed_lung, moving_lung; spacing_mm of their cubes. OUT: v_mm [3, z, y, x],
components (x, y, z), seconds without imports and files, and the process's peak memory in MB.
Needs numpy and what METHOD uses, nothing of lungssl.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_memory_mb() -> float:
    """Of this process so far, by Linux: getrusage's figure holds what the parent had at the fork, through the exec."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def affine(case: dict[str, np.ndarray], spacing_mm: float) -> Callable[[], np.ndarray]:
    """Nothing after the affine."""
    return lambda: np.zeros((3, *case["fixed"].shape), np.float32)


def convexadam(case: dict[str, np.ndarray], spacing_mm: float) -> Callable[[], np.ndarray]:
    """The authors' lung setting: grid 4, reach 6, MIND r1 d2, 80 iterations, masks (`registration.md`, section 2)."""
    import nibabel
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(THREADS)
    shape = case["fixed"].shape
    padding = [(0, (-size) % 12) for size in shape]  # its masked branch needs even sizes; 12 for its grids
    fixed, moving = (np.pad(case[name], padding, mode="edge") for name in ("fixed", "moving"))
    folder = tempfile.mkdtemp()
    for name in ("fixed_lung", "moving_lung"):
        mask = np.pad(case[name], padding).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), f"{folder}/{name}.nii")

    def run() -> np.ndarray:
        found = convex_adam_pt(
            torch.from_numpy(fixed),
            torch.from_numpy(moving),
            mind_r=1,
            mind_d=2,
            grid_sp=4,
            disp_hw=6,
            selected_niter=80,
            use_mask=True,
            path_fixed_mask=f"{folder}/fixed_lung.nii",
            path_moving_mask=f"{folder}/moving_lung.nii",
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        z, y, x = shape
        return np.moveaxis(found[:z, :y, :x, ::-1], -1, 0) * spacing_mm  # its components follow the array's axes

    return run


def demons(case: dict[str, np.ndarray], spacing_mm: float) -> Callable[[], np.ndarray]:
    """SimpleITK's diffeomorphic demons on the masked lungs, three levels, smoothing of 1.5 voxels."""
    import SimpleITK as sitk

    fixed, moving = (_masked(case, role, spacing_mm) for role in ("fixed", "moving"))

    def run() -> np.ndarray:
        field = None
        for shrink, iterations in ((4, 100), (2, 60), (1, 30)):
            near, far = (
                sitk.Shrink(sitk.SmoothingRecursiveGaussian(i, [shrink * spacing_mm / 2] * 3), [shrink] * 3)
                for i in (fixed, moving)
            )
            demon = sitk.DiffeomorphicDemonsRegistrationFilter()
            demon.SetNumberOfIterations(iterations)
            demon.SetStandardDeviations(1.5)
            if field is None:
                field = demon.Execute(near, far)
            else:
                field = demon.Execute(
                    near, far, sitk.Resample(field, near, sitk.Transform(), sitk.sitkLinear, 0.0, field.GetPixelID())
                )
        assert field is not None
        return np.moveaxis(sitk.GetArrayFromImage(field), -1, 0)

    return run


def syn(case: dict[str, np.ndarray], spacing_mm: float) -> Callable[[], np.ndarray]:
    """ANTs' SyN: CC of radius 2, 200/100/40/5 iterations, flow 3, the lungs masked."""
    import ants  # pyright: ignore[reportMissingImports]
    import SimpleITK as sitk

    files = tempfile.mkdtemp()
    images = {}
    for role in ("fixed", "moving"):
        sitk.WriteImage(_masked(case, role, spacing_mm), f"{files}/{role}.nii.gz")
        images[role] = ants.image_read(f"{files}/{role}.nii.gz")

    def run() -> np.ndarray:
        found = ants.registration(
            fixed=images["fixed"],
            moving=images["moving"],
            type_of_transform="SyNOnly",
            initial_transform="Identity",
            syn_metric="CC",
            syn_sampling=2,
            reg_iterations=(200, 100, 40, 5),
            flow_sigma=3,
            outprefix=f"{files}/out",
        )
        warp = next(path for path in found["fwdtransforms"] if path.endswith("Warp.nii.gz"))
        return np.moveaxis(sitk.GetArrayFromImage(sitk.ReadImage(warp)), -1, 0)

    return run


def elastix(case: dict[str, np.ndarray], spacing_mm: float) -> Callable[[], np.ndarray]:
    """B-splines of 10 mm by Mattes' mutual information, three levels of 2000 steps with 5000 samples, the fixed mask
    dilated by 4 mm: the settings of the model zoo's set for DIR-Lab (Par0049), written out.
    """
    import itk  # pyright: ignore[reportMissingImports]
    from scipy import ndimage

    os.chdir(tempfile.mkdtemp())  # it leaves files where it is
    settings = {
        "Registration": "MultiResolutionRegistration",
        "Metric": "AdvancedMattesMutualInformation",
        "NumberOfHistogramBins": "32",
        "Optimizer": "AdaptiveStochasticGradientDescent",
        "Transform": "BSplineTransform",
        "HowToCombineTransforms": "Compose",
        "FinalGridSpacingInPhysicalUnits": "10",
        "NumberOfResolutions": "3",
        "FixedImagePyramid": "FixedSmoothingImagePyramid",
        "MovingImagePyramid": "MovingSmoothingImagePyramid",
        "MaximumNumberOfIterations": "2000",
        "ImageSampler": "RandomCoordinate",
        "NewSamplesEveryIteration": "true",
        "NumberOfSpatialSamples": "5000",
        "Interpolator": "BSplineInterpolator",
        "BSplineInterpolationOrder": "1",
        "ResampleInterpolator": "FinalBSplineInterpolator",
        "Resampler": "DefaultResampler",
        "FixedInternalImagePixelType": "float",
        "MovingInternalImagePixelType": "float",
        "ErodeMask": "false",
        "WriteResultImage": "false",
    }
    parameters = itk.ParameterObject.New()
    parameters.AddParameterMap({name: (value,) for name, value in settings.items()})
    images: dict[str, Any] = {}
    grown = ndimage.binary_dilation(case["fixed_lung"] > 0, iterations=max(1, round(4 / spacing_mm)))
    for name, values in (("fixed", case["fixed"]), ("moving", case["moving"]), ("mask", grown.astype(np.uint8))):
        images[name] = itk.image_from_array(np.ascontiguousarray(values))
        images[name].SetSpacing([spacing_mm] * 3)

    def run() -> np.ndarray:
        _, transform = itk.elastix_registration_method(
            images["fixed"],
            images["moving"],
            parameter_object=parameters,
            fixed_mask=images["mask"],
            number_of_threads=THREADS,
            log_to_console=False,
        )
        field = itk.transformix_deformation_field(images["moving"], transform)
        return np.moveaxis(itk.array_from_image(field), -1, 0)

    return run


METHODS = {"affine": affine, "convexadam": convexadam, "demons": demons, "syn": syn, "elastix": elastix}


def _masked(case: dict[str, np.ndarray], role: str, spacing_mm: float) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.where(case[f"{role}_lung"] > 0, case[role], 100.0).astype(np.float32))
    image.SetSpacing([spacing_mm] * 3)
    return image


if __name__ == "__main__":
    method, source, target = sys.argv[1:]
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(THREADS)
    target = os.path.abspath(target)
    with np.load(source) as held:
        arrays = {name: held[name] for name in held.files}
    prepared = METHODS[method](arrays, float(arrays["spacing_mm"]))
    started = time.perf_counter()
    v_mm = prepared()
    seconds, peak_mb = time.perf_counter() - started, most_memory_mb()
    np.savez(target, v_mm=np.asarray(v_mm, np.float32), seconds=seconds, peak_mb=peak_mb)
