"""Aeration of lungs on CT: compartments, recruitment, hyperinflation, ventilation (`domain.md` A).

    from lungssl_tasks.aeration import aeration, breath, match, of_scan

    held = aeration(scan.ct_hu[scan.lung > 0], scan.geometry().voxel_ml())     # one scan: gas, mass, compartments
    found = breath(of_scan(exhale), of_scan(inhale), match(exhale, inhale, u_mm, jacobian))     # a pair, by part
    found["lungs"].figures()["net_recruited_percent"]

Volumes are ml, masses g, HU Hounsfield units; arrays (z, y, x), displacements (x, y, z) in LPS mm. Research use only.
"""

from lungssl_tasks.aeration.breath import Part, breath
from lungssl_tasks.aeration.change import Change, Matched, change, match
from lungssl_tasks.aeration.compartments import COMPARTMENTS_HU, Aeration, aeration, non_aerated_mass_g
from lungssl_tasks.aeration.parts import LungVoxels, of_scan, of_volume

__all__ = [
    "COMPARTMENTS_HU",
    "Aeration",
    "Change",
    "LungVoxels",
    "Matched",
    "Part",
    "aeration",
    "breath",
    "change",
    "match",
    "non_aerated_mass_g",
    "of_scan",
    "of_volume",
]
