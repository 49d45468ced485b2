"""The pilot of the comparison: does the pair pay? Plans `phases` at three shares of common texture, `methods`, and
`recipes` (exploratory: the same contrast under two recipes, on phantoms that no other plan has), and `labels` (lobes
from 1, 2 and 5 labelled patients).

Run: uv run python benchmarks/pilot.py --out DIR [--parts phases-rho1,methods] [--shard 1/2] [--encoders] [--fresh]
     [--quick]
     uv run python benchmarks/pilot.py --out DIR --report

Phantoms in which exhale and inhale have all (rho 1), half or nothing of their fine texture in common, and others that
move by another model for the shift test. Each part is `lungssl compare` with the overrides below, in DIR/<part>:
killed, it goes on where it was; with `--shard i/n` several processes share it; `--encoders` leaves labels for later.
`--report` adds what DIR holds so far to results/pilot/<part>.json, to 5 digits, and writes the tables and curves of
docs/pilot from these files; a run without it begins with what they hold, with `--fresh` from nothing. The last line
is one JSON object.
`--quick`: one seed, 12 phantoms of 6 mm, runs of 4 steps; keep it out of a DIR that is reported.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lungssl.cohort import builtin_cohort
from lungssl.comparison.cost import Cost
from lungssl.comparison.findings import contrasts, sentences
from lungssl.comparison.plan import Plan, finetune_runs, load_plan, pretrain_runs
from lungssl.comparison.runs import Outcome, carry_out, wanted_ids
from lungssl.reports.comparison_report import write_report
from lungssl_data.cache import PairCache

HERE = Path(__file__).parent
PHASES = {rho: [f"phantoms.texture_rho={rho}", f"shift.texture_rho={rho}"] for rho in ("1", "0.5", "0")}
NO_LABELS = "labels=null"
"""Fine-tuning, the dearest part, is done at rho 1; linear probes everywhere."""
ENCODERS = "primary=[registration_mm,probe_dice]"
PARTS: dict[str, tuple[str, list[str]]] = {
    "phases-rho1": ("phases", [*PHASES["1"]]),
    "phases-rho0.5": ("phases", [*PHASES["0.5"], NO_LABELS, ENCODERS]),
    "phases-rho0": ("phases", [*PHASES["0"], NO_LABELS, ENCODERS]),
    "methods": ("methods", [*PHASES["0.5"], NO_LABELS]),
    "recipes": (str(HERE / "plans" / "recipes.yaml"), []),
    "labels": (str(HERE / "plans" / "labels.yaml"), []),
}
QUICK = ["seeds=[0]", "phantoms.patients=12", "phantoms.spacing_mm=6", "shift.patients=2", "shift.spacing_mm=6"]
DIGITS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--shard", default=None)
    parser.add_argument("--encoders", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    said = {}
    for name in names:
        plan, results = (
            plan_of(name, encoders=options.encoders, quick=options.quick),
            HERE / "results" / "pilot" / f"{name}.json",
        )
        if options.report:
            keep(plan, options.out / name, results)
            outcome = kept_outcome(plan, results, HERE.parent / "docs" / "pilot" / name)
        else:
            outcome = run(
                plan, options.out / name, None if options.quick or options.fresh else results, shard=options.shard
            )
        if options.report or not outcome.missing:
            print(f"{name}: {write_report(outcome)}", flush=True)
        said[name] = {"missing": len(outcome.missing), "verdicts": sentences(outcome, contrasts(outcome))}
    print(json.dumps(said))


def plan_of(name: str, *, encoders: bool, quick: bool) -> Plan:
    """The shipped plan with a part's overrides."""
    plan, overrides = PARTS[name]
    short = [*QUICK, "overrides=[train.steps=4,train.eval_every=4,train.checkpoint_every=4,data.patients=4]"]
    return load_plan(plan, [*overrides, *([NO_LABELS, ENCODERS] if encoders else []), *(short if quick else [])])


def run(plan: Plan, out: Path, results: Path | None, *, shard: str | None) -> Outcome:
    """Make what is missing of a part, beginning with what `results` holds."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    data = builtin_cohort(plan.phantoms, say=say)
    shift = None if plan.shift is None else builtin_cohort(plan.shift, say=say)
    shifted = None if shift is None else PairCache(shift).fingerprint()
    if results is not None and results.is_file():
        (out / "results").mkdir(parents=True, exist_ok=True)
        (out / "plan.yaml").touch()
        kept = {row["id"]: row for row in json.loads(results.read_text())["rows"]}
        for made in pretrain_runs(plan, PairCache(data).fingerprint(), shifted):
            family = {made.id, *(one.id for one in finetune_runs(plan, made))}
            if family <= set(kept):  # else its encoder, which isn't kept, is needed again
                for name in family:
                    (out / "results" / f"{name}.json").write_text(json.dumps(kept[name]))
    return carry_out(plan, data=data, out=out, shift=shift, shard=shard, say=say)


def keep(plan: Plan, folder: Path, path: Path) -> None:
    """Add a comparison's rows to a results file, and drop those that the plan doesn't ask for any more."""
    if not (folder / "costs.json").is_file():
        return
    rows = {row["id"]: row for row in (json.loads(path.read_text())["rows"] if path.is_file() else [])}
    for one in (folder / "results").glob("*.json"):
        rows[one.stem] = rounded(json.loads(one.read_text()))
    head = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("costs", "env", "floors")}
    wanted = set(wanted_ids(plan, head["env"]["data"], head["env"]["shift"]))
    head["env"]["cohort"] = plan.phantoms.name()
    # Of whoever made the last stretch, with a folder of that machine.
    head["env"]["command"] = ["uv", "run", "python", "benchmarks/pilot.py", "--out", "DIR", "--parts", folder.name]
    lines = ",\n".join(json.dumps(rows[name]) for name in sorted(wanted & set(rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]},\n"rows": [\n{lines}\n]}}\n')


def rounded(value: Any) -> Any:
    """With floats to DIGITS significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def kept_outcome(plan: Plan, results: Path, folder: Path) -> Outcome:
    """What a results file holds of a plan, to be reported in `folder`."""
    kept = json.loads(results.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "env.json").write_text(json.dumps(kept["env"], indent=1))
    wanted = wanted_ids(plan, kept["env"]["data"], kept["env"]["shift"])
    rows = {row["id"]: row for row in kept["rows"] if row["id"] in set(wanted)}
    return Outcome(
        folder=folder,
        plan=plan,
        costs={arm: Cost(**one) for arm, one in kept["costs"].items()},
        results=rows,
        missing=[name for name in wanted if name not in rows],
        floors=kept["floors"],
    )


if __name__ == "__main__":
    main()
