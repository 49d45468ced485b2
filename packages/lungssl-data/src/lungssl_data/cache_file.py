"""One patient's file of the cache: what goes in, what comes out, is it whole. The format is in `cache.py`."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import hdf5plugin
import numpy as np
from jaxtyping import UInt8, UInt16
from numpy import ndarray

from lungssl_data.cache_index import FORMAT_VERSION, LANDMARKS, Node, open_patient_file, patient_record, triple
from lungssl_data.direct_chunks import (
    CHUNK_VOX,
    chunk_table,
    decode_into,
    direct_volume,
    is_direct,
    stored_tables,
    write_volumes,
)
from lungssl_data.pair import Displacement, LandmarkKind, Landmarks, PhasePair

Compression = Literal["lz4", "gzip"]
MASKS = ("valid", "lung", "lobes", "lesion", "vessels")


def lung_points_vox(lung: UInt8[ndarray, "z y x"], *, count: int = 4096) -> UInt16[ndarray, "n 3"]:
    """At most `count` random lung voxels as (z, y, x), the same ones for the same mask.

    4096 points cover a 4-litre lung about every 10 mm: finer than any crop jitter.
    """
    inside = np.flatnonzero(lung)
    if len(inside) > count:
        inside = np.sort(np.random.default_rng(0).choice(inside, count, replace=False))
    return np.stack(np.unravel_index(inside, lung.shape), axis=1).astype(np.uint16)


def write_patient(file: Node, pair: PhasePair, compression: Compression) -> None:
    """Everything of a patient to an open, empty file."""
    file.attrs.update(format=FORMAT_VERSION, patient=pair.patient, person=pair.person, split=pair.split, key=pair.key)
    for phase in pair.phases():
        scan = pair.scan(phase)
        group = file.create_group(phase)
        group.attrs["spacing_mm"] = scan.spacing_mm
        group.attrs["origin_mm"] = scan.origin_mm
        group.attrs["source_sha256"] = scan.source_sha256
        group.attrs["lung_ml"] = np.count_nonzero(scan.lung) * scan.geometry().voxel_ml()
        masks = {name: getattr(scan, name) for name in MASKS}
        _volumes(file, phase, {"ct": scan.ct_hu} | {n: m for n, m in masks.items() if m is not None}, compression)
        _array(file, f"{phase}/lung_points_vox", lung_points_vox(scan.lung))
    if pair.exhale_to_inhale is not None:
        link = file.require_group("exhale_to_inhale")
        link.attrs.update(affine=pair.exhale_to_inhale, provenance=pair.affine_provenance)
    if pair.displacement is not None:
        field = pair.displacement
        options = _gzip() if compression == "gzip" else dict(hdf5plugin.Bitshuffle(cname="lz4"))
        chunks = (1, *(min(CHUNK_VOX, n) for n in field.u_mm.shape[1:]))
        _array(file, "exhale_to_inhale/u", field.u_mm, chunks=chunks, **options)
        file["exhale_to_inhale/u"].attrs.update(
            spacing_mm=field.spacing_mm, origin_mm=field.origin_mm, provenance=field.provenance
        )
    for kind, points in pair.landmarks.items():
        _array(file, LANDMARKS.format(kind), np.stack([points.exhale_mm, points.inhale_mm], axis=1))
    file.attrs["head_sha256"] = head_sha256(file)


def head_sha256(file: Node) -> str:
    """Hash of all that the data sets' checksums leave out: which there are, their shapes, and every attribute."""
    head = {"/": _attributes(file)}

    def visit(name: str, item: Node) -> None:
        shape = [list(item.shape), item.dtype.str] if isinstance(item, h5py.Dataset) else []
        head[name] = {"shape": shape, **_attributes(item)}

    file.visititems(visit)
    head["/"].pop("head_sha256", None)
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def read_displacement(file: Node) -> Displacement:
    """The field of an open file that has one."""
    data = file["exhale_to_inhale/u"]
    return Displacement(
        u_mm=data[()],
        spacing_mm=triple(data.attrs["spacing_mm"]),
        origin_mm=triple(data.attrs["origin_mm"]),
        provenance=data.attrs["provenance"],
    )


def read_landmarks(file: Node) -> dict[LandmarkKind, Landmarks]:
    """The landmarks of an open file, by kind; none: empty."""
    kinds = [kind for kind in get_args(LandmarkKind) if LANDMARKS.format(kind) in file]
    stored = {kind: file[LANDMARKS.format(kind)][()] for kind in kinds}
    return {
        kind: Landmarks(exhale_mm=np.ascontiguousarray(both[:, 0]), inhale_mm=np.ascontiguousarray(both[:, 1]))
        for kind, both in stored.items()
    }


def check_file(path: Path) -> list[str]:
    """Problems of one file: unreadable, or something in it that changed since it was written."""
    problems: list[str] = []
    try:
        with open_patient_file(path) as file:
            content = np.memmap(path, np.uint8, "r")

            def visit(name: str, item: Node) -> None:
                if isinstance(item, h5py.Dataset) and not name.startswith("chunks/"):
                    problem = _problem(file, name, content)
                    if problem:
                        problems.append(f"/{name}: {problem}")

            file.visititems(visit)
            if file.attrs["head_sha256"] != head_sha256(file):
                problems.append("/: an attribute changed, or a data set was added or taken away")
            for phase in patient_record(file).phases():
                if not len(file[phase]["lung_points_vox"]):
                    problems.append(f"/{phase}: empty lung mask")
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ValueError, MemoryError) as error:
        problems.append(f"unreadable ({type(error).__name__})")
    return problems


def _attributes(item: Node) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in item.attrs.items()}


def _problem(file: Node, name: str, content: ndarray) -> str:
    """What is wrong with one dataset; empty: nothing."""
    item = file[name]
    crc32 = item.attrs["crc32"]
    if is_direct(item):
        # Our reader first: HDF5's LZ4 filter trusts the lengths that it finds.
        table = chunk_table(item)
        data = np.empty(item.shape, item.dtype)
        damage = decode_into(content, direct_volume(item, table), (0, 0, 0), data)
        if damage:
            return damage
        if _crc32(data) != crc32:
            return "checksum differs"
        phase, short = name.split("/")
        stored = stored_tables(file, phase)
        if short not in stored or not np.array_equal(stored[short], table):
            return "table of chunks differs from HDF5's"
    try:
        return "" if _crc32(item[()]) == crc32 else "checksum differs"
    except OSError:
        return "unreadable"


def _volumes(file: Node, phase: str, volumes: dict[str, ndarray], compression: Compression) -> None:
    if compression == "gzip":
        for name, data in volumes.items():
            _array(file, f"{phase}/{name}", data, chunks=tuple(min(CHUNK_VOX, n) for n in data.shape), **_gzip())
    else:
        write_volumes(file, phase, volumes)
        for name, data in volumes.items():
            file[f"{phase}/{name}"].attrs["crc32"] = _crc32(data)


def _gzip() -> dict[str, Any]:
    return {"compression": "gzip", "compression_opts": 4, "shuffle": True}


def _array(file: Node, name: str, data: ndarray, **options: Any) -> None:
    file.create_dataset(name, data=data, **options)
    file[name].attrs["crc32"] = _crc32(data)


def _crc32(data: ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
