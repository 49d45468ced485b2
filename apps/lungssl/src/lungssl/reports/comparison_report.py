"""The page of a comparison, as HTML and as Markdown, and its figures per patient as CSV."""

import csv
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from jinja2 import Environment
from matplotlib.figure import Figure
from numpy import ndarray

from lungssl.comparison.findings import (
    Contrast,
    arm_figures,
    contrasts,
    power_note,
    regimes,
    sentences,
    shown_endpoints,
    shown_interval,
    shown_p,
)
from lungssl.comparison.plan import AFFINE, ENDPOINTS, Regime, as_text
from lungssl.comparison.runs import Outcome, array_of
from lungssl.reports.figures import png

CAVEAT = (
    "Intervals and tests are over patients, for the encoders and draws of labels at hand; how much another seed gives "
    "is shown apart (SD over seeds; p, seeds too: patients and seeds both as samples). Contrasts of primary endpoints "
    "are adjusted together (Holm); all others are exploratory, each shown by its own p below 0.05. Equivalence isn't "
    "adjusted."
)


def write_report(outcome: Outcome, found: Sequence[Contrast] | None = None) -> Path:
    """`report.html`, `report.md` and `patients.csv` in the comparison's folder; returns the first.

    `found`: the outcome's `contrasts`, where they have been made already.
    """
    found = contrasts(outcome) if found is None else found
    environment = json.loads((outcome.folder / "env.json").read_text(encoding="utf-8"))
    page = {
        "title": outcome.plan.title,
        "caveat": " ".join(filter(None, [CAVEAT, power_note(found)])),
        "sentences": sentences(outcome, found),
        "about": about(outcome, environment),
        "arms": arm_rows(outcome, primary=True),
        "all_arms": arm_rows(outcome, primary=False),
        "costs": cost_rows(outcome),
        "contrasts": contrast_rows([one for one in found if one.primary]),
        "exploratory": contrast_rows([one for one in found if not one.primary]),
        "failures": failure_rows(outcome),
        "leakage": leakage_rows(outcome),
        "missing": outcome.missing,
        "plan": as_text(outcome.plan.as_dict()),
        "command": shlex.join(environment["command"]),
        "environment": environment,
        "equalise": outcome.plan.equalise,
        "commits": sorted({str(row["commit"]) for row in outcome.results.values()}),
    }
    templates = files("lungssl") / "reports" / "templates"
    markdown = Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True)
    text = markdown.from_string((templates / "comparison.md").read_text(encoding="utf-8")).render(_for_markdown(page))
    (outcome.folder / "report.md").write_text(text, encoding="utf-8")
    figures = {"forest": png(forest_figure([one for one in found if one.primary]))}
    if exploratory := [one for one in found if not one.primary]:
        figures["exploratory"] = png(forest_figure(exploratory))
    if outcome.plan.labels is not None:
        figures["labels"] = png(label_figure(outcome))
    html = Environment(autoescape=True).from_string((templates / "comparison.html").read_text(encoding="utf-8"))
    path = outcome.folder / "report.html"
    path.write_text(html.render(page | {"figures": figures}), encoding="utf-8")
    _write_patients(outcome)
    return path


def about(outcome: Outcome, environment: Mapping[str, Any]) -> str | None:
    """The phantoms that a plan was carried out on; None for other data, or where that wasn't noted."""
    plan = outcome.plan
    if environment.get("cohort") != plan.phantoms.name():
        return None
    sets = [("Phantoms", plan.phantoms)] + ([("for the shift test", plan.shift)] if plan.shift is not None else [])
    said = [
        f"{what}: {one.patients}, voxels of {one.spacing_mm:g} mm, phases with {one.texture_rho:.0%} of their fine "
        f"texture in common, motion {one.motion}"
        for what, one in sets
    ]
    return f"{'; '.join(said)}."


