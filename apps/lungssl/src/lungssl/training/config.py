"""The `train` section of a recipe. No torch here, so that recipes can be checked quickly."""

from dataclasses import dataclass
from typing import Literal

from lungssl.errors import ConfigError

OnCollapse = Literal["warn", "stop", "rollback"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, optimizer and housekeeping of a run. Optimizer: AdamW. Raises ValueError for impossible values."""

    steps: int = 1000
    """Optimizer steps. A finished run is extended by raising it and `--resume`."""
    batch: int | Literal["auto"] = 4
    """Patients per micro-step, on all ranks together; a step sees batch * accumulate of them, each through both
    slots. "auto" (pretraining): as many as real steps find to fit into half of the free memory, 85 % of a GPU's."""
    accumulate: int = 1
    """Micro-steps per optimizer step."""
    lr: float | Literal["auto"] = 1e-3
    """Learning rate at the end of the warm-up. "auto": the method's published one, scaled to the batch."""
    final_lr: float = 1e-6
    """Learning rate at the last step, reached by a cosine (DINO's value)."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly from 0 (`ssl.md` B.1)."""
    weight_decay: float = 0.04
    """Decoupled weight decay at the first step; none on biases, norms and tokens."""
    final_weight_decay: float = 0.2
    """Weight decay at the last step, reached by a cosine (`ssl.md` B.1)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates (MAE's; the second moment of .95 forgets spikes within 20 steps)."""
    layer_decay: float = 1.0
    """Factor on the learning rate per block away from the output; 1 is off."""
    clip: float = 3.0
    """Largest global gradient norm; 0 is off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast on GPUs, on CPUs with AMX and, without convolutions, with AVX-512's bf16; else fp32."""
    compile: bool = False
    """Whether to `torch.compile` the encoder: minutes at the start, faster steps on a GPU."""
    shard: Literal["none", "full"] = "none"
    """On several processes: `none` keeps all weights on each; `full` shares weights, gradients and moments out (FSDP2),
    for encoders that don't fit. The run is the same, to rounding."""
    recompute: bool = False
    """Whether to keep only what goes into each transformer block and make the rest again in the backward pass: less
    memory for some 20 % more time, and the same numbers. For transformer encoders."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 100
    """Steps between held-out evaluations; there is one before the first step and one after the last."""
    eval_batches: int = 4
    """Held-out batches, the same ones at every evaluation; 0 is off."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one after the last step."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; two, so that a damaged one has a predecessor."""
    on_collapse: OnCollapse = "warn"
    """On an alarm: `warn` says it once a kind; `stop` ends the run; `rollback` goes back to the last checkpoint with
    half the learning rate, at most three times. A step without a number ends the run but for `rollback`."""
    workers: int = 0
    """Processes that read crops; 0: one thread, enough on a CPU."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "accumulate": 1, "log_every": 1, "eval_every": 1, "checkpoint_every": 1}
        least |= {"keep_checkpoints": 1, "eval_batches": 0, "workers": 0, "lr": 0, "final_lr": 0, "clip": 0}
        for name in ("lr", "batch"):
            if getattr(self, name) == "auto":
                del least[name]
        for name, low in least.items():
            if not getattr(self, name) >= low:  # `not >=` also refuses nan
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.lr != "auto" and self.final_lr > self.lr:
            raise ValueError(f"final_lr {self.final_lr} is above lr {self.lr}; set both")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share of the steps in [0, 1), got {self.warmup}")

    def patients(self) -> int:
        """`batch`, which pretraining has found where it was "auto"; ConfigError where nobody did."""
        if self.batch == "auto":
            raise ConfigError("train.batch: auto is for pretraining; give a number of patients here")
        return self.batch

    def rate(self) -> float:
        """The learning rate, which `lungssl.auto_values` has found where it was "auto"."""
        assert self.lr != "auto", "train.lr is still auto; see auto_values.settle"
        return self.lr


RESUME_MAY_CHANGE = frozenset(
    f"train.{name}"
    for name in (
        "steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "workers",
        "compile",
        "shard",
        "recompute",
        "on_collapse",
    )
)
"""Keys that a resumed run may set otherwise than it was started with."""
