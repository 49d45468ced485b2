"""Reading the next batches while the current one is in use."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.utils.data import DataLoader, Dataset


def read_ahead(read: Callable[[int], Any], start: int, stop: int, *, workers: int) -> Generator[Any, None, None]:
    """Yield `read(start), ..., read(stop - 1)` in order, made in the background.

    `workers` 0 uses one thread: HDF5 holds one lock per process, more threads would wait for each other. Otherwise that
    many processes, forked or spawned by torch's DataLoader.
    """
    if workers == 0:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
            pending = pool.submit(read, start) if start < stop else None
            for index in range(start, stop):
                assert pending is not None
                batch = pending.result()
                pending = pool.submit(read, index + 1) if index + 1 < stop else None
                yield batch
        return
    yield from DataLoader(_Reads(read, stop), batch_size=None, sampler=range(start, stop), num_workers=workers)


class _Reads(Dataset[Any]):
    """`read` as the map-style dataset that DataLoader wants."""

    def __init__(self, read: Callable[[int], Any], stop: int) -> None:
        self.read, self.stop = read, stop

    def __len__(self) -> int:
        return self.stop

    def __getitem__(self, index: int) -> Any:
        return self.read(index)
