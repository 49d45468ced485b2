"""Tensors that ranks share, in one file of each rank, by torch.distributed.checkpoint.

    shard-<rank>-model-*.safetensors   this rank's parts; where in its tensor a part starts is in the file's metadata

torch's own storage would pickle; its writer of Hugging Face's files does not. Readers take any number of ranks.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lungssl.training.sharding import is_shared_out


def write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every rank's parts, synced; what all hold is written once. For all ranks.

    Raises OSError, on all of them, where one can't write.
    """
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        reasons = [f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items())]
        raise OSError("; ".join(reasons)) from error


def read_parts(folder: Path, prefix: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it, each laid out as in `like`, else whole on the CPU.

    Raises RuntimeError where one has another shape in `like`.
    """
    reader = HuggingFaceStorageReader(str(folder))
    found: dict[str, Tensor] = {}
    for key, about in reader.read_metadata().state_dict_metadata.items():
        if not key.startswith(prefix):
            continue
        assert isinstance(about, TensorStorageMetadata)
        layout = like.get(key.removeprefix(prefix))
        if layout is not None and layout.shape != about.size:
            raise RuntimeError(f"{key}: {tuple(about.size)} in the checkpoint, {tuple(layout.shape)} in the model")
        if is_shared_out(layout):
            found[key] = torch.zeros_like(layout, dtype=about.properties.dtype, requires_grad=False)
        else:
            found[key] = torch.empty(about.size, dtype=about.properties.dtype)
    with warnings.catch_warnings():  # torch says that it reads alone, as is wanted: each rank looks for its own
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(found, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): value for key, value in found.items()}
