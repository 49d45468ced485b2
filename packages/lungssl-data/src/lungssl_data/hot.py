"""Whole decoded scans in a memory budget, to cut crops from at the speed of a copy."""

import threading

import numpy as np
from numpy import ndarray

from lungssl_data.cache import PairCache
from lungssl_data.pair import AIR_HU, Phase


class HotScans:
    """Reads like `PairCache`; data sets met first stay in memory until the budget is used, others come from disk.

    Nothing is evicted: every pass touches every patient once, where evicting the least recently used would throw out
    each scan shortly before its next use. So the share of reads served from memory is the budget's share of the cohort.
    Every process has its own copy of the budget.
    """

    def __init__(self, cache: PairCache, budget_bytes: int) -> None:
        self.cache, self.budget_bytes = cache, budget_bytes
        self.used_bytes = 0
        self._arrays: dict[tuple[str, Phase, str], ndarray] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["HotScans"], tuple[PairCache, int]]:
        return HotScans, (self.cache, self.budget_bytes)

    def read_into(
        self, patient: str, phase: Phase, name: str, start_vox: tuple[int, int, int], out: ndarray
    ) -> ndarray:
        """A box of one dataset into `out`, as `PairCache.read_into` gives it: outside the volume air (ct) or 0."""
        whole = self._whole(patient, phase, name)
        if whole is None:
            return self.cache.read_into(patient, phase, name, start_vox, out)
        low = [max(0, s) for s in start_vox]
        high = [min(n, s + k) for n, s, k in zip(whole.shape, start_vox, out.shape, strict=True)]
        if any(b - a < k for a, b, k in zip(low, high, out.shape, strict=True)):
            out.fill(AIR_HU if name == "ct" else 0)
        if all(a < b for a, b in zip(low, high, strict=True)):
            into = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start_vox, strict=True))
            out[into] = whole[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        return out

    def _whole(self, patient: str, phase: Phase, name: str) -> ndarray | None:
        key = (patient, phase, name)
        if key in self._arrays:
            return self._arrays[key]
        shape = self.cache.phase_record(patient, phase).shape
        size = int(np.prod(shape)) * (2 if name == "ct" else 1)
        with self._lock:
            if key not in self._arrays:
                if self.used_bytes + size > self.budget_bytes:
                    return None
                self._arrays[key] = self.cache.read(patient, phase, name, (0, 0, 0), shape)
                self.used_bytes += size
            return self._arrays[key]