def arm_rows(outcome: Outcome, *, primary: bool) -> list[dict[str, str]]:
    """A row per arm, and one of the coarse affine alone: each endpoint's mean, or the primary ones', with its standard
    deviations over patients and over seeds.
    """
    rows = []
    isolates = {name: arm.isolates for name, arm in outcome.plan.arms.items()}
    if outcome.floors:
        isolates[AFFINE] = "the coarse affine alone, no encoder"
    declared = {entry.partition("@")[0] for entry in outcome.plan.primary}
    for name, why in isolates.items():
        row = {"arm": name, "isolates": why}
        for endpoint in shown_endpoints(outcome.plan):
            if primary and endpoint not in declared:
                continue
            about = ENDPOINTS[endpoint]
            for regime in regimes(outcome.plan, endpoint):
                found = arm_figures(outcome, name, endpoint, regime)
                head = f"{about.title}{f', {about.unit}' if about.unit else ''}"
                row[head + (f", {regime}" if regime is not None else "")] = (
                    "–" if found is None else _spread(found, about.digits)
                )
        rows.append(row)
    return rows


def cost_rows(outcome: Outcome) -> list[dict[str, str]]:
    """A row per arm: what its pretraining saw and cost, with one seed, and how long it took with all."""
    rows = []
    for name, cost in outcome.costs.items():
        runs = [row for row in outcome.results.values() if row["arm"] == name]
        rows.append(
            {
                "arm": name,
                "patients": str(cost.patients),
                "scans": str(cost.scans),
                "steps": f"{cost.steps:,}",
                "samples": f"{cost.samples:,}",
                "voxels": f"{cost.voxels / 1e6:,.0f} M",
                "tokens": f"{cost.tokens / 1e3:,.0f} k",
                "TFLOP": f"{cost.flops / 1e12:,.2f}",
                "displacement": re.sub(r" \(\w+Config\(.*", "", cost.displacement) or "not used",
                "registration, min": f"{cost.registration_s / 60:.1f}",
                "runs": str(len(runs)),
                "minutes, all runs": f"{sum(row['seconds'] for row in runs) / 60:.1f}",
            }
        )
    return rows


def contrast_rows(found: Sequence[Contrast]) -> list[dict[str, str]]:
    """A row per contrast and endpoint."""
    rows = []
    for one in found:
        endpoint, value = ENDPOINTS[one.endpoint], one.difference
        row = {"contrast": f"{one.first} − {one.second}", "endpoint": one.endpoint_title()}
        row["family"] = "primary" if one.primary else "exploratory"
        if value is None:
            names = ("difference", "95 %", "p", "p, Holm", "p, seeds too", "effect", "SD, seeds")
            rows.append(row | dict.fromkeys(names, "–"))
        else:
            rows.append(
                row
                | {
                    "difference": f"{value.mean:+.{endpoint.digits}f}{f' {endpoint.unit}' if endpoint.unit else ''}",
                    "95 %": shown_interval(value, endpoint.digits),
                    "p": shown_p(value.p),
                    "p, Holm": "" if one.p_holm is None else shown_p(one.p_holm),
                    "p, seeds too": "–" if value.p_crossed is None else shown_p(value.p_crossed),
                    "effect": f"{value.effect:+.2f}",
                    "SD, seeds": "–" if value.seed_sd is None else f"{value.seed_sd:.{endpoint.digits}f}",
                }
            )
        verdict = one.verdict()
        rows[-1]["verdict"] = verdict + ", these seeds" * (
            verdict in ("better", "worse", "equivalent") and not one.over_seeds()
        )
    return rows


def failure_rows(outcome: Outcome) -> list[dict[str, str]]:
    """Runs that broke down or raised an alarm."""
    return [
        {"run": row["id"], "what": row["failed"] or "; ".join(row["alarms"])}
        for row in outcome.results.values()
        if row["failed"] or row.get("alarms")
    ]


def leakage_rows(outcome: Outcome) -> list[dict[str, str]]:
    """A row per encoder: figures of all test patients together, and what the run said of itself."""
    return [
        {
            "run": row["id"],
            "phase AUC": f"{row['scalars'].get('phase_auc', math.nan):.2f}",
            "paired retrieval": f"{row['scalars'].get('retrieval_top1', math.nan):.2f}",
            "RankMe": f"{row['scalars'].get('rankme', math.nan):.1f}",
            "verdict": row.get("verdict", ""),
        }
        for row in outcome.results.values()
        if row["scalars"]
    ]


