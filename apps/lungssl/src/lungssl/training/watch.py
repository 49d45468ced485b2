"""What the loop does where a run goes wrong: alarms of the collapse monitor, and steps that gave no number.

A step without a number is kept in the run folder before anything else happens: `nan/step_<n>.safetensors` holds the
module's state as it was before that step. What the step read and drew follows from the seed and its index, so nothing
of any scan is stored, and `lungssl pretrain ... --replay FILE` repeats it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lungssl_methods.collapse import Alarm, CollapseMonitor
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lungssl.errors import DataError, TrainingError
from lungssl.training.config import OnCollapse

RATE_AFTER_ROLLBACK = 0.5
"""Factor on the learning rate at each return to a checkpoint. Not measured."""
MOST_ROLLBACKS = 3
"""Returns in one process before it gives up: the rate is then an eighth."""


class NotFiniteError(TrainingError):
    """A loss or gradient norm that is no number."""

    def __init__(self, what: str, value: float, *, step: int, index: int) -> None:
        super().__init__(
            f"{what} is {value} at step {step + 1}; the weights of that step were discarded, earlier checkpoints stay. "
            f"Lower train.lr or raise train.warmup, or try train.precision=fp32"
        )
        self.what, self.value, self.step, self.index = what, value, step, index
        self.kept: Path | None = None
        """The file that replays it."""


class RollbackError(TrainingError):
    """To be answered by going back to a checkpoint; the alarm is its text."""


class Watch:
    """A monitor and a policy: says, stops, or asks the loop to go back."""

    def __init__(
        self, policy: OnCollapse, *, say: Callable[[str], None], bounds: CollapseMonitor.Config | None = None
    ) -> None:
        """`bounds`: those of the monitor, its defaults where not given."""
        self.policy = policy
        self.rate_scale = 1.0
        """Factor on all learning rates."""
        self.returns: list[str] = []
        """Why and to where the run went back, in order."""
        self._say = say
        self._monitor = (bounds or CollapseMonitor.Config()).build()

    @property
    def alarms(self) -> list[Alarm]:
        """The first of each kind."""
        return self._monitor.alarms

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Look at a step's metrics. Raises TrainingError or RollbackError, by the policy."""
        self._answer(lambda: self._monitor.step(step, values))

    def probe(self, step: int, figures: Mapping[str, float]) -> None:
        """Look at a probe set's figures; raises as `step`."""
        self._answer(lambda: self._monitor.probe(step, figures))

    def state(self) -> dict[str, Any]:
        """All that decides the next alarm, as plain values for a checkpoint."""
        return {"rate_scale": self.rate_scale, "returns": self.returns, "monitor": self._monitor.state()}

    def load(self, state: Mapping[str, Any], *, returned: bool = False) -> None:
        """Continue from `state`; an empty one, of a checkpoint without, changes nothing.

        `returned`: the run went back to that checkpoint, which knows neither the lowered rate nor the reason.
        """
        if state:
            self._monitor.load(state["monitor"])
            if not returned:
                self.rate_scale = state["rate_scale"]
                self.returns = list(state.get("returns", []))

    def _answer(self, look: Callable[[], Alarm | None]) -> None:
        known = {alarm.kind for alarm in self.alarms}
        alarm = look()
        if alarm is None or (self.policy == "warn" and alarm.kind in known):
            return
        if self.policy == "warn":
            self._say(f"WARNING: {alarm.sentence}; see train.on_collapse")
        elif self.policy == "stop":
            raise TrainingError(
                f"{alarm.sentence}; stopped, as train.on_collapse is stop. Lower train.lr, or go on past it with "
                f"--resume train.on_collapse=warn: from the newest checkpoint, which is of before, or from step 0 "
                f"without one"
            )
        else:
            raise RollbackError(alarm.sentence)


@dataclass(frozen=True, kw_only=True)
class KeptStep:
    """A step that gave no number, as `keep_step` wrote it."""

    step: int
    """Optimizer steps done before it."""
    index: int
    """The micro-batch at which it showed."""
    what: str
    value: str
    state: dict[str, Tensor]
    """The module's state before the step."""


def keep_step(folder: Path, error: NotFiniteError, state: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Path:
    """Write what replays a failed step: the module's `state`, but for `buffers`, copies from before it; parameters
    move only with the optimizer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{error.step + 1}.safetensors"
    state = {name: buffers.get(name, value) for name, value in state.items()}
    about = {"step": str(error.step), "index": str(error.index), "what": error.what, "value": str(error.value)}
    # clone: safetensors refuses tensors that share memory, as tied weights do.
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, path, metadata=about)
    return path


def read_step(path: Path) -> KeptStep:
    """What `keep_step` wrote. Raises DataError for another file."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
        return KeptStep(
            step=int(about["step"]), index=int(about["index"]), what=about["what"], value=about["value"], state=state
        )
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise DataError(
            f"--replay {path}: not a step that a run kept ({type(error).__name__}); such files are in <run>/nan"
        ) from error


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers: centres and moments, small beside the weights."""
    return {name: value.detach().clone() for name, value in module.named_buffers()}


def first_bad_modules(module: nn.Module) -> tuple[list[str], list[Any]]:
    """Hooks that note, in the order of the forward pass, modules that made of numbers what is none.

    Returns the list that fills, and the handles to remove.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if not _finite(output) and _finite(inputs):
                found.append(name)

        return hook

    return found, [one.register_forward_hook(look(name or "(the method)")) for name, one in module.named_modules()]


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, tuple | list):
        return all(_finite(item) for item in value)
    if isinstance(value, dict):
        return all(_finite(item) for item in value.values())
    if hasattr(value, "__dataclass_fields__"):
        return all(_finite(getattr(value, name)) for name in value.__dataclass_fields__)
    return True
