"""`lungssl register`."""

from pathlib import Path
from typing import Annotated

import typer


def register(
    fixed: Annotated[Path, typer.Option(help="Exhale: a volume file (.nii.gz, .mha, .nrrd, ...) or a DICOM folder.")],
    moving: Annotated[Path, typer.Option(help="Inhale, likewise.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Displacement field to write: .nrrd, .mha, .nii.gz or .h5.")
    ],
    fixed_mask: Annotated[Path | None, typer.Option(help="Lungs of --fixed; without it they are found.")] = None,
    moving_mask: Annotated[Path | None, typer.Option(help="Lungs of --moving.")] = None,
    preset: Annotated[str, typer.Option(help="coarse, fast, default or accurate.")] = "default",
    encoder: Annotated[
        Path | None, typer.Option(help="A pretraining run or an encoder.safetensors, to search by its features, too.")
    ] = None,
    encoder_share: Annotated[
        float | None,
        typer.Option(help="Of the search's cost, what --encoder has: 0.5 beside MIND-SSC (default), 1 alone."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A run of `finetune register`: its network instead of the search.")
    ] = None,
    fixed_landmarks: Annotated[
        Path | None, typer.Option(help="Points of --fixed (.csv, .txt, .pts, LPS mm) to judge by; with the next one.")
    ] = None,
    moving_landmarks: Annotated[Path | None, typer.Option(help="Where they are in --moving, row by row.")] = None,
    diffeomorphic: Annotated[
        bool, typer.Option("--diffeomorphic", help="A smooth map both ways by construction; takes three times as long.")
    ] = False,
    field_mm: Annotated[
        float | None, typer.Option(help="Voxels of the field, about; without it those of --fixed.")
    ] = None,
    inverse: Annotated[Path | None, typer.Option(help="Also write the field from moving to fixed.")] = None,
    warped: Annotated[Path | None, typer.Option(help="Also write --moving on the grid of --fixed.")] = None,
    jacobian: Annotated[
        Path | None,
        typer.Option(
            help="Also write the change of volume, on the cubes registered: 2 where it doubles, 0 beyond the lung."
        ),
    ] = None,
    lobes: Annotated[
        Path | None, typer.Option(help="Also write the lobes of --fixed, where --model is one of `finetune joint`.")
    ] = None,
    summary: Annotated[Path | None, typer.Option(help="Also write figures and doubts as .json.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also write a .png to look at.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an .html page: picture, figures, doubts.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Register inhale to exhale: where each point of the exhale lung is in the inhale scan.

    The field u is in LPS mm: a point p of --fixed lies at p + u(p) in --moving, as ITK, Slicer and elastix read it. It
    says nothing of what is not lung.

    Example: lungssl register --fixed exhale.nii.gz --moving inhale.nii.gz -o field.nrrd --warped warped.nii.gz
    """
    from lungssl_data import field as fields
    from lungssl_data import readers
    from lungssl_tasks.model_folder import JOINT_FORMAT, model_format

    from lungssl.errors import ConfigError
    from lungssl.segmenting import model_folder

    endings = {
        "-o": (output, fields.WRITABLE),
        "--inverse": (inverse, fields.WRITABLE),
        "--warped": (warped, readers.WRITABLE),
        "--jacobian": (jacobian, readers.WRITABLE),
        "--lobes": (lobes, readers.WRITABLE),
        "--summary": (summary, (".json",)),
        "--picture": (picture, (".png",)),
        "--report": (report, (".html",)),
    }
    given = [path.resolve() for path, _ in endings.values() if path is not None]
    if len(set(given)) < len(given):
        raise ConfigError("two outputs have the same name; name different files")
    for path in (fixed, moving, fixed_mask, moving_mask, fixed_landmarks, moving_landmarks):
        if path is not None and path.resolve() in given:
            raise ConfigError(f"{path} is an input and would be written over; name another output")
    for name, (path, suffixes) in endings.items():
        if path is None:
            continue
        if not path.name.endswith(suffixes):
            raise ConfigError(f"{name} {path}: expected a name that ends with {', '.join(suffixes)}")
        if path.exists() and not overwrite:
            raise ConfigError(f"{name} {path} exists; name another file or give --overwrite")
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"{name} {path}: name a file in a folder that exists")
    if (fixed_landmarks is None) != (moving_landmarks is None):
        raise ConfigError("--fixed-landmarks and --moving-landmarks belong together; give both or neither")
    if field_mm is not None and not 0 < field_mm < float("inf"):
        raise ConfigError(f"--field-mm {field_mm}: expected a size in mm above 0")
    if encoder is None and encoder_share is not None:
        raise ConfigError("--encoder-share needs --encoder: without one MIND-SSC has all of the search's cost")

    if lobes is not None and (model is None or model_format(model_folder(model)) != JOINT_FORMAT):
        raise ConfigError("--lobes needs --model RUN of `finetune joint`; lobes of one scan: lungssl segment")

    from lungssl import registering

    found = registering.register_files(
        fixed,
        moving,
        fixed_mask=fixed_mask,
        moving_mask=moving_mask,
        preset=preset,
        encoder=encoder,
        encoder_share=registering.ENCODER_SHARE if encoder_share is None else encoder_share,
        model=model,
        diffeomorphic=diffeomorphic,
        landmarks=None if fixed_landmarks is None or moving_landmarks is None else (fixed_landmarks, moving_landmarks),
        lobes=lobes is not None,
        device=device,
        say=print,
    )
    written = found.field(field_mm)
    fields.write_field(output, *written)
    if inverse is not None:
        fields.write_field(inverse, *found.inverse(field_mm))
    if warped is not None:
        whole = written if field_mm is None else found.field()
        readers.write_volume(warped, registering.warp_volume(found.moving, *whole))
    if jacobian is not None:
        readers.write_floats(jacobian, *found.jacobian())
    if lobes is not None:
        assert found.lobes is not None
        readers.write_labels(lobes, found.lobes)
    if summary is not None:
        registering.write_summary(found, summary)
    if picture is not None:
        from lungssl.reports.registration_figure import write_picture

        write_picture(found, picture)
    if report is not None:
        from lungssl.reports.registration_report import write_report

        write_report(found, report)
    print(found.describe())
