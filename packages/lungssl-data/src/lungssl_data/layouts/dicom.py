"""Plain DICOM in any folders, as a PACS exports it: one pair per patient, or one scan where there is no pair.

The phase comes from the headers (`readers.dicom_phase`). Where they say nothing, a patient's only scan is inhale, as
chest CT is taken at inspiration; of two scans of one study, the one with clearly larger lungs is; and beside an
exhale scan, the study's only unnamed scan is. Of several reconstructions the one with most slices is taken. What stays
unclear is its patient's problem: a manifest can say which series is which. What is left out is noted. Patient ids are
keyed hashes; where several people have one, by name, birth date or sex, nobody's scans are taken for anybody's.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lungssl_data.ids import load_key
from lungssl_data.layouts.files import dataset_name, has_name, nothing_found
from lungssl_data.layouts.single_phase import PROTOCOL
from lungssl_data.layouts.source import PairSource, ScanSource, attempt
from lungssl_data.pair import CacheError, Phase
from lungssl_data.readers import VolumeError, read_slices
from lungssl_data.readers.dicom_tree import CtSeries, find_series

NAMES = r"(?:[^/]+\.(?:dcm|ima)|dicomdir|i\d{4,}|im[-_]?\d+|[12](?:\.\d+){6,})"
"""Files of a PACS export by name: a suffix, an index, a running number, a UID."""
LEAST_GAIN = 1.15
"""Ratio of lung volumes that makes an inhale and an exhale of two unnamed scans: tidal breaths change lungs by some
15 %, repeated scans at one phase by less (`domain.md` A)."""
WORD = "word in the series description"


class UnclearError(CacheError):
    """A patient's series can't be told apart; the message says which, without any name."""

    def __init__(self, which: str) -> None:
        super().__init__(f"CT series that can't be told apart: {which}; name one of each phase in a manifest")


def recognises(root: Path) -> bool:
    """Whether some file is named as DICOM files are."""
    return has_name(root, NAMES)


def read(root: Path) -> list[PairSource]:
    """Patients by id, with a problem where their series can't be told apart; CacheError where there are none."""
    series = listed(root)
    if not series:
        raise nothing_found(root, "DICOM files of CT series in any folders")

    def source_of(patient: str, own: list[CtSeries]) -> list[PairSource]:
        check_person(own)
        scans = chosen(own)
        notes = (*left_out(own, scans), *_unnamed(own))
        return [PairSource(patient=patient, scans=scans, dataset=dataset_name(root, ""), notes=notes)]

    patients = by_patient(series).items()
    return [one for patient, own in patients for one in attempt(patient, source_of, patient, own)]


def listed(root: Path) -> list[CtSeries]:
    """All CT series below `root`; none where it is no folder."""
    return find_series(root, key=load_key()) if root.is_dir() else []


def by_patient(series: Sequence[CtSeries]) -> dict[str, list[CtSeries]]:
    """Series by their patient's id."""
    patients: dict[str, list[CtSeries]] = defaultdict(list)
    for one in series:
        patients[one.patient].append(one)
    return dict(patients)


def check_person(series: Sequence[CtSeries]) -> None:
    """CacheError where one patient's series name several people, as exports do that give all the same PatientID."""
    for place, what in enumerate(("names", "birth dates", "sexes")):
        different = {one.person[place] for one in series} - {""}
        if len(different) > 1:
            raise CacheError(
                f"its {len(series)} CT series have one PatientID and {len(different)} {what}; export each person with "
                f"an id of their own, or, if this is one person, name the series in a manifest"
            )


def left_out(series: Sequence[CtSeries], scans: Mapping[Phase, ScanSource]) -> list[str]:
    """What the pair leaves of a patient's series, in a sentence; phases of a 4D series between the ends aren't told."""
    taken = {scan.slices for scan in scans.values()}
    studies = {one.study for one in series if one.files in taken}
    left = [one for one in series if one.files not in taken and (one.phase is not None or one.phase_percent is None)]
    if not left:
        return []
    parts = [f"{len(left)} more CT series of this patient left out"]
    others = sum(one.study not in studies for one in left)
    parts += [f"{others} of other studies"] if others else []
    problems = [one.problem for one in left if one.problem is not None]
    parts += [f"{len(problems)} that can't be read (first: {problems[0]})"] if problems else []
    return [", ".join(parts)]


