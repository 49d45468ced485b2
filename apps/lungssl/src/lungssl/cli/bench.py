"""`lungssl bench ops`."""

from pathlib import Path
from typing import Annotated

import typer

from lungssl.cli import new_app

app = new_app(help="Time lungssl on this machine, beside its rivals.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group though it has one verb: Typer would make it the command itself."""


@app.command()
def ops(
    out: Annotated[Path, typer.Option(help="JSON file for the full table.")] = Path("ops.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, 5 repeats, about a minute.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    only: Annotated[str, typer.Option(help="Ops whose folder's name holds this text, e.g. lncc.")] = "",
    compile_rivals: Annotated[bool, typer.Option("--compile", help="Add torch.compile of the rivals.")] = False,
) -> None:
    """Time the fused ops, forward and backward: median and spread, peak memory, error, share of the floor.

    Rivals are the definitions, eager forms, and other packages where they are installed. The last line is one JSON
    object, in which a ratio above 1 means that ours is better. OMP_NUM_THREADS sets the threads.

    Example: OMP_NUM_THREADS=1 lungssl bench ops --quick --only lncc --out ops.json
    """
    from lungssl_ops.bench import OPS, main

    from lungssl.errors import ConfigError
    from lungssl.training.precision import pick_device

    if not any(only in op for op in OPS):
        raise ConfigError(f"--only {only}: no op's name holds this text; the ops are {', '.join(OPS)}")
    arguments = ["--device", str(pick_device(device)), "--only", only, "--out", str(out)]
    main(arguments + ["--quick"] * quick + ["--compile"] * compile_rivals)
