"""A folder that others can use: weights, config and a model card, laid out as model hubs expect it.

model.safetensors   the encoder, as `weights.save_encoder` writes it
config.json         backbone, config, spacing_mm, input: for programs that do not open safetensors
README.md           the card
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import nn

from lungssl_backbones.encoder import Encoder
from lungssl_backbones.export import INPUT
from lungssl_backbones.weights import load_encoder, save_encoder

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a reader must know before using weights. Every field is one paragraph of text."""

    title: str
    """A name people can cite."""
    method: str
    """How it was trained: method, steps, what the loss saw."""
    data: str
    """On which scans: source, number of patients and scans, how the held-out ones were chosen."""
    licence: str
    """SPDX identifier of the weights' licence, e.g. "cc-by-4.0"."""
    intended_use: str = (
        "Research use only. Features for lung CT: segmentation, registration, quantification of paired inhale-exhale "
        "scans. Not a medical device; not for diagnosis or treatment."
    )
    """What it is for, and what not."""
    limitations: str = "Not evaluated outside the data named here."
    """Where it is known or likely to fail."""
    citation: str = ""
    """How to cite it; the section is left out where empty."""
    tags: Sequence[str] = ("chest-ct", "self-supervised", "3d", "medical")
    """For search."""


def save_pretrained(encoder: nn.Module, folder: Path, card: ModelCard, *, overwrite: bool = False) -> None:
    """Write the encoder and its card to a folder, made if needed.

    Raises ValueError for a card with an empty paragraph, or where the folder holds anything and not `overwrite`; then
    nothing is written.
    """
    for field in fields(card):
        if field.name != "citation" and not getattr(card, field.name):
            raise ValueError(f"the model card's {field.name} is empty; say it, or that it is not known")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} is not empty; name another folder, or pass overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(encoder, folder / WEIGHTS, extra={"title": card.title, "licence": card.licence})
    assert isinstance(encoder, Encoder)
    config = {"backbone": encoder.name, "config": asdict(encoder.config), "spacing_mm": encoder.spacing_mm}
    (folder / CONFIG).write_text(json.dumps({**config, "input": INPUT}, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card_text(encoder, card), encoding="utf-8")


def from_pretrained(folder: Path) -> nn.Module:
    """The encoder of a folder that `save_pretrained` wrote, on the CPU, in training mode. Raises as `load_encoder`."""
    return load_encoder(folder / WEIGHTS)


def card_text(encoder: nn.Module, card: ModelCard) -> str:
    """The card as Markdown, its first lines the YAML that model hubs index."""
    assert isinstance(encoder, Encoder)
    parameters = sum(p.numel() for p in encoder.parameters()) / 1e6
    # A JSON string is a YAML string, whatever it holds.
    header = ["---", f"license: {json.dumps(card.licence)}", "library_name: lungssl", "tags:"]
    header += [f"- {json.dumps(tag)}" for tag in card.tags] + ["---"]
    sections = {
        "Intended use": card.intended_use,
        "Method": card.method,
        "Data": card.data,
        "Limitations": card.limitations,
        "Architecture": (
            f"`{encoder.name}`, {parameters:.1f} million parameters; tokens of {encoder.token_stride_vox} voxels; made "
            f"for voxels of {encoder.spacing_mm} mm. Input: {INPUT}."
        ),
        "Licence": card.licence,
        "Citation": card.citation,
    }
    body = [f"# {card.title}"]
    for heading, text in sections.items():
        if text:
            body += ["", f"## {heading}", text]
    usage = (
        "from pathlib import Path",
        "from lungssl_backbones.folder import from_pretrained",
        "",
        'encoder = from_pretrained(Path("this_folder")).eval()',
    )
    return "\n".join([*header, *body, "", "## Use", "```python", *usage, "```", ""])
