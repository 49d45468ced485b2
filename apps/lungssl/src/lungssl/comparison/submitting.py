"""Shards of a comparison as jobs: of a SLURM cluster, or in the background of this machine. By submitit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from lungssl.errors import ConfigError

Cluster = Literal["slurm", "local"]


def submit(
    arguments: Sequence[str], *, shards: int, cluster: Cluster, folder: Path, parameters: Mapping[str, Any]
) -> list[Any]:
    """Start `lungssl ARGUMENTS --shard i/shards` for every i, logs in `folder`. Returns submitit's jobs.

    `parameters`: of `submitit.AutoExecutor.update_parameters`, e.g. timeout_min, gpus_per_node, slurm_partition. A job
    that is preempted or runs out of time is queued again, and goes on where it was. Raises ConfigError without
    submitit, for a cluster that isn't there, and for unknown parameters.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigError("--launcher needs submitit: pip install 'lungssl[slurm]', or take --shard by hand") from error
    if shards < 1:
        raise ConfigError(f"--shards {shards}: expected 1 or more, as many as jobs may run at once")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(name="lungssl-compare", **parameters)
    except (RuntimeError, NameError, TypeError, AssertionError) as error:
        raise ConfigError(f"--launcher {cluster}, --job {dict(parameters)}: {error}") from error
    return executor.map_array(ShardJob(), [[*arguments, "--shard", f"{i}/{shards}"] for i in range(1, shards + 1)])


class ShardJob:
    """A command line of lungssl, as a job that may be queued again."""

    def __call__(self, arguments: list[str]) -> None:
        """Raises RuntimeError where the command fails, so that the job counts as failed."""
        from lungssl.cli import main

        if code := main(arguments):
            raise RuntimeError(f"lungssl {' '.join(arguments)} ended with exit code {code}")

    def checkpoint(self, arguments: list[str]) -> Any:
        """What submitit queues when a job is preempted: the same command, which goes on where it was."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, arguments)


def job_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts, values as in YAML. Raises ConfigError for a text without `=`."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--job {pair}: expected KEY=VALUE, e.g. --job timeout_min=600 --job slurm_partition=gpu")
        found[key] = yaml.safe_load(value)
    return found
