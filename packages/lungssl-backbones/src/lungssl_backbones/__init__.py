"""3-D encoders for chest CT: one protocol, a plain registry, safe weight files.

Listing names and reading this registry imports no torch; `create_backbone` does.
"""

import difflib
import importlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_VIT = "lungssl_backbones.vit3d:Vit3d"
_RESENC = "lungssl_backbones.resenc:ResEnc"
_RESENC_DKFZ = "lungssl_backbones.resenc_dkfz:ResEncDkfz"
_PRIMUS = "lungssl_backbones.primus:Primus"
_SWIN = "lungssl_backbones.swin_unetr:SwinUnetr"
_CONVNEXT = "lungssl_backbones.convnext3d:ConvNext3d"
_TIMM = "lungssl_backbones.timm3d:Timm3d"

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit3d_nano": (_VIT, {"dim": 128, "depth": 4, "heads": 4}),
    "vit3d_ti": (_VIT, {"dim": 192, "depth": 12, "heads": 3}),
    "vit3d_s": (_VIT, {"dim": 384, "depth": 12, "heads": 6, "drop_path": 0.1}),
    "vit3d_b": (_VIT, {"dim": 768, "depth": 12, "heads": 12, "drop_path": 0.1}),
    # LayerScale: CaiT's value for 24 blocks; drop path: DINOv2's for ViT-L.
    "vit3d_l": (_VIT, {"dim": 1024, "depth": 24, "heads": 16, "drop_path": 0.3, "layer_scale": 1e-5}),
    "resenc_tiny": (_RESENC, {"widths": (8, 32, 64, 128), "depths": (1, 1, 1, 1)}),
    "resenc_b": (_RESENC, {"widths": (32, 64, 128, 256, 320), "depths": (1, 2, 2, 2, 2)}),
    "resenc_l": (_RESENC_DKFZ, {}),
    # Ours; the other four are the paper's.
    "primus_ti": (_PRIMUS, {"dim": 198, "depth": 12, "heads": 3}),
    "primus_s": (_PRIMUS, {"dim": 396, "depth": 12, "heads": 6}),
    "primus_b": (_PRIMUS, {"dim": 792, "depth": 12, "heads": 12}),
    "primus_m": (_PRIMUS, {"dim": 864, "depth": 16, "heads": 12}),
    "primus_l": (_PRIMUS, {"dim": 1056, "depth": 24, "heads": 16}),
    "swin_unetr_s": (_SWIN, {"feature_size": 24}),
    "swin_unetr_b": (_SWIN, {"feature_size": 48}),
    "convnext3d_atto": (_CONVNEXT, {"widths": (40, 80, 160, 320), "depths": (2, 2, 6, 2)}),
    "convnext3d_t": (_CONVNEXT, {"widths": (96, 192, 384, 768), "depths": (3, 3, 9, 3)}),
    "convnext3d_s": (_CONVNEXT, {"widths": (96, 192, 384, 768), "depths": (3, 3, 27, 3), "drop_path": 0.3}),
    "convnext3d_b": (_CONVNEXT, {"widths": (128, 256, 512, 1024), "depths": (3, 3, 27, 3), "drop_path": 0.4}),
    "timm3d": (_TIMM, {}),
}
"""Name -> (module:Class, the values in which this size differs from `Class.Config`'s defaults)."""


def list_backbones() -> list[str]:
    """Names that `create_backbone` knows."""
    return list(BACKBONES)


def backbone_config(name: str) -> tuple[type, dict[str, Any]]:
    """The Config class behind a name and this size's values: `{**values, **yours}` is what to validate and build.

    Raises ValueError for an unknown name.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}{_did_you_mean(name, list(BACKBONES))}")
    target, values = BACKBONES[name]
    module, _, cls = target.partition(":")
    return getattr(importlib.import_module(module), cls).Config, dict(values)


def create_backbone(name: str, **overrides: Any) -> "torch.nn.Module":
    """Build a randomly initialised encoder (see `encoder.Encoder`), e.g. `create_backbone("vit3d_s", patch_vox=16)`.

    Raises ValueError for an unknown name or option.
    """
    config, values = backbone_config(name)
    options = [field.name for field in fields(config)]
    for option in overrides:
        if option not in options:
            raise ValueError(f"{name} has no option {option!r}{_did_you_mean(option, options)}")
    encoder = config(**{**values, **overrides}).build()
    encoder.name = name
    return encoder


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
