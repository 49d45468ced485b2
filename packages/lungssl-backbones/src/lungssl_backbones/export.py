"""Encoders for other programs: nnU-Net's fine-tuning from nnssl checkpoints, MONAI, torch.export.

The nnssl checkpoint is a .pth that `torch.load(..., weights_only=True)` reads:

    network_weights          the network's state dict under dynamic-network-architectures' names
    nnssl_adaptation_plan
      architecture_plans     arch_class_name, arch_kwargs, arch_kwargs_requiring_import
      pretrain_plan          nnssl's plan; nnU-Net reads `spacing` and `patch_size` of its first configuration
      pretrain_num_input_channels, recommended_downstream_patchsize
      key_to_encoder, key_to_stem, keys_to_in_proj, key_to_lpe
    citations                list of strings, which nnU-Net logs
    lungssl                  what the plan has no place for: the encoder's name and config, the input's scale

Source: `nnssl/adaptation_planning/adaptation_plan.py` of MIC-DKFZ/nnssl, and the code of nnU-Net that reads it
(`preprocess_like_nnssl`, `PretrainedTrainer`).
**nnU-Net z-scores the images that it fine-tunes on, whatever the plan says**; our encoders are trained on a fixed HU
window. The first InstanceNorm of `resenc_l` takes the difference away; Primus has to learn it.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lungssl_backbones.encoder import Encoder, Features, token_grid
from lungssl_backbones.names import with_aliases
from lungssl_backbones.primus import Primus
from lungssl_backbones.resenc_dkfz import ResEncDkfz
from lungssl_backbones.swin_unetr import SwinUnetr

INPUT = "HU clipped to [-1000, 400], scaled to [0, 1]"

_PRIMUS_NAMES = {(396, 12, 6): "PrimusS", (792, 12, 12): "PrimusB", (864, 16, 12): "PrimusM", (1056, 24, 16): "PrimusL"}
"""(dim, depth, heads) of the sizes that nnssl and nnU-Net build by name, all with patches of 8 voxels."""


def peer_state_dict(encoder: nn.Module) -> dict[str, Tensor]:
    """Weights under the names of the network that the encoder is compatible with, on the CPU.

    `resenc_l`: `encoder.*` of dynamic-network-architectures' ResidualEncoderUNet, tensors of two names under both.
    Primus: `eva.*` and `down_projection.*` of its Primus. SwinUnetr: `swinViT.*` of MONAI's SwinUNETR. Load them with
    `strict=False`: the decoder is not ours. The learned value of masked voxels, which they lack, is left out.

    Raises ValueError for an encoder that no other library has.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    state.pop("mask_value", None)
    if isinstance(encoder, ResEncDkfz):
        return with_aliases({f"encoder.{name}": tensor for name, tensor in state.items()})
    if isinstance(encoder, (Primus, SwinUnetr)):
        return state
    raise ValueError(
        f"no other library has the network of {type(encoder).__name__}; resenc_l, primus_* and swin_unetr_* have "
        "peers, and save_encoder writes any encoder"
    )


