"""Command lines of lungssl as jobs: of a SLURM cluster, or in the background of this machine. By submitit."""

import json
import os
import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lungssl.errors import ConfigError

Cluster = Literal["slurm", "local"]
MOST_TIMEOUTS = 1000
"""How often a job that runs out of time is queued again: a week in jobs of ten minutes. submitit's 3 would end it."""
TIMEOUT_MIN = 1440
"""A job's time where none is given: a day, our choice. submitit's own is 5 minutes on SLURM and 2 here (1.5.4), in
which hardly a run begins."""
STOP_SIGNAL = "USR1"
"""What jobs are warned with: `fit` ends its step and writes a checkpoint."""


def submit(
    commands: Sequence[Sequence[str]], *, cluster: Cluster, folder: Path, name: str, parameters: Mapping[str, Any]
) -> list[Any]:
    """Start `lungssl COMMAND` for each, logs in `folder`. Returns submitit's jobs.

    `parameters`: of `submitit.AutoExecutor.update_parameters`, e.g. timeout_min, gpus_per_node, tasks_per_node,
    slurm_partition; without timeout_min it is TIMEOUT_MIN. A job that is preempted or runs out of time is queued again,
    and goes on where it was. Raises ConfigError without submitit, for a cluster that isn't there, for unknown
    parameters, and for a time that isn't in whole minutes.
    """
    submitit, parameters = _submitit(), _timed(parameters)
    options: dict[str, Any] = {f"{cluster}_max_num_timeout": MOST_TIMEOUTS}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **options)
        executor.update_parameters(name=name, **parameters)
    except (RuntimeError, NameError, TypeError, AssertionError) as error:
        raise ConfigError(f"--launcher {cluster}, --job {dict(parameters)}: {error}") from error
    return executor.map_array(CommandJob(), [list(command) for command in commands])


def script(command: Sequence[str], *, folder: Path, name: str, parameters: Mapping[str, Any]) -> str:
    """What would be given to `sbatch`. Raises ConfigError as `submit` does, but needs no cluster."""
    _submitit()
    from submitit.slurm import slurm

    parameters = _timed(parameters)
    try:
        known = slurm.SlurmExecutor._equivalence_dict()
        plain = {key.removeprefix("slurm_"): value for key, value in {"name": name, **parameters}.items()}
        plain = {known.get(key, key): f"{value}GB" if key == "mem_gb" else value for key, value in plain.items()}
        return slurm._make_sbatch_string(command=f"lungssl {shlex.join(command)}", folder=folder, **plain)
    except TypeError as error:
        raise ConfigError(f"--job {dict(parameters)}: {error}") from error


def hand_in(
    command: Sequence[str], *, cluster: Cluster, out: Path, wishes: Sequence[str], show_script: bool = False
) -> str:
    """Start `lungssl COMMAND`, whose run folder is `out`, as a job with the `wishes` of `--job`; returns what to print.

    With `show_script` nothing is started, and SLURM's script is returned.
    """
    folder, name = out.resolve().with_name(f"{out.name}-jobs"), f"lungssl-{out.name}"
    parameters = job_parameters(wishes)
    if show_script:
        return script(command, folder=folder, name=name, parameters=parameters)
    (one,) = submit([command], cluster=cluster, folder=folder, name=name, parameters=parameters)
    return f"job {one.job_id}; what it says is in {folder}, and `lungssl watch {out}` follows it"


def check_launcher(
    launcher: Literal["here", "local", "slurm"], *, job: Sequence[str] | None, show_script: bool, run: bool
) -> None:
    """ConfigError for options that don't go with a launcher; `run`: a run folder is to be made."""
    if launcher == "here" and (job or show_script):
        raise ConfigError("--job and --print are of jobs: add --launcher local or slurm")
    if launcher != "here" and not run:
        raise ConfigError(f"--launcher {launcher} is for runs with --out: leave --dry-run and --replay out")
    if show_script and launcher != "slurm":
        raise ConfigError(f"--print shows SLURM's script; --launcher {launcher} has none")


def _timed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """With a time. submitit reckons with it whether to queue a job again, so that SLURM's own forms won't do."""
    if "slurm_time" in parameters:
        raise ConfigError(
            f"--job slurm_time={parameters['slurm_time']}: submitit counts minutes; say --job timeout_min=MINUTES"
        )
    timed = {"timeout_min": TIMEOUT_MIN, **parameters}
    for name, given in timed.items():
        if name.endswith("timeout_min") and (type(given) is not int or given < 1):
            raise ConfigError(f"--job {name}={given}: expected whole minutes, at least 1, e.g. --job {name}=480")
    return timed


def _submitit() -> Any:
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = STOP_SIGNAL  # read when it is imported; jobs inherit it
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigError("--launcher needs submitit: pip install 'lungssl[slurm]', or start jobs by hand") from error
    return submitit


class CommandJob:
    """A command line of lungssl, as a job that may be queued again; each of a job's tasks is a rank of one run."""

    def __call__(self, command: list[str]) -> None:
        """Raises RuntimeError where the command fails, so that the job counts as failed."""
        import submitit

        from lungssl.cli import main

        if submitit.JobEnvironment().num_tasks > 1:
            # Each rank picks its GPU by its local rank, of those that all of them see.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        from lungssl.training.stop import StopRequest

        StopRequest.obeyed = None
        code = main(command)
        if StopRequest.obeyed == signal.Signals[f"SIG{STOP_SIGNAL}"]:
            # Training took the signal and wrote its checkpoint; now it is submitit's, which queues the job again.
            signal.raise_signal(StopRequest.obeyed)
        if code:
            raise RuntimeError(f"lungssl {shlex.join(command)} ended with exit code {code}")

    def checkpoint(self, command: list[str]) -> Any:
        """What is queued when the job is preempted: the same command, which goes on where it was."""
        from submitit.helpers import DelayedSubmission

        training = command[0] in ("pretrain", "finetune")
        more = ["--resume"] if training and "--resume" not in command and _run_folder(command).is_dir() else []
        return DelayedSubmission(self, [word for word in command if word != "--overwrite" or not more] + more)


def job_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts; whole numbers, decimals, true and false are these, all else is text, as 10:00:00 and 0123.

    Raises ConfigError for a text without `=`.
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--job {pair}: expected KEY=VALUE, e.g. --job timeout_min=600 --job slurm_partition=gpu")
        found[key] = json.loads(value) if re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?|true|false", value) else value
    return found


def _run_folder(command: Sequence[str]) -> Path:
    return Path(command[list(command).index("--out") + 1])
