"""A mask as a DICOM segmentation of the series it was made from, by highdicom.

A DICOM-SEG belongs to a patient and a study: it repeats who they are from the source, or no archive would show it
there. It is therefore written only when asked for, and is the only output of lungssl that names a patient.
"""

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lungssl_data.readers.dicom import files_in_order
from lungssl_tasks.aeration.parts import LOBE_NAMES

from lungssl.errors import ConfigError, DataError
from lungssl.segmenting import Segmented
from lungssl.structures import LUNG_NAMES

if TYPE_CHECKING:
    import pydicom

CODES = {
    "right lung": ("3341006", "Right lung"),
    "left lung": ("44029006", "Left lung"),
    "RUL": ("42400003", "Upper lobe of right lung"),
    "RML": ("72481006", "Middle lobe of right lung"),
    "RLL": ("266005", "Lower lobe of right lung"),
    "LUL": ("44714003", "Upper lobe of left lung"),
    "LLL": ("41224006", "Lower lobe of left lung"),
}
"""SNOMED CT, with the side in the code: DICOM's own CID 6170 has lobes of either lung, and a side beside them, which
viewers don't show."""
ORGAN = ("123037004", "Anatomical structure")
"""Segmented property category, PS3.16 CID 7150."""
MAY_BE_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"),
)
"""Of patient, study and frame of reference (type 2, PS3.3 C.7): de-identified series often lack them whole."""
LEARNED = ("123110", "DCM", "Artificial Intelligence")
MORPHOLOGY = ("123104", "DCM", "Morphological Operations")
"""Algorithm family, PS3.16 CID 7162."""
assert set(CODES) == {*LUNG_NAMES.values(), *LOBE_NAMES.values()}


def check_dicom_seg(image: Path, output: Path) -> None:
    """ConfigError where no DICOM-SEG can be made of `image`, before any work is done."""
    if not image.is_dir() and image.suffix.lower() != ".dcm":
        raise ConfigError(f"--dicom-seg needs a DICOM series, a folder or a .dcm file; {image.name} is neither")
    if output.suffix.lower() != ".dcm":
        raise ConfigError(f"--dicom-seg {output.name}: expected a name that ends with .dcm")


def write_dicom_seg(segmented: Segmented, image: Path, output: Path) -> None:
    """Write one binary segment per structure that the mask holds.

    Raises ConfigError for structures without a code, DataError for an empty mask or a series that highdicom refuses,
    and what reading the series raises. No text of the source enters an error.
    """
    import highdicom
    import pydicom
    from pydicom.sr.coding import Code

    held = [(code, name) for code, name in segmented.names.items() if (segmented.mask.labels == code).any()]
    if unknown := [name for _, name in held if name not in CODES]:
        raise ConfigError(f"--dicom-seg knows lungs and lobes, not {', '.join(unknown)}; write a .nii.gz or .nrrd")
    if not held:
        raise DataError("--dicom-seg: nothing was found in the scan, and an empty segmentation can't be written")
    made_by = highdicom.AlgorithmIdentificationSequence(
        name="lungssl",
        family=Code(*(LEARNED if "weights_sha256" in segmented.made_by else MORPHOLOGY)),
        version=version("lungssl"),
    )
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=CODES[name][1],
            segmented_property_category=Code(ORGAN[0], "SCT", ORGAN[1]),
            segmented_property_type=Code(CODES[name][0], "SCT", CODES[name][1]),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=made_by,
        )
        for number, (_, name) in enumerate(held, start=1)
    ]
    numbers = np.zeros(256, np.uint8)
    for number, (code, _) in enumerate(held, start=1):
        numbers[code] = number
    files = files_in_order(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote names
            source = [_completed(pydicom.dcmread(path)) for path in files]
            found = highdicom.seg.Segmentation(
                source_images=source,
                pixel_array=numbers[segmented.mask.labels],
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=descriptions,
                series_instance_uid=highdicom.UID(),
                series_number=9000,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="lungssl developers",
                manufacturer_model_name="lungssl segment",
                software_versions=version("lungssl"),
                device_serial_number="none",
                series_description=f"Research use only: lungssl, {segmented.made_by['method']}",
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"--dicom-seg: highdicom refuses this series ({type(error).__name__}); elements that a CT must have are "
            f"missing. Write a .nii.gz or .nrrd"
        ) from None
    temporary = output.with_name(f".{output.name}.part")
    found.save_as(temporary)
    temporary.replace(output)


def _completed(source: "pydicom.Dataset") -> "pydicom.Dataset":
    """With the elements that may be empty, empty, where they are missing."""
    for keyword in MAY_BE_EMPTY:
        if keyword not in source:
            setattr(source, keyword, None)
    return source
