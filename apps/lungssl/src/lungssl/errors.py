"""What can go wrong, and the exit code and the one line that a user gets for it."""

import difflib
import errno
from collections.abc import Iterable

OK, FAILED, USAGE, BAD_DATA, OUT_OF_MEMORY, INTERRUPTED = 0, 1, 2, 3, 4, 130


class ConfigError(ValueError):
    """A recipe, an override or an option that cannot be used. Exit code 2."""


class DataError(ValueError):
    """Data that is missing, damaged or of the wrong kind. Exit code 3."""


class TrainingError(RuntimeError):
    """Training cannot go on, e.g. a loss that is not a number. Exit code 1."""


class OtherRankError(RuntimeError):
    """The first rank of a distributed run failed, and says why itself. Exit code 1."""


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an error; never a traceback or a local variable."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if out_of_memory(error):
        return OUT_OF_MEMORY, (
            f"out of memory ({text[:120]}); lower train.batch (and raise train.accumulate) or let "
            f"train.batch=auto find it, set train.recompute=true with a transformer, then lower data.crop_vox and "
            f"views.*, then take a smaller backbone"
        )
    if isinstance(error, ConfigError):
        return USAGE, text
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return FAILED, f"disk full ({text}); make room. A run goes on from its newest checkpoint with --resume"
    if isinstance(error, OtherRankError):
        return FAILED, f"ended with the first rank ({text})"
    if _rank_gone(error):
        return FAILED, (
            f"another rank has gone ({text[:120]}); what it said is in its own output. The newest checkpoint stays: "
            f"start again with --resume"
        )
    # The data package has its own ValueErrors, this app must not import it (and torch) to name them.
    if isinstance(error, DataError | OSError) or any(
        c.__module__.startswith("lungssl_data") for c in type(error).__mro__
    ):
        return BAD_DATA, text
    if isinstance(error, ValueError):
        return USAGE, text
    if isinstance(error, TrainingError):
        return FAILED, text
    return FAILED, f"{type(error).__name__}: {text} (a bug in lungssl? --debug shows where)"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of the CPU or of an accelerator."""
    # torch.OutOfMemoryError on accelerators; torch's CPU allocator raises a bare RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something close is known, else the list of all."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _rank_gone(error: BaseException) -> bool:
    # gloo raises a bare RuntimeError with its source file in it, NCCL a DistBackendError.
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or type(error).__name__.startswith("Dist"))
