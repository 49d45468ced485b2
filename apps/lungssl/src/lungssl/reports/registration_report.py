"""One page about one registration: whether to believe it, pictures, figures with what is usual."""

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment

from lungssl.registering import Registered
from lungssl.reports.figures import png
from lungssl.reports.registration_figure import registration_figure
from lungssl.training.run_folder import environment

Row = tuple[str, str, str]
"""What, its value, what is usual."""


def write_report(found: Registered, path: Path) -> None:
    """Write a page that needs no other file."""
    template = (files("lungssl.reports") / "templates" / "registration.html").read_text(encoding="utf-8")
    env = environment()
    page = {
        "doubts": found.registration.trust.doubts,
        "picture": png(registration_figure(found)),
        "tables": tables(found),
        "machine": f"lungssl {env['versions'].get('lungssl')}, torch {env['versions'].get('torch')}, preset "
        f"{found.preset}, {found.seconds:.1f} s on {env['cores']} CPU cores or the accelerator asked for.",
    }
    path.write_text(Environment(autoescape=True).from_string(template).render(page), encoding="utf-8")


def tables(found: Registered) -> dict[str, list[Row]]:
    """Titles and rows; usual values are those that `lungssl_tasks.registration.trust` was measured with."""
    trust, errors = found.registration.trust, found.landmarks
    scans = {"fixed": found.fixed, "moving": found.moving}
    held = {
        "Whether to believe it": [
            ("Overlap of the lungs", f"{trust.overlap:.3f}", "Dice after registration; usual 0.97 to 0.995"),
            ("Correlation of the insides", f"{trust.similarity:.2f}", "one patient 0.5 to 0.8, two patients to 0.35"),
            ("There and back differ by", f"{trust.disagreement_mm:.1f} mm", "median of the lung; usual below 0.7 mm"),
            ("Beyond the moving scan", f"{trust.unseen_share:.1%}", "of the fixed lung; led by what is around it"),
            ("Folds", f"{trust.folded_share:.3%}", "of the lung's voxels; 0 for a map that can be inverted"),
            ("SD of ln J", f"{trust.jacobian_sd:.2f}", "how unevenly volume changes; usual 0.1 to 0.25"),
        ],
        "Lungs": [
            ("Volume, moving by fixed", f"{trust.volume_ratio:.2f}", "above 1 where moving is inhale"),
            *(
                (
                    f"Lung volume, {role}",
                    f"{float((scan.lung > 0).sum()) * scan.spacing_mm[0] ** 3 / 1e6:.2f} l",
                    f"file of {' x '.join(map(str, reversed(scans[role].hu.shape)))} voxels of "
                    f"{' x '.join(f'{mm:.2f}' for mm in scans[role].geometry.spacing_mm)} mm",
                )
                for role, scan in found.scans.items()
            ),
        ],
    }
    if errors is not None:
        note = "places between voxels, not rounded"
        held[f"Target registration error of {errors.points} landmarks"] = [
            ("Mean (SD)", f"{errors.mean_mm:.2f} ({errors.sd_mm:.2f}) mm", note),
            ("Median", f"{errors.median_mm:.2f} mm", ""),
            ("95th centile", f"{errors.p95_mm:.2f} mm", ""),
            ("Worst", f"{errors.max_mm:.2f} mm", ""),
            ("Worst 30 %", f"{errors.tre30_mm:.2f} mm", "mean over them"),
            ("Before registration", f"{errors.identity_mm:.1f} mm", "mean"),
        ]
    return held
