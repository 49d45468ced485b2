"""Batches of crops as an iterable data set for torch's DataLoader, which goes on exactly where it stopped."""

from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from lungssl_data.batch import CropBatch
from lungssl_data.crops import PairCrops


class CropStream(IterableDataset[CropBatch]):
    """Batches `start`, `start + 1`, ... of `PairCrops.batch`, without end or up to `stop`.

    Give it to `DataLoader(stream, batch_size=None, num_workers=n)`: worker w of n makes every n-th batch, the loader
    takes them in turn, so that the order is the same for every n. To resume after k batches, start at k.
    """

    def __init__(self, crops: PairCrops, batch_size: int, *, start: int = 0, stop: int | None = None) -> None:
        if batch_size < 1 or start < 0 or (stop is not None and stop < start):
            raise ValueError(
                f"batch_size {batch_size} must be 1 or more, start {start} 0 or more, stop {stop} not before start"
            )
        self.crops, self.batch_size, self.start, self.stop = crops, batch_size, start, stop

    def __iter__(self) -> Iterator[CropBatch]:
        worker = get_worker_info()
        index, step = (self.start + worker.id, worker.num_workers) if worker else (self.start, 1)
        while self.stop is None or index < self.stop:
            yield self.crops.batch(index, self.batch_size)
            index += step
