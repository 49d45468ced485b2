"""Fine-tuning for registration and segmentation at once: pairs, some of them labelled, the same loop as pretraining."""

from pathlib import Path
from typing import Any

from lungssl_tasks.aeration.parts import LOBE_NAMES
from lungssl_tasks.joint.task import JointTask
from lungssl_tasks.model_folder import save_joint

from lungssl.config import Recipe
from lungssl.errors import DataError
from lungssl.finetuning import Labels
from lungssl.finetuning_registration import build, paired, train
from lungssl.joint_scoring import score_joint, stitches, summary_of
from lungssl.training.run_folder import RunFolder


def finetune_joint(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    encoder: Path | None,
    labels: Labels,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train, judge on whole validation pairs, export `export/model`; returns what summary.json holds.

    All training pairs are seen; `labels` says whose lobes are. `summary["whole_pairs"]` has the scores of the
    validation patients, `summary["cross_stitch"]` what networks took from each other.
    Raises ConfigError, the data package's errors, and what `fit` raises.
    """
    parts = build(recipe, data, name="joint", encoder=encoder, labels=labels, device=device)

    def export(run: RunFolder, summary: dict[str, Any]) -> None:
        assert isinstance(parts.task, JointTask)
        model = parts.task.model
        if model.stitch:
            summary["cross_stitch"] = stitches(model)
        if judged := paired(parts.cache, "val"):
            try:
                scores = score_joint(model, parts.cache, judged, names=LOBE_NAMES, device=parts.device, say=run.say)
                summary["whole_pairs"] = summary_of(scores)
            except DataError as error:  # what was trained is kept all the same
                run.say(f"WARNING: val patients can't be judged: {error}")
        save_joint(run.export / "model", model, labels=LOBE_NAMES, extra=summary)
        run.say(f"model: {run.export / 'model'}; score it with `lungssl evaluate --model {out}`")

    return train(parts, out, encoder=encoder, labels=labels, resume=resume, overwrite=overwrite, export=export)
