"""`lungssl pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from lungssl.cli.job_options import Job, Launcher, ShowScript


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A name of `lungssl list recipes`, or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. train.steps=200 method.pairs=cross")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Pair cache; without it the built-in phantom cohort.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make. Needed unless --dry-run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build all, make two steps, print time and memory, write nothing.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(help="A step that gave no number (<run>/nan/*): repeat it, print where; writes nothing."),
    ] = None,
    profile: Annotated[
        int, typer.Option(min=0, help="Steps to run under torch's profiler: RUN/profile says where their time went.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    launcher: Launcher = "here",
    job: Job = None,
    show_script: ShowScript = False,
) -> None:
    """Pretrain an encoder without labels.

    A job that is preempted or out of time ends its step, writes a checkpoint, is queued again and goes on.

    Example: lungssl pretrain dino_vit_nano --out runs/a train.steps=200

    Example: lungssl pretrain dino_vit_s --data CACHE --out runs/a --launcher slurm --job tasks_per_node=4
    --job gpus_per_node=4 --job timeout_min=480
    """
    from lungssl.config import load_recipe
    from lungssl.errors import ConfigError
    from lungssl.submitting import check_launcher, hand_in

    if out is None and not dry_run and replay is None:
        raise ConfigError("--out is missing: name the run folder to make, or look first with --dry-run")
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one")
    run = out is not None and not dry_run and replay is None
    check_launcher(launcher, job=job, show_script=show_script, run=run)
    resolved = load_recipe(recipe, overrides or [])

    from lungssl import pretraining

    if data is None:
        import sys

        from lungssl.cohort import builtin_cohort
        from lungssl.training.ranks import launched

        if launched() > 1:
            raise ConfigError("--data is missing: make the built-in cohort with one process first, then name its cache")
        data = builtin_cohort(say=lambda line: print(line, file=sys.stderr))
    if launcher != "here" and out is not None:
        given = Path(recipe).resolve() if Path(recipe).is_file() else recipe
        command = ["pretrain", str(given), *(overrides or []), "--data", str(data.resolve())]
        command += ["--out", str(out.resolve()), "--device", device] + (["--profile", str(profile)] if profile else [])
        command += [f"--{name}" for name, wanted in (("resume", resume), ("overwrite", overwrite)) if wanted]
        print(hand_in(command, cluster=launcher, out=out, wishes=job or [], show_script=show_script))
        return
    if replay is not None:
        from lungssl import replaying

        print(replaying.replay(resolved, replay, data=data, device=device))
    elif dry_run:
        print(pretraining.dry_run(resolved, data=data, device=device))
    elif out is not None:
        from lungssl.training.ranks import restarted

        resume = resume or restarted()
        pretraining.pretrain(
            resolved, data=data, out=out, device=device, resume=resume, overwrite=overwrite, profile=profile
        )
