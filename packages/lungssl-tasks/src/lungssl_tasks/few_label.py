"""Which patients' labels a few-label experiment may see.

Draws are nested: the patient of draw 3 at one label is among its two at two labels, so that more labels never mean
other, luckier ones; several draws show how much the choice matters (`domain.md` F: 1, 2, 5, 10 patients, 5 draws).
"""

import hashlib


def label_draw(patients: list[str], n: int, *, draw: int, seed: int = 0) -> list[str]:
    """The `n` labelled patients of draw number `draw`, the same whatever the order of `patients`.

    Patients are ranked by SHA-256 of seed, draw and id, so a patient who joins the cohort changes a draw by at most
    one name. Raises ValueError where `n` is below 1 or above the number of patients, or an id comes twice.
    """
    if len(set(patients)) != len(patients):
        raise ValueError(f"{len(patients) - len(set(patients))} patient ids come twice; a draw needs each once")
    if not 1 <= n <= len(patients):
        raise ValueError(
            f"cannot draw {n} labelled patients from {len(patients)}; take 1 to {len(patients)} or label more"
        )
    ranked = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}/{draw}/{patient}".encode()).digest())
    return ranked[:n]