def save_nnssl(
    encoder: nn.Module, path: Path, *, crop_vox: tuple[int, int, int], citations: Sequence[str] = ()
) -> None:
    """Write `resenc_l` or a Primus as an nnssl checkpoint (module docstring), atomically.

    `crop_vox`: (z, y, x) of the crops that it was trained on, also recommended for fine-tuning.
    Raises ValueError for another suffix than .pth, an encoder or size that nnssl does not build, or a crop that does
    not fit it.
    """
    if path.suffix != ".pth":
        raise ValueError(f"{path}: nnU-Net looks for nnssl checkpoints in .pth files; name it {path.stem}.pth")
    plan = adaptation_plan(encoder, crop_vox=crop_vox)
    assert isinstance(encoder, Encoder)
    checkpoint = {
        "network_weights": peer_state_dict(encoder),
        "nnssl_adaptation_plan": plan,
        "citations": list(citations),
        "lungssl": {"backbone": encoder.name, "config": _plain(asdict(encoder.config)), "input": INPUT},
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(checkpoint, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def adaptation_plan(encoder: nn.Module, *, crop_vox: tuple[int, int, int]) -> dict[str, Any]:
    """nnssl's adaptation plan, of plain values. Raises ValueError as `save_nnssl`."""
    if isinstance(encoder, ResEncDkfz):
        architecture = _resenc_architecture(encoder)
        keys = {
            "key_to_encoder": "encoder.stages",
            "key_to_stem": "encoder.stem",
            "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
            "key_to_lpe": None,
        }
    elif isinstance(encoder, Primus):
        architecture = _primus_architecture(encoder)
        if crop_vox != encoder.config.crop_vox:
            raise ValueError(
                f"the positions of this encoder are those of crops of {encoder.config.crop_vox}, not {crop_vox}; build "
                "one with that crop_vox and load the weights with load_pretrained"
            )
        keys = {
            "key_to_encoder": "eva",
            "key_to_stem": "down_projection",
            "keys_to_in_proj": ["down_projection.proj"],
            "key_to_lpe": "eva.pos_embed",
        }
    else:
        raise ValueError(f"nnssl has no {type(encoder).__name__}; resenc_l and primus_s, b, m and l can be exported")
    token_grid(crop_vox, encoder.token_stride_vox)
    return {
        "architecture_plans": architecture,
        "pretrain_plan": _pretrain_plan(encoder.spacing_mm, crop_vox),
        "pretrain_num_input_channels": encoder.config.in_channels,
        "recommended_downstream_patchsize": list(crop_vox),
        **keys,
    }


def save_program(encoder: nn.Module, path: Path, *, crop_vox: tuple[int, int, int]) -> None:
    """Write a `torch.export` program (.pt2) that needs torch but not this package, for crops of one size.

    `torch.export.load(path).module()(ct)` maps [b, c, z, y, x] of any batch to a tuple: the embedding [b, d], the
    tokens [b, n, d], then the pyramid from fine to coarse. Raises ValueError for another suffix or a crop that does not
    fit.
    """
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: a program is a .pt2 file; name it {path.stem}.pt2")
    assert isinstance(encoder, Encoder)
    token_grid(crop_vox, encoder.token_stride_vox)
    # Two crops: torch.export takes a batch of one for a constant.
    example = torch.zeros(2, encoder.config.in_channels, *crop_vox, device=next(encoder.parameters()).device)
    training = encoder.training
    try:
        program = torch.export.export(
            _Tuple(encoder).eval(), (example,), dynamic_shapes={"ct": {0: torch.export.Dim("batch")}}
        )
    finally:
        encoder.train(training)
    torch.export.save(program, path)


class _Tuple(nn.Module):
    """An encoder whose output is tensors only."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ct: Tensor) -> tuple[Tensor, ...]:
        features: Features = self.encoder(ct)
        return (features.embedding(), features.tokens, *features.pyramid)


def _resenc_architecture(encoder: ResEncDkfz) -> dict[str, Any]:
    config = encoder.config
    if (config.widths, config.depths) == (ResEncDkfz.Config().widths, ResEncDkfz.Config().depths):
        return {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    stages = len(config.widths)
    return {
        "arch_class_name": "ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(config.widths),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_blocks_per_stage": list(config.depths),
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.modules.activation.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin"],
    }


def _primus_architecture(encoder: Primus) -> dict[str, Any]:
    config = encoder.config
    name = _PRIMUS_NAMES.get((config.dim, config.depth, config.heads))
    if name is None or config.patch_vox != 8 or config.registers:
        raise ValueError(
            f"nnssl builds primus_s, b, m and l with patches of 8 voxels and no registers, not {config.dim} wide, "
            f"{config.depth} deep, {config.heads} heads, patches of {config.patch_vox}, {config.registers} registers"
        )
    return {"arch_class_name": name, "arch_kwargs": None, "arch_kwargs_requiring_import": None}


def _pretrain_plan(spacing_mm: float, crop_vox: tuple[int, int, int]) -> dict[str, Any]:
    isotropic = [spacing_mm] * 3
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "lungssl",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "onemmiso" if spacing_mm == 1 else "median",
        "normalization_schemes": ["NoNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {**resampling, "is_seg": True, "order": 1},
        "spacing": isotropic,
        "patch_size": list(crop_vox),
    }
    return {
        "dataset_name": "lungssl",
        "plans_name": "lungssl",
        "original_median_spacing_after_transp": isotropic,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {configuration["spacing_style"]: configuration},
        "experiment_planner_used": "lungssl",
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
