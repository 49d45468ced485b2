"""The benchmark's results as markdown: the table, and the block of a README that is generated from a results file."""

from pathlib import Path
from typing import Any

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
"""The block lies between these lines; `python -m lungssl_ops.bench --readme README.md --from FILE.json` rewrites it."""


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = [
        "| op | size | run | median [p25, p75] ms | min ms | peak MB | floor ms | share of floor | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "{median_ms:.2f} [{p25_ms:.2f}, {p75_ms:.2f}]".format_map(row)
        cells = "{min_ms:.2f} | {peak_mb:.1f} | {floor_ms:.2f} | {floor_share:.2f} | {error:.0e}".format_map(row)
        lines.append(f"| {row['op']} | {row['size']} | {row['run']} | {spread} | {cells} |")
    return "\n".join(lines)


def readme_block(result: dict[str, Any]) -> str:
    """What a results file says, between START and END: how it was measured, the table, and the checks that failed."""
    machine = result["machine"]
    failed = [name for name, passed in result["checks"].items() if not passed]
    about = (
        f"`{result['command']}` on {machine['device']}, threads: {machine['threads']}, torch {machine['torch']}, "
        f"commit {result['commit']}, memory at {machine['gb_per_s']} GB/s."
    )
    checks = f"Checks that failed: {', '.join(failed)}." if failed else f"All {len(result['checks'])} checks passed."
    return "\n".join([START, about, checks, "", markdown_table(result["rows"]), END])


def write_block(readme: Path, result: dict[str, Any]) -> None:
    """Rewrite the block of a README.

    Raises ValueError where the README has no block, or more than one.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"{readme} needs one line {START} and, below it, one line {END}, between which the table goes")
    before, after = text.split(START)[0], text.split(END)[1]
    readme.write_text(before + readme_block(result) + after, encoding="utf-8")
