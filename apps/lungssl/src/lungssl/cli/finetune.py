"""`lungssl finetune`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from lungssl.cli.job_options import Job, Launcher, ShowScript


def finetune(
    task: Annotated[Literal["segment", "register", "joint", "cosegment"], typer.Argument(help="What for.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.steps=500 task.freeze_encoder=true")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="A pretraining run, an encoder.safetensors, or `none` for random weights.")
    ] = "none",
    data: Annotated[Path | None, typer.Option(help="Pair cache with labels; without it the phantoms.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make. Needed unless --dry-run.")] = None,
    diameters: Annotated[
        Path | None,
        typer.Option(
            help="To cosegment: CSV of lesions' diameters; without it they are measured on the cache's masks."
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or .yaml file; finetune/TASK by default.")] = None,
    labels: Annotated[
        int | None, typer.Option(min=1, help="Patients to learn from (to segment, joint: labelled); all without it.")
    ] = None,
    draw: Annotated[int, typer.Option(min=0, help="Which draw of so many patients.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build all, make two steps, print time and memory, write nothing.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    launcher: Launcher = "here",
    job: Job = None,
    show_script: ShowScript = False,
) -> None:
    """Fine-tune an encoder: for lobes on a few labelled patients, for registration on pairs without labels, or for both
    at once (joint) on pairs of which some are labelled, or for lesions of both phases from two diameters (cosegment).

    The model goes to RUN/export/model; use it with `lungssl segment --model RUN` or `lungssl register --model RUN`.

    Example: lungssl finetune segment --encoder runs/a --data cohort-cache --out runs/lobes --labels 5
    """
    from lungssl.config import load_recipe
    from lungssl.errors import ConfigError
    from lungssl.submitting import check_launcher, hand_in

    if out is None and not dry_run:
        raise ConfigError("--out is missing: name the run folder to make, or look first with --dry-run")
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one")
    if diameters is not None and task != "cosegment":
        raise ConfigError("--diameters belongs to task cosegment; leave it out")
    check_launcher(launcher, job=job, show_script=show_script, run=out is not None and not dry_run)
    loaded = load_recipe(recipe or f"finetune/{task}", overrides or [])

    from lungssl import finetuning, finetuning_cosegment, finetuning_joint, finetuning_registration
    from lungssl.training.ranks import check_alone

    check_alone("fine-tuning")
    if data is None:
        from lungssl.cohort import LESION_COHORT, builtin_cohort

        data = builtin_cohort(LESION_COHORT if task == "cosegment" else None)
    seen = finetuning.Labels(patients=labels, draw=draw)
    weights = None if encoder == "none" else finetuning.encoder_file(Path(encoder))
    if launcher != "here" and out is not None:
        options = {"--encoder": weights and weights.resolve(), "--data": data.resolve(), "--out": out.resolve()}
        options |= {"--diameters": diameters and diameters.resolve(), "--labels": labels, "--draw": draw}
        options |= {"--recipe": Path(recipe).resolve() if recipe and Path(recipe).is_file() else recipe}
        command = ["finetune", task, *(overrides or []), "--device", device]
        command += [word for name, value in options.items() if value is not None for word in (name, str(value))]
        command += [f"--{name}" for name, wanted in (("resume", resume), ("overwrite", overwrite)) if wanted]
        print(hand_in(command, cluster=launcher, out=out, wishes=job or [], show_script=show_script))
        return
    if task == "cosegment":
        prepared = partial(finetuning_cosegment.dry_run, diameters=diameters)
        run = partial(finetuning_cosegment.finetune_cosegment, diameters=diameters)
    else:
        prepared = (finetuning if task == "segment" else finetuning_registration).dry_run
        run = {
            "segment": finetuning.finetune_segment,
            "register": finetuning_registration.finetune_register,
            "joint": finetuning_joint.finetune_joint,
        }[task]
    if dry_run:
        print(prepared(loaded, data=data, encoder=weights, labels=seen, device=device))
    elif out is not None:
        run(loaded, data=data, out=out, encoder=weights, labels=seen, device=device, resume=resume, overwrite=overwrite)
