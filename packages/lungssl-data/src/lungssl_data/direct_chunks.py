"""Volumes of a patient file read straight from its chunks: HDF5 says once where they are, the rest is ours.

`/chunks/<phase>` holds the place and size in bytes of every chunk of the phase's volumes: opening a file costs the
reading of one table a phase, not a walk through HDF5's index (8 microseconds a chunk, `io.md` section 1). The file is
then mapped into memory and closed, so that HDF5 has nothing open when a process forks, and a map is as good in the
child as in the parent. Nothing from the file is believed: `chunk_codec.read_box` checks each place and length before
it follows.
"""

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from lungssl_data.cache_index import Node, open_patient_file
from lungssl_data.chunk_codec import (
    DAMAGED_ENTRY,
    DAMAGED_HEADER,
    DAMAGED_PLANE,
    encode_chunk,
    encoded_bound,
    read_box,
    scratch_for,
)
from lungssl_data.pair import CacheError

CHUNK_VOX = 32
"""Chunk side: a 96**3 crop decodes 2.3 times its voxels at 32, 4.5 times at 64 (`io.md` section 2, point 1)."""
_PLANES = {"<i2": 2, "|u1": 1}
_SHUFFLE, _LZ4 = h5py.h5z.FILTER_SHUFFLE, 32004
_DAMAGE = {
    DAMAGED_ENTRY: "its place is outside the file",
    DAMAGED_HEADER: "its header is not this volume's",
    DAMAGED_PLANE: "its bytes can't be decoded",
}
_OPENING_TRIES = 3
PHASES = ("exhale", "inhale")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkedVolume:
    """Where the chunks of one dataset are."""

    dtype: np.dtype
    shape: tuple[int, int, int]
    chunk: tuple[int, int, int]
    table: Int64[ndarray, "z y x 2"]
    """Place and size of each chunk in bytes."""

    def chunks_of(self, start_vox: tuple[int, int, int], size_vox: tuple[int, int, int]) -> tuple[slice, ...]:
        """The chunks that a box meets, as slices of the table; empty ones outside the volume."""
        sides = zip(start_vox, size_vox, self.shape, self.chunk, strict=True)
        return tuple(slice(max(a, 0) // c, -(-max(min(a + k, n), 0) // c)) for a, k, n, c in sides)


class PatientChunks:
    """The directly readable volumes of one patient file, by path in the file such as `exhale/ct`.

    Raises CacheError for a file that isn't a cache file of this format, or whose tables disagree with HDF5's index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for _ in range(_OPENING_TRIES):
                with open(path, "rb") as handle:
                    self.volumes = _volumes(path)
                    self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
                    # A builder may have put a new file here between the two openings.
                    if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                        break
            else:
                raise CacheError(f"{path}: was replaced while it was opened; wait for `lungssl cache build` to finish")
        except OSError as error:
            raise CacheError(f"{path}: can't be read ({error.strerror}); rerun `lungssl cache build`") from error
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._asked = {name: np.zeros(volume.table.shape[:3], bool) for name, volume in self.volumes.items()}

    def read_into(self, name: str, start_vox: tuple[int, int, int], out: ndarray) -> None:
        """Fill `out` [z, y, x] from voxel `start_vox` on; what lies outside the volume stays as it is.

        `out` is C-contiguous and of the volume's type. CacheError naming patient and chunk for a damaged one.
        """
        volume = self.volumes[name]
        if out.dtype != volume.dtype or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"{name} needs a C-contiguous {volume.dtype} array to read into, got {out.dtype}")
        # A page behind the end of a shortened file would be a bus error instead of an exception.
        if self._map.size() != len(self._bytes):
            raise CacheError(f"{self.path}: changed its size while open; delete it and rerun `lungssl cache build`")
        self._ask_for(name, volume.chunks_of(start_vox, out.shape))
        problem = decode_into(self._bytes, volume, start_vox, out)
        if problem:
            raise CacheError(
                f"patient {self.path.stem}: /{name} is {problem}; "
                f"delete the patient's file and rerun `lungssl cache build`"
            )

    def _ask_for(self, name: str, chunks: tuple[slice, ...]) -> None:
        """Have the system fetch chunks that weren't read before: just these bytes, all at once.

        Left to page faults, a cold file reads ahead blindly: 2.5 MB of a 96**3 crop's 1.4 (decision 0005).
        """
        if self._asked[name][chunks].all() or not hasattr(mmap, "MADV_WILLNEED"):
            return
        for row in self.volumes[name].table[chunks].reshape(-1, chunks[2].stop - chunks[2].start, 2):
            first, last = int(row[:, 0].min()), int(row.sum(1).max())
            first -= first % mmap.PAGESIZE
            if 0 <= first < last <= len(self._bytes):
                self._map.madvise(mmap.MADV_WILLNEED, first, last - first)
        self._asked[name][chunks] = True


def decode_into(file: ndarray, volume: ChunkedVolume, start_vox: tuple[int, int, int], out: ndarray) -> str:
    """`PatientChunks.read_into` from a file's bytes; returns what is damaged and where, empty: nothing."""
    scratch = scratch_for(math.prod(volume.chunk), volume.dtype.itemsize)
    start = tuple(int(s) for s in start_vox)
    problem, *chunk = read_box(file, volume.table, volume.chunk, volume.shape, start, out, scratch)
    return f"damaged in chunk {tuple(chunk)} (z, y, x): {_DAMAGE[problem]}" if problem else ""


def write_volumes(file: Node, phase: str, volumes: Mapping[str, ndarray]) -> None:
    """Write volumes [z, y, x] of one shape, int16 `ct` first and uint8 masks, to an open file, and their table."""
    tables = [_write_volume(file, f"{phase}/{name}", data) for name, data in volumes.items()]
    file.create_dataset(f"chunks/{phase}", data=np.stack(tables))
    file[f"chunks/{phase}"].attrs["volumes"] = ",".join(volumes)


def _write_volume(file: Node, name: str, data: ndarray) -> Int64[ndarray, "z y x 2"]:
    data = np.ascontiguousarray(data)
    planes = _PLANES[data.dtype.str]
    chunk = _chunk_of(data.shape)
    size = math.prod(chunk)
    dataset = file.create_dataset(
        name, shape=data.shape, dtype=data.dtype, chunks=chunk, shuffle=planes > 1, **hdf5plugin.LZ4(nbytes=size)
    )
    out = np.empty(encoded_bound(size, planes), np.uint8)
    for place in np.ndindex(_grid(data.shape, chunk)):
        count = encode_chunk(data, chunk, place, out)
        corner = tuple(p * c for p, c in zip(place, chunk, strict=True))
        dataset.id.write_direct_chunk(corner, out[:count].tobytes(), 0)
    return chunk_table(dataset)


def chunk_table(dataset: Node) -> Int64[ndarray, "z y x 2"]:
    """Places and sizes of a dataset's chunks by HDF5's own index; -1 where there is none that our filters made."""
    table = np.full((*_grid(dataset.shape, dataset.chunks), 2), -1, np.int64)

    def visit(chunk: Any) -> None:
        if chunk.filter_mask == 0:
            place = tuple(o // c for o, c in zip(chunk.chunk_offset, dataset.chunks, strict=True))
            table[place] = chunk.byte_offset, chunk.size

    dataset.id.chunk_iter(visit)
    return table


def is_direct(dataset: Node) -> bool:
    """Whether a dataset is in the layout that `write_volumes` writes."""
    if dataset.ndim != 3 or dataset.dtype.str not in _PLANES or dataset.chunks != _chunk_of(dataset.shape):
        return False
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(k) for k in range(plist.get_nfilters())]
    codes = [_LZ4] if dataset.dtype.itemsize == 1 else [_SHUFFLE, _LZ4]
    return [f[0] for f in filters] == codes and tuple(filters[-1][2][:1]) == (math.prod(dataset.chunks),)


def direct_volume(dataset: Node, table: Int64[ndarray, "z y x 2"]) -> ChunkedVolume:
    """A dataset with its table of chunks."""
    return _volume(dataset, dataset.dtype, table)


def stored_tables(file: Node, phase: str) -> dict[str, Int64[ndarray, "z y x 2"]]:
    """`/chunks/<phase>` by the volumes' names; empty where it isn't there or not what `write_volumes` writes."""
    dataset = file.get(f"chunks/{phase}")
    grid = _grid(file[f"{phase}/ct"].shape, _chunk_of(file[f"{phase}/ct"].shape))
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype != np.int64 or dataset.shape[1:] != (*grid, 2):
        return {}
    if dataset.nbytes > file.id.get_filesize():
        return {}
    names = str(dataset.attrs["volumes"]).split(",")
    return dict(zip(names, dataset[()], strict=True)) if len(names) == len(dataset) else {}


def _volumes(path: Path) -> dict[str, ChunkedVolume]:
    volumes = {}
    try:
        with open_patient_file(path) as file:
            for phase in PHASES:
                if phase in file and is_direct(file[f"{phase}/ct"]):
                    tables = _checked_tables(file, phase)
                    for name, table in tables.items():
                        dtype = np.dtype(np.int16 if name == "ct" else np.uint8)
                        volumes[f"{phase}/{name}"] = _volume(file[f"{phase}/ct"], dtype, table)
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path}: damaged HDF5 file; delete it and rerun `lungssl cache build`") from error
    return volumes


def _checked_tables(file: Node, phase: str) -> dict[str, Int64[ndarray, "z y x 2"]]:
    """The phase's tables; CacheError where ct's first or last entry isn't what HDF5 says, as after h5repack."""
    tables = stored_tables(file, phase)
    if "ct" in tables:
        ct = file[f"{phase}/ct"]
        ends = ((0, 0, 0), tuple(n - 1 for n in tables["ct"].shape[:3]))
        corners = [tuple(p * c for p, c in zip(place, ct.chunks, strict=True)) for place in ends]
        infos = [ct.id.get_chunk_info_by_coord(corner) for corner in corners]
        if all((i.byte_offset, i.size) == tuple(tables["ct"][e]) for i, e in zip(infos, ends, strict=True)):
            return tables
    raise CacheError(
        f"{file.filename}: /chunks/{phase} doesn't match the file, which another program may have rewritten; "
        f"delete it and rerun `lungssl cache build`"
    )


def _volume(like: Node, dtype: np.dtype, table: Int64[ndarray, "z y x 2"]) -> ChunkedVolume:
    z, y, x = like.shape
    return ChunkedVolume(dtype=dtype, shape=(z, y, x), chunk=_chunk_of(like.shape), table=table)


def _chunk_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    z, y, x = (min(CHUNK_VOX, n) for n in shape)
    return z, y, x


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))
