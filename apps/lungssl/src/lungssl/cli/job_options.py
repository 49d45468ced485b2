"""Options of commands whose work can be handed in as a job."""

from typing import Annotated, Literal

import typer

Launcher = Annotated[
    Literal["here", "local", "slurm"],
    typer.Option(help="Where to train: in this process, as a job in the background, or on SLURM."),
]
Job = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Of submitit, e.g. slurm_partition=gpu; timeout_min is a day."),
]
ShowScript = Annotated[bool, typer.Option("--print", help="Print SLURM's script with the command that submitit wraps.")]
