"""Registration of a pair: where each point of the exhale lung is in the inhale scan.

    from lungssl_tasks.registration import PRESETS, register

    found = register(exhale, inhale, PRESETS["default"])      # two PhaseScans of cubes of one size
    inhale_mm = exhale_mm + found.at(exhale_mm)                # (n, 3), LPS mm
    found.trust.doubts                                         # what speaks against believing it, if anything

A coarse affine from the lungs (`alignment`), a discrete search over a cost volume of MIND-SSC features, both ways
(`search`), then descent on the local correlation of the lungs from coarse to fine (`descent`). Nothing is trained.
Only the lung counts: ribs, spine and arms may slide along it. Axes: arrays (z, y, x), vectors (x, y, z) in LPS mm.
"""

from lungssl_tasks.registration.estimate import EstimateConfig, estimate_displacement
from lungssl_tasks.registration.register import PRESETS, Registration, RegistrationConfig, register
from lungssl_tasks.registration.trust import Trust

__all__ = [
    "PRESETS",
    "EstimateConfig",
    "Registration",
    "RegistrationConfig",
    "Trust",
    "estimate_displacement",
    "register",
]
