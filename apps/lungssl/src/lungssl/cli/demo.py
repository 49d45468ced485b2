"""`lungssl demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("lungssl-demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the demo in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of training.")] = 0,
) -> None:
    """Run the main job on built-in phantoms in under five minutes and write report.html.

    Example: lungssl demo --out lungssl-demo
    """
    import shutil
    import sys

    from lungssl.errors import ConfigError

    marker = out / "demo.txt"
    if out.exists() and any(out.iterdir()):
        if not marker.is_file():
            raise ConfigError(f"--out {out} is not empty and holds no demo; name another folder")
        if not overwrite:
            raise ConfigError(f"--out {out} holds a demo already; replace it with --overwrite or name another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text("Made by `lungssl demo`; safe to delete.\n", encoding="utf-8")

    from lungssl.demo import run_demo

    report = run_demo(out, say=lambda text: print(text, file=sys.stderr, flush=True), seed=seed)
    print(f"open {report}")
