"""`lungssl watch`."""

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run: Annotated[Path, typer.Argument(help="Run folder, of a run that goes on or has ended.")],
    once: Annotated[bool, typer.Option("--once", help="Print what there is, and end.")] = False,
    every_s: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between looks.")] = 2.0,
) -> None:
    """Show a run's curves in the terminal until it ends; Ctrl-C leaves it alone.

    Example: lungssl watch runs/a
    """
    import shutil
    import sys
    import time

    from lungssl.watching import ended, frame

    while True:
        lines = frame(run, width=shutil.get_terminal_size((80, 24)).columns)
        alone = once or not sys.stdout.isatty()
        # Home, each line to its end, then all below: no flicker, as clearing the screen first would give.
        text = "\n".join(lines) if alone else "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"
        print(text, end="\n" if alone else "", flush=True)
        if alone or ended(run):
            return
        time.sleep(every_s)
