"""`lungssl segment`."""

import time
from pathlib import Path
from typing import Annotated

import typer


def segment(
    image: Annotated[Path, typer.Argument(help="A volume file (.nii, .nii.gz, .mha, .mhd, .nrrd) or a DICOM folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask to write, on the image's own grid.")],
    model: Annotated[
        Path | None, typer.Option(help="A fine-tuning run or its export/model; without it the lungs, no training.")
    ] = None,
    dicom_seg: Annotated[
        Path | None,
        typer.Option(help="Also write a DICOM-SEG (.dcm) beside a DICOM image; it names the patient, as DICOM must."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write volumes, model, versions and time as .json; names nobody.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Keep a model's islands of lobes and lungs.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Segment one scan: the air-filled lungs (1 right, 2 left), or the structures of a fine-tuned model.

    Example: lungssl segment ct.nii.gz -o lobes.nii.gz --model runs/lobes

    Example: lungssl segment dicom_folder -o lungs.nii.gz --dicom-seg lungs.dcm --report lungs.json
    """
    from lungssl.errors import ConfigError

    for option, path in (("-o", output), ("--dicom-seg", dicom_seg), ("--report", report)):
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: name a file in a folder that exists")
        if path.exists() and not overwrite:
            raise ConfigError(f"{option} {path} exists; name another file or give --overwrite")
        if path.resolve() == image.resolve() or path.resolve().parent == image.resolve():
            raise ConfigError(f"{option} {path} would be in the image's place; name a file elsewhere")

    from lungssl_data.readers import read_volume, write_labels

    from lungssl import segmenting
    from lungssl.dicom_seg import check_dicom_seg, write_dicom_seg

    if dicom_seg is not None:
        check_dicom_seg(image, dicom_seg)
    started = time.perf_counter()
    volume = read_volume(image)
    if model is None:
        result = segmenting.segment_lungs(volume)
    else:
        from lungssl.training.precision import pick_device

        result = segmenting.segment_with_model(volume, model, device=str(pick_device(device)), raw=raw)
    write_labels(output, result.mask)
    if dicom_seg is not None:
        write_dicom_seg(result, image, dicom_seg)
        print(f"{dicom_seg}: DICOM-SEG; it repeats the patient's and the study's identity from the source")
    if report is not None:
        segmenting.write_report(result, report, seconds=time.perf_counter() - started)
    print(segmenting.describe(result))
