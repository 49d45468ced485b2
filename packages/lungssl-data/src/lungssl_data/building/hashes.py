"""Content hashes of source files, remembered, so that a rerun over terabytes reads only what changed."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

SETTLED_S = 2.0
"""A file changed less than this before it was hashed is hashed again next time: FAT counts time in steps of 2 s, and a
later change within one step would leave no trace."""


class HashStore:
    """SHA-256 of groups of files, kept in `<folder>/.hashes.jsonl` by what the file system says of them.

    A remembered hash is taken only where size, inode, and time of change of content (mtime) and of anything (ctime),
    both in ns, agree for every file; paths play no part and are not written. Any number of processes may append.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".hashes.jsonl"
        self._known: dict[str, str] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["stamp"]] = entry["sha256"]
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash: that group is read again

    def of(self, files: Sequence[Path]) -> str:
        """Hash over the contents of the files, in their order."""
        stamp, newest = _stamp(files)
        if stamp not in self._known:
            started = time.time()
            digest = hashlib.sha256()
            for file in files:
                with open(file, "rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
            self._known[stamp] = digest.hexdigest()
            if started - newest > SETTLED_S and _stamp(files)[0] == stamp:
                line = json.dumps({"stamp": stamp, "sha256": self._known[stamp]}) + "\n"
                append(self._path, line)
            else:
                return self._known.pop(stamp)
        return self._known[stamp]


def append(path: Path, line: str) -> None:
    """Add a line in one write, whole among those of other processes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _stamp(files: Sequence[Path]) -> tuple[str, float]:
    """What the file system says of the files, hashed, and when the last of them changed."""
    stats = [file.stat() for file in files]
    text = json.dumps([[s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in stats])
    return hashlib.sha256(text.encode()).hexdigest(), max((max(s.st_mtime, s.st_ctime) for s in stats), default=0.0)
