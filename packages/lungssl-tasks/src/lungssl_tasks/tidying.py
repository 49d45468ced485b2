"""Labels without islands, for structures that are one piece each: lobes, lungs.

Source: the largest connected part of each structure, as nnU-Net keeps it (Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z). Differs from it: what is dropped but lies in the same foreground isn't background, it
goes to the structure nearest to it, so that a lung has no holes where two lobes were taken for each other.
"""

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from scipy import ndimage


def tidy(labels: UInt8[ndarray, "z y x"]) -> UInt8[ndarray, "z y x"]:
    """Each label's largest part (six neighbours), and what of the foreground is connected with one of these.

    Voxels of smaller parts get the nearest kept label, if they are connected with it through foreground of any label
    (26 neighbours); else they become 0. Distances are in voxels, which are cubes here.
    """
    kept = np.zeros_like(labels)
    for code in np.unique(labels[labels > 0]):
        parts, number = _connected(labels == code, 1)
        largest = 1 if number == 1 else 1 + int(np.bincount(parts.ravel())[1:].argmax())
        kept[parts == largest] = code
    foreground, _ = _connected(labels > 0, 3)
    together = np.isin(foreground, np.unique(foreground[kept > 0]))
    rest = (labels > 0) & (kept == 0) & together
    if rest.any():
        nearest = ndimage.distance_transform_edt(kept == 0, return_distances=False, return_indices=True)
        assert isinstance(nearest, ndarray)
        kept[rest] = kept[tuple(axis[rest] for axis in nearest)]
    return kept


def _connected(mask: ndarray, connectivity: int) -> tuple[ndarray, int]:
    parts = np.zeros(mask.shape, np.int32)
    number = ndimage.label(mask, structure=ndimage.generate_binary_structure(3, connectivity), output=parts)
    assert isinstance(number, int)
    return parts, number
