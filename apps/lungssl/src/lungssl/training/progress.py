"""Progress of a run: an updating line on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping

_PLAIN_EVERY_S = 10.0
_TERMINAL_EVERY_S = 0.2
_SHOWN = ("loss", "teacher_entropy_lnk", "dice", "lr")


class Progress:
    """Prints step, loss, teacher entropy in units of ln K, learning rate, rate, time left and data-wait share.

    `say` prints a line and keeps it; `note` only keeps it, for what a terminal shows in place.
    """

    def __init__(
        self,
        steps: int,
        done: int,
        *,
        say: Callable[[str], None],
        note: Callable[[str], None],
        terminal: bool | None = None,
    ) -> None:
        """`terminal`: whether to show an updating line on stderr; None asks it."""
        self.steps = steps
        self._say, self._note = say, note
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._started: float | None = None
        self._printed = self._noted = 0.0
        self._first = done
        self._wait_s = 0.0

    def update(self, done: int, values: Mapping[str, float], wait_s: float) -> None:
        """To be called after every step with the seconds that it waited for data; prints when it is time to."""
        now = time.perf_counter()
        if self._started is None:  # the first step starts the clock: it opens files and compiles, and is not counted
            self._started = self._noted = now
            self._first = done
        else:
            self._wait_s += wait_s
        last = done >= self.steps
        keep = last or now - self._noted >= _PLAIN_EVERY_S
        show = self._terminal and (last or now - self._printed >= _TERMINAL_EVERY_S)
        if not keep and not show:
            return
        line = self.line(done, values, elapsed_s=now - self._started)
        if show:
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
            self._printed = now
        if keep:
            (self._note if self._terminal else self._say)(line)
            self._noted = now

    def interrupt(self, text: str) -> None:
        """Print a line of its own between updates."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr)
        self._say(text)

    def line(self, done: int, values: Mapping[str, float], *, elapsed_s: float) -> str:
        """The text of a line, `elapsed_s` after the first step of this process."""
        rate = (done - self._first) / max(elapsed_s, 1e-9)
        waiting = self._wait_s / max(elapsed_s, 1e-9)
        parts = [f"step {done}/{self.steps}", shown(values)]
        parts.append(f"{rate:.2f} steps/s, {duration((self.steps - done) / rate)} left" if rate > 0 else "starting")
        parts.append(f"data wait {waiting:.0%}")
        if waiting > 0.3:  # a third of the machine idle is worth a word
            parts.append("(raise train.workers)")
        return "  ".join(parts)


def shown(values: Mapping[str, float]) -> str:
    """The few figures that a person watches."""
    return "  ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
