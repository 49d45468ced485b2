"""`lungssl evaluate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    model: Annotated[Path, typer.Option(help="A fine-tuning run or its export/model.")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, summary.json and table.txt.")],
    data: Annotated[Path | None, typer.Option(help="Pair cache with lobes; without it the phantoms.")] = None,
    split: Annotated[Literal["train", "val", "test", "all"], typer.Option(help="Whose patients.")] = "test",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a used folder.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Score a fine-tuned model on whole scans, per patient: Dice, NSD, HD95, volumes.

    Surface figures follow DeepMind's definition (area-weighted surface elements).

    Example: lungssl evaluate --model runs/lobes --data cohort-cache --out runs/lobes-scores
    """
    from lungssl.errors import ConfigError

    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"--out {out} is not empty; name another folder or give --overwrite")

    from lungssl_data.cache import PairCache
    from lungssl_tasks.model_folder import load_model

    from lungssl import evaluation
    from lungssl.pretraining import check_spacing
    from lungssl.segmenting import model_folder
    from lungssl.training.precision import pick_device

    if data is None:
        from lungssl.cohort import builtin_cohort

        data = builtin_cohort()
    cache = PairCache(data)
    loaded, card = load_model(model_folder(model))
    for spacing_mm in card.spacing_mm:
        check_spacing(f"--model {model}", spacing_mm, cache)
    scores = evaluation.evaluate_model(
        loaded,
        cache,
        evaluation.evaluation_patients(cache, split),
        names=card.labels,
        roi_vox=card.roi_vox,
        device=str(pick_device(device)),
    )
    evaluation.write_scores(out, scores)
    print(evaluation.table(scores))