def forest_figure(found: Sequence[Contrast]) -> Figure:
    """Standardised differences, turned so that better is to the right."""
    shown = [
        one
        for one in found
        if one.difference is not None
        and one.difference.patient_sd > 0
        and all(map(math.isfinite, one.difference.interval_95))
    ]
    figure = Figure(figsize=(8, 0.9 + 0.34 * max(1, len(shown))), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(shown):
        value = one.difference
        assert value is not None
        turn = (1 if ENDPOINTS[one.endpoint].higher_is_better else -1) / value.patient_sd
        low, high = sorted(turn * end for end in value.interval_95)
        colour = {"better": "#228833", "worse": "#ee6677", "equivalent": "#4477aa"}.get(one.verdict(), "#777777")
        axes.plot([low, high], [place, place], color=colour, linewidth=2 if one.primary else 1.2)
        axes.plot(turn * value.mean, place, "s" if one.primary else "o", color=colour, markersize=6)
    axes.axvline(0, color="#1c2530", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [one.name for one in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("difference in standard deviations over patients; right: the first arm is better", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def label_figure(outcome: Outcome) -> Figure:
    """Dice over labelled patients for each arm, with standard errors over patients; one panel a mode."""
    labels = outcome.plan.labels
    assert labels is not None
    figure = Figure(figsize=(4.6 * len(labels.modes), 3.2), layout="constrained")
    counts = sorted(labels.patients)
    for axes, mode in zip(figure.subplots(1, len(labels.modes), squeeze=False)[0], labels.modes, strict=True):
        for place, name in enumerate(outcome.plan.arms):
            points = []
            for n in counts:
                found = array_of(outcome, name, "dice", Regime(patients=n, mode=mode))
                if found is not None and len(found[0]) > 1:
                    of_patient = found[1].mean(axis=(1, 2))
                    points.append((n, of_patient.mean(), of_patient.std(ddof=1) / math.sqrt(len(of_patient))))
            if points:
                x, y, error = (np.array(column) for column in zip(*points, strict=True))
                area = f" ({area_under(x, y):.3f})" if len(x) == len(counts) > 1 else ""
                apart = x * 2 ** (0.04 * (place - len(outcome.plan.arms) / 2))  # so that error bars don't hide others
                axes.errorbar(apart, y, yerr=error, label=name + area, marker="o", markersize=4, capsize=2)
        axes.set_title("all weights trained" if mode == "full" else "encoder frozen", fontsize=9)
        axes.set_xlabel("labelled patients", fontsize=9)
        axes.set_ylabel("lobe Dice, test patients", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.spines[["top", "right"]].set_visible(False)
        title = "area under the curve" if len(counts) > 1 else None
        axes.legend(fontsize=7, frameon=False, title=title, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def area_under(labels: Float[ndarray, " n"], dice: Float[ndarray, " n"]) -> float:
    """Mean height of a label-efficiency curve over the logarithm of the number of labelled patients."""
    x = np.log2(labels)
    return float(np.trapezoid(dice, x) / (x[-1] - x[0]))


def _for_markdown(value: Any) -> Any:
    """Text, in lists and dicts too, that is no markup and stays in its cell of a table."""
    if isinstance(value, dict):
        return {_for_markdown(key): _for_markdown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_for_markdown(item) for item in value]
    return " ".join(value.split()).replace("<", "&lt;").replace("|", "\\|") if isinstance(value, str) else value


def _spread(found: tuple[float, float, float], digits: int) -> str:
    mean, patients, seeds = found
    of_seeds = "" if math.isnan(seeds) else f"; seeds {seeds:.{digits}f}"
    return f"{mean:.{digits}f} ({patients:.{digits}f}{of_seeds})"


def _write_patients(outcome: Outcome) -> None:
    """One line per run, endpoint and patient."""
    rows: list[dict[str, Any]] = [
        {
            "run": row["id"],
            "arm": row["arm"],
            "seed": row["seed"],
            "labels": row.get("labels", ""),
            "mode": row.get("mode", ""),
            "draw": row.get("draw", ""),
            "endpoint": endpoint,
            "patient": patient,
            "value": value,
        }
        for row in outcome.results.values()
        for endpoint, values in row["values"].items()
        for patient, value in values.items()
    ]
    names = ["run", "arm", "seed", "labels", "mode", "draw", "endpoint", "patient", "value"]
    with open(outcome.folder / "patients.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
