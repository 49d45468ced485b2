"""Being asked to stop: by a signal or by a file, obeyed between two steps."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar


class StopRequest:
    """Within its `with` block SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C set `reason` instead of killing.

    A second Ctrl-C interrupts at once. Off the main thread only the file works: Python delivers signals there alone.
    """

    obeyed: ClassVar[signal.Signals | None] = None
    """The last signal that any request of this process took, for whoever started the run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop, None to go on."""
        if self.signal is not None:
            return self.signal.name
        return f"file {self.file.name}" if self.file.exists() else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = StopRequest.obeyed = signal.Signals(number)
