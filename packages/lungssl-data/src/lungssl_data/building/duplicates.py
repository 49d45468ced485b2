"""The same scan under two names: it could be in training and in the test at once."""

from collections.abc import Iterable

from lungssl_data.cache_index import PatientRecord


class EqualScans:
    """Which patients hold which scan files, by the hash of their bytes; starts from what the cache holds."""

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
            found.append("exhale and inhale are the same files; give each phase its own scan")
        for phase, sha256 in hashes.items():
            person = self._holders[sha256][record.patient]
            others = sorted(p for p, theirs in self._holders[sha256].items() if theirs != person)
            if others:
                found.append(
                    f"{phase}: the same file as of {', '.join(others)}, who may be in another split; if they are one "
                    f"person, build into a new folder from a manifest that gives both the same `person`"
                )
        return found

    def _add(self, record: PatientRecord) -> None:
        for holders in self._holders.values():
            holders.pop(record.patient, None)
        for sha256 in _hashes(record).values():
            self._holders.setdefault(sha256, {})[record.patient] = record.person or record.patient


def _hashes(record: PatientRecord) -> dict[str, str]:
    """By phase; without those that were not made from files."""
    found = {phase: getattr(record, phase).source_sha256 for phase in record.phases()}
    return {phase: sha256 for phase, sha256 in found.items() if sha256}
