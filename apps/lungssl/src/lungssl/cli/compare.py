"""`lungssl compare`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def compare(
    plan: Annotated[str, typer.Argument(help="A name of `lungssl list plans`, or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. seeds=[0,1,2] phantoms.texture_rho=1")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make, or to go on in. Needed unless --dry-run.")] = None,
    data: Annotated[Path | None, typer.Option(help="Pair cache; without it the plan's phantoms.")] = None,
    shift_data: Annotated[
        Path | None, typer.Option(help="Pair cache of the plan's shift test, e.g. another site's; all of it judges.")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="Make only part i of n of the runs, e.g. 2/4.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print arms, runs and costs; make no run.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    launcher: Annotated[
        Literal["here", "local", "slurm"],
        typer.Option(help="Where runs are made: in this process, or as --shards jobs in the background or on SLURM."),
    ] = "here",
    shards: Annotated[int, typer.Option(help="Jobs of --launcher local or slurm.")] = 1,
    job: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of submitit, e.g. slurm_partition=gpu."),
    ] = None,
) -> None:
    """Carry out every run of a comparison, and write the report.

    The same command goes on where it was interrupted, and repeats only what a changed plan touches. Shards may be made
    elsewhere: copy their runs/ and results/ into one folder, and give the command without --shard.

    Example: lungssl compare tiny --out comparisons/tiny

    Example: lungssl compare methods --out DIR --launcher slurm --shards 8 --job gpus_per_node=1 --job timeout_min=600
    """
    import sys

    from lungssl.comparison.plan import load_plan
    from lungssl.errors import ConfigError

    if out is None and not dry_run:
        raise ConfigError("--out is missing: name the folder to make, or look first with --dry-run")
    if launcher == "here" and (job or shards != 1):
        raise ConfigError("--shards and --job are of jobs: add --launcher local or slurm, or take --shard i/n here")
    if launcher != "here" and shard is not None:
        raise ConfigError(f"--shard {shard} is one part, and --launcher {launcher} starts all: leave one of them out")
    if shards < 1:
        raise ConfigError(f"--shards {shards}: expected 1 or more, as many as jobs may run at once")
    loaded = load_plan(plan, overrides or [])

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if data is None:
        from lungssl.cohort import builtin_cohort

        data = builtin_cohort(loaded.phantoms, say=say)
    if shift_data is None and loaded.shift is not None and not dry_run:
        from lungssl.cohort import builtin_cohort

        shift_data = builtin_cohort(loaded.shift, say=say)
    from lungssl.comparison import runs

    if dry_run or out is None:
        print(runs.describe(loaded, data, device=device))
        return
    if launcher != "here":
        from lungssl.comparison.plan import as_text
        from lungssl.submitting import job_parameters, submit

        runs.check_folder(out)
        print(runs.describe(loaded, data, device=device))
        jobs_folder = out.resolve() / "jobs"
        jobs_folder.mkdir(parents=True, exist_ok=True)
        given = jobs_folder / "plan.yaml"
        given.write_text(as_text(loaded.as_dict()), encoding="utf-8")
        (out / "plan.yaml").write_text(given.read_text(encoding="utf-8"), encoding="utf-8")
        arguments = ["compare", str(given), "--out", str(out.resolve()), "--data", str(data.resolve())]
        arguments += ["--device", device] + ([] if shift_data is None else ["--shift-data", str(shift_data.resolve())])
        parameters = job_parameters(job or [])
        commands = [[*arguments, "--shard", f"{i}/{shards}"] for i in range(1, shards + 1)]
        jobs = submit(commands, cluster=launcher, folder=jobs_folder, name="lungssl-compare", parameters=parameters)
        print(f"{len(jobs)} jobs: {', '.join(one.job_id for one in jobs)}; their output is in {jobs_folder}")
        print("when they are done, the same command without --launcher writes the report")
        return
    outcome = runs.carry_out(loaded, data=data, out=out, shift=shift_data, shard=shard, device=device, say=say)
    if outcome.missing and shard is not None:
        print(f"{len(outcome.missing)} runs of other shards are missing; copy runs/ and results/ here, or go on here")
        return
    from lungssl.comparison.findings import contrasts, power_note, sentences
    from lungssl.reports.comparison_report import write_report

    found = contrasts(outcome)
    report = write_report(outcome, found)
    for sentence in [*sentences(outcome, found), power_note(found)]:
        if sentence is not None:
            print(sentence)
    print(f"open {report}")