def _unnamed(series: Sequence[CtSeries]) -> list[str]:
    if series[0].told_by != "study":
        return []
    return [
        "the files name no patient, so this study counts as one: other studies of the person may be in other splits"
    ]


def chosen(series: Sequence[CtSeries]) -> dict[Phase, ScanSource]:
    """A patient's pair, or one scan; UnclearError where several would do."""
    usable = [one for one in series if one.problem is None]
    if not usable:  # so that the build says why, in its line for this patient
        phase: Phase = series[0].phase or "inhale"
        return {phase: source(series[0], series[0].evidence or PROTOCOL)}
    exhale, inhale = (_of_phase(series, phase) for phase in ("exhale", "inhale"))
    studies = {one.study for one in exhale} & {one.study for one in inhale}
    if studies:
        pairs = [
            (best([one for one in exhale if one.study == study]), best([one for one in inhale if one.study == study]))
            for study in sorted(studies)
        ]
        slices = [first.slices + second.slices for first, second in pairs]
        if slices.count(max(slices)) > 1:
            raise UnclearError(f"{len(pairs)} studies with an exhale and an inhale series")
        first, second = pairs[int(np.argmax(slices))]
        return {"exhale": source(first), "inhale": source(second)}
    unnamed = [one for one in usable if one.phase is None and one.phase_percent is None]
    if exhale:
        first = best(exhale)
        beside = [one for one in unnamed if one.study == first.study]
        scans: dict[Phase, ScanSource] = {"exhale": source(first)}
        if beside:
            scans["inhale"] = source(best(beside), PROTOCOL)
        return scans
    if inhale:
        return {"inhale": source(best(inhale))}
    if len(unnamed) == 2 and len({one.study for one in unnamed}) == 1:
        return _by_lungs(unnamed)
    if not unnamed:
        raise UnclearError(f"{len(usable)} phases of breathing, none of them 0 % or 50 %")
    return {"inhale": source(best(unnamed), PROTOCOL)}


def source(series: CtSeries, evidence: str = "") -> ScanSource:
    """The files of one series."""
    return ScanSource(image=series.files[0].parent, slices=series.files, evidence=evidence or series.evidence)


def _of_phase(series: Sequence[CtSeries], phase: Phase) -> list[CtSeries]:
    """Series of a phase, those with a problem included: a pair must not lose one unnoticed. Words beat percentages."""
    own = [one for one in series if one.phase == phase]
    return [one for one in own if one.evidence == WORD] or own


def best(series: Sequence[CtSeries]) -> CtSeries:
    """The one with most slices; those without a problem first."""
    first = sorted(series, key=lambda one: (one.problem is not None, -one.slices))
    if len(first) > 1 and first[0].problem is None and first[1].problem is None and first[0].slices == first[1].slices:
        raise UnclearError(f"{len(first)} series of one phase, two of them of {first[0].slices} slices")
    return first[0]


def _by_lungs(series: Sequence[CtSeries]) -> dict[Phase, ScanSource]:
    """Of two series, the one with clearly larger lungs is inhale."""
    from lungssl_data.lung_mask import LungMaskError, lung_mask

    ml = []
    for one in series:
        try:
            volume = read_slices(one.files)
            ml.append(np.count_nonzero(lung_mask(volume)) * volume.geometry.voxel_ml())
        except (VolumeError, LungMaskError) as error:
            raise UnclearError("2 series without a phase, and no lungs found in one") from error
    if max(ml) < LEAST_GAIN * min(ml):
        raise UnclearError(f"2 series without a phase, with lungs of {ml[0] / 1000:.1f} and {ml[1] / 1000:.1f} l")
    small, large = (series[int(place)] for place in np.argsort(ml))
    return {"exhale": source(small, "volume of the lungs"), "inhale": source(large, "volume of the lungs")}
