"""`lungssl compare`."""

from pathlib import Path
from typing import Annotated

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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print arms, runs and costs; write nothing.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Carry out every run of a comparison, and write the report.

    The same command goes on where it was interrupted, and repeats only what a changed plan touches. Shards may be made
    elsewhere: copy their runs/ and results/ into one folder, and give the command without --shard.

    Example: lungssl compare tiny --out comparisons/tiny
    """
    import sys

    from lungssl.comparison.plan import load_plan
    from lungssl.errors import ConfigError

    if out is None and not dry_run:
        raise ConfigError("--out is missing: name the folder to make, or look first with --dry-run")
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
    outcome = runs.carry_out(loaded, data=data, out=out, shift=shift_data, shard=shard, device=device, say=say)
    if outcome.missing and shard is not None:
        print(f"{len(outcome.missing)} runs of other shards are missing; copy their results/ here, or go on here")
        return
    from lungssl.comparison.findings import contrasts, power_note, sentences
    from lungssl.reports.comparison_report import write_report

    report = write_report(outcome)
    found = contrasts(outcome)
    for sentence in [*sentences(outcome, found), power_note(found)]:
        if sentence is not None:
            print(sentence)
    print(f"open {report}")
