"""The same scan under two names: it could be in training and in the test at once."""

import hashlib
from collections.abc import Iterable

import numpy as np

from lungssl_data.cache_index import PatientRecord
from lungssl_data.pair import AIR_HU
from lungssl_data.splits import same_spelling
from lungssl_data.volume import Volume


def voxels_sha256(volume: Volume) -> str:
    """Hash of a scan's voxels in the patient's axes, whatever file they are from.

    Formats differ in the order and the directions of the axes, and in what they write as padding.
    """
    direction = volume.geometry.direction
    towards = np.abs(direction).argmax(0)  # the patient's axis (x, y, z) of each index axis
    hu = volume.hu
    if len(set(towards)) == 3:
        hu = np.flip(hu, [2 - index for index in range(3) if direction[towards[index], index] < 0])
        hu = hu.transpose([2 - int(np.flatnonzero(towards == axis)[0]) for axis in (2, 1, 0)])
    digest = hashlib.sha256(repr(hu.shape).encode())
    for plane in hu:
        digest.update(np.ascontiguousarray(np.maximum(plane, AIR_HU), "<i2"))
    return digest.hexdigest()


class EqualScans:
    """Which patients hold which scans, by the hash of their voxels; starts from what the cache holds."""

    def __init__(self, known: Iterable[PatientRecord]) -> None:
        self._holders: dict[str, dict[str, str]] = {}  # hash to patient to person
        for record in known:
            self._add(record)

    def warnings(self, record: PatientRecord) -> list[str]:
        """Take in a patient just built; what to say of scans that somebody else has, or that are both phases."""
        self._add(record)
        hashes = _hashes(record)
        found = []
        if len(set(hashes.values())) < len(hashes):
            found.append("exhale and inhale are the same scan; give each phase its own scan")
        for phase, sha256 in hashes.items():
            person = self._holders[sha256][record.patient]
            others = sorted(p for p, theirs in self._holders[sha256].items() if theirs != person)
            if others:
                found.append(
                    f"{phase}: the same scan as of {', '.join(others)}, who may be in another split; if they are one "
                    f"person, build into a new folder from a manifest that gives both the same `person`"
                )
        return found

    def _add(self, record: PatientRecord) -> None:
        for holders in self._holders.values():
            holders.pop(record.patient, None)
        for sha256 in _hashes(record).values():
            self._holders.setdefault(sha256, {})[record.patient] = same_spelling(record.person or record.patient)


def _hashes(record: PatientRecord) -> dict[str, str]:
    """By phase; without those that were not made from files."""
    found = {phase: getattr(record, phase).source_sha256 for phase in record.phases()}
    return {phase: sha256 for phase, sha256 in found.items() if sha256}
