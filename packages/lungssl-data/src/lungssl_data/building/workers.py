"""Processes that build one patient at a time and may die of it.

Spawned, never forked: a forked child would share HDF5's open files and locks. A worker that crashes, is killed or takes
too long costs its patient and nothing else; a fresh one takes its place.
"""

import multiprocessing
import os
import resource
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lungssl_data.building.patient import Built, Recipe, build_patient
from lungssl_data.layouts.source import PairSource
from lungssl_data.pair import Split

_PARENT_POLL_S = 0.5


@dataclass(kw_only=True)
class _Worker:
    process: Any
    pipe: Connection
    source: PairSource | None = None
    started: float = 0.0


class Workers:
    """`count` processes; give them patients with `start`, take what became of them with `finished`."""

    def __init__(
        self, count: int, recipe: Recipe, *, time_limit_s: float | None, memory_limit_gib: float | None
    ) -> None:
        self._recipe, self._time_limit_s, self._memory_limit_gib = recipe, time_limit_s, memory_limit_gib
        self._count = count
        self._workers: list[_Worker] = []

    def idle(self) -> int:
        """How many patients can be started now."""
        return self._count - len(self.busy())

    def busy(self) -> list[PairSource]:
        """The patients being built."""
        return [worker.source for worker in self._workers if worker.source is not None]

    def start(self, source: PairSource, split: Split) -> None:
        """Begin a patient in an idle process."""
        for worker in [w for w in self._workers if w.source is None]:
            try:
                worker.pipe.send((source, split))
                break
            except OSError:  # it was killed while idle
                self._remove(worker)
        else:
            worker = self._spawn()
            with suppress(OSError):  # it died at its start: `finished` finds the pipe closed and says so
                worker.pipe.send((source, split))
        worker.source, worker.started = source, time.monotonic()

    def finished(self, timeout_s: float) -> list[Built]:
        """What became of patients since the last call; waits for at least one of them, at most `timeout_s`."""
        now = time.monotonic()
        busy = [w for w in self._workers if w.source is not None]
        if self._time_limit_s is not None:
            timeout_s = min([timeout_s, *(max(0.0, w.started + self._time_limit_s - now) for w in busy)])
        ready = set(wait([w.pipe for w in busy], timeout_s))
        done = []
        for worker in busy:
            if worker.pipe in ready:
                try:
                    done.append(worker.pipe.recv())
                    worker.source = None
                except (EOFError, OSError):
                    done.append(self._bury(worker))
            elif self._time_limit_s is not None and time.monotonic() - worker.started > self._time_limit_s:
                done.append(self._bury(worker, too_long=True))
        return done

    def close(self) -> None:
        """End all processes, in the middle of a patient if need be: unfinished files never have a final name."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()

    def _spawn(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self._recipe, self._memory_limit_gib)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process=process, pipe=ours)
        self._workers.append(worker)
        return worker

    def _bury(self, worker: _Worker, *, too_long: bool = False) -> Built:
        assert worker.source is not None
        if too_long:
            worker.process.kill()
        self._remove(worker)
        code = worker.process.exitcode or 0
        if too_long:
            why = f"took longer than the limit of {self._time_limit_s:g} s; look at its files, or raise --time-limit-s"
        else:
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            why = (
                f"its process was killed or crashed ({ended}): out of memory, or a file is damaged so that its library "
                f"can't take it; lower --jobs, raise --memory-gib, or export the file again"
            )
        return Built(
            patient=worker.source.patient, outcome="failed", message=why, time_s=time.monotonic() - worker.started
        )

    def _remove(self, worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.join()
        self._workers.remove(worker)


def _limit_memory(gib: float) -> None:
    """Let this process map `gib` more than it has mapped by now, libraries and all."""
    pages = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) if Path("/proc/self/statm").exists() else 0
    )
    most = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _end_with_parent(parent: int) -> None:
    """A killed parent closes nothing and tells nobody; without this, its workers would finish their patients."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


def _work(pipe: Connection, recipe: Recipe, memory_limit_gib: float | None) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold a patient's scan
    if memory_limit_gib is not None:
        _limit_memory(memory_limit_gib)
    while True:
        try:
            source, split = pipe.recv()
        except (EOFError, OSError):
            return  # the parent is gone
        pipe.send(build_patient(source, split, recipe))
