"""One builder per patient: lock files that say who holds them, and what dead builders left behind."""

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lungssl_data.cache_index import this_machine

BEAT_S = 20.0
"""A held lock is touched this often."""
STALE_S = 600.0
"""A lock of another machine untouched for this long has no builder any more; clocks of one cluster agree far better."""
UNWRITTEN_S = 5.0
"""A lock still empty after this long lost its writer between creating and filling it."""
_TEMPORARY = re.compile(r"\.(?P<patient>[^.]+)(?:\.(?P<machine>[^.]+))?\.(?P<pid>\d+)(?:-[0-9a-f]+)?\.tmp")


class Locks:
    """The locks that this process holds in a cache folder, `.<patient>.lock`, kept fresh by a thread.

    Losing a lock to a builder that took it for stale does no harm: both write the same data to files of their own, and
    the last rename wins.
    """

    def __init__(self, folder: Path, *, stale_s: float = STALE_S) -> None:
        self._folder, self._stale_s = folder, stale_s
        self._mine = json.dumps({"machine": this_machine(), "pid": os.getpid(), "started": _started(os.getpid())})
        self._held: set[Path] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def acquire(self, name: str) -> bool:
        """Whether the lock is now ours; a stale one is taken over."""
        path = self._folder / f".{name}.lock"
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                if not self._take_away_if_stale(path):
                    return False
                continue
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(self._mine)
            self._held.add(path)
            return True
        return False

    def holds(self, name: str) -> bool:
        """Whether a lock that was acquired is still ours: a process asleep for long may lose it."""
        return _content(self._folder / f".{name}.lock") == self._mine

    def release(self, name: str) -> None:
        """Give a lock back; nothing happens if it was lost meanwhile."""
        path = self._folder / f".{name}.lock"
        self._held.discard(path)
        if _content(path) == self._mine:
            path.unlink(missing_ok=True)

    @contextmanager
    def holding(self, name: str, *, poll_s: float = 0.05) -> Iterator[None]:
        """Wait for a lock, hold it, give it back."""
        while not self.acquire(name):
            time.sleep(poll_s)
        try:
            yield
        finally:
            self.release(name)

    def close(self) -> None:
        """Give all locks back."""
        self._closed.set()
        self._thread.join()
        for path in list(self._held):
            self.release(path.name[1:].removesuffix(".lock"))

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            for path in list(self._held):
                if _content(path) == self._mine:
                    try:
                        os.utime(path)
                    except FileNotFoundError:
                        continue  # taken over and released between two calls

    def _take_away_if_stale(self, path: Path) -> bool:
        content = _content(path)
        try:
            age_s = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return True
        if not self._stale(content, age_s):
            return False
        # By renaming, which one of several takers does; if it turns out another's new lock, it goes back.
        taken = path.with_name(f"{path.name}.{this_machine()}.{os.getpid()}")
        try:
            os.rename(path, taken)
        except FileNotFoundError:
            return True
        try:
            if _content(taken) != content:
                os.link(taken, path)
                return False
        except OSError:
            return False
        finally:
            taken.unlink(missing_ok=True)
        return True

    def _stale(self, content: str | None, age_s: float) -> bool:
        try:
            holder: dict[str, Any] = json.loads(content or "")
            here, pid, started = holder["machine"] == this_machine(), int(holder["pid"]), holder["started"]
        except (ValueError, KeyError, TypeError):
            return age_s > UNWRITTEN_S
        return age_s > self._stale_s or (here and _started(pid) != started)


def sweep(folder: Path) -> None:
    """Remove temporary files whose writers are dead: of this machine at once, of others after an hour."""
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        try:
            age_s = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue
        dead = _started(int(match["pid"])) is None
        if age_s > 3600 or (dead and match["machine"] == this_machine()):
            path.unlink(missing_ok=True)


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine began, so that a reused pid is not taken for it; None for a dead one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # someone else's, and alive
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""  # no /proc: the pid alone must do
    return None if fields[0] == "Z" else fields[19]
