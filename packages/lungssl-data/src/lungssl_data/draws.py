"""Some of a cohort's patients, for experiments that may see only so many.

Draws are nested: the patient of draw 3 with one patient is among its two with two, so that more patients never mean
other, luckier ones; several draws show how much the choice matters (`domain.md` F: 1, 2, 5, 10 patients, 5 draws).
"""

import hashlib


def draw_patients(patients: list[str], n: int, *, draw: int = 0, seed: int = 0) -> list[str]:
    """The `n` patients of draw number `draw`, the same whatever the order of `patients`.

    Patients are ranked by SHA-256 of seed, draw and id, so a patient who joins the cohort changes a draw by at most
    one name. Raises ValueError where `n` is below 1 or above the number of patients, or an id comes twice.
    """
    if len(set(patients)) != len(patients):
        raise ValueError(f"{len(patients) - len(set(patients))} patient ids come twice; a draw needs each once")
    if not 1 <= n <= len(patients):
        raise ValueError(f"cannot draw {n} patients from {len(patients)}; take 1 to {len(patients)}, or add to them")
    ranked = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}/{draw}/{patient}".encode()).digest())
    return ranked[:n]
