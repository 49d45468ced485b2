"""Stored numbers to Hounsfield units and labels, for every format alike."""

import numpy as np
from jaxtyping import Int16, UInt8
from numpy import ndarray

from lungssl_data.readers import VolumeError


def to_hu(values: ndarray, name: str) -> Int16[ndarray, "z y x"]:
    """Round to int16; VolumeError where a value is no number or doesn't fit."""
    if values.dtype == np.int16:
        return values
    if not np.issubdtype(values.dtype, np.integer):
        if not np.isfinite(values).all():
            raise VolumeError(f"{name}: some voxels are NaN or infinite; write the scan with plain HU first")
        values = np.rint(values)
    low, high = values.min(), values.max()
    if low < -32768 or high > 32767:
        raise VolumeError(
            f"{name}: values from {low:g} to {high:g} are no Hounsfield units (int16); check its rescaling"
        )
    return values.astype(np.int16)


def to_labels(values: ndarray, name: str) -> UInt8[ndarray, "z y x"]:
    """uint8 labels; VolumeError for fractions and for values outside 0-255."""
    if values.dtype == np.uint8:
        return values
    labels = values.astype(np.uint8)
    if not np.array_equal(labels, values):
        raise VolumeError(
            f"{name}: labels must be whole numbers from 0 to 255, got {values.min():g} to {values.max():g}"
        )
    return labels
