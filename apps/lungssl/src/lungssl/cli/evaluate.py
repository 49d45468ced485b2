"""`lungssl evaluate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, summary.json and table.txt.")],
    model: Annotated[
        Path | None, typer.Option(help="A fine-tuning run (segment, register, joint or cosegment) or its export/model.")
    ] = None,
    register: Annotated[
        str | None, typer.Option(help="Score registration with this preset: coarse, fast, default, accurate.")
    ] = None,
    encoder: Annotated[Path | None, typer.Option(help="With --register: search by its features, too.")] = None,
    encoder_share: Annotated[
        float, typer.Option(help="Of the search's cost, what --encoder has: 0.5 beside MIND-SSC, 1 alone.")
    ] = 0.5,
    data: Annotated[Path | None, typer.Option(help="Pair cache; without it the phantoms.")] = None,
    split: Annotated[Literal["train", "val", "test", "all"], typer.Option(help="Whose patients.")] = "test",
    raw: Annotated[bool, typer.Option("--raw", help="Keep a model's islands of lobes and lungs.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a used folder.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Score a model on whole scans, per patient: Dice, NSD, HD95, volumes; or a registration: TRE, folds, SD of ln J.

    Of a joint model both, with the lobes that its field carries over; of a co-segmentation, lesions of both phases by
    the cache's masks, found from their diameters.

    Surface figures follow DeepMind's definition (area-weighted surface elements). Registration is judged by landmarks
    and by displacements that the cache knows (phantoms), at the cache's voxels.

    Example: lungssl evaluate --model runs/lobes --data cohort-cache --out runs/lobes-scores
    Example: lungssl evaluate --register coarse --encoder runs/a --data cohort-cache --out runs/a-tre
    """
    from lungssl.errors import ConfigError, did_you_mean

    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"--out {out} is not empty; name another folder or give --overwrite")
    if model is None and register is None:
        raise ConfigError("nothing to score: give --model, or --register PRESET")

    from lungssl_data.cache import PairCache
    from lungssl_tasks.model_folder import (
        COSEGMENTATION_FORMAT,
        JOINT_FORMAT,
        REGISTRATION_FORMAT,
        load_cosegmentation,
        load_joint,
        load_model,
        model_format,
    )
    from lungssl_tasks.registration import PRESETS

    from lungssl import evaluation, finetuning_cosegment, joint_scoring, lesion_scoring, registration_scoring
    from lungssl.pretraining import check_spacing
    from lungssl.segmenting import model_folder
    from lungssl.structures import labels_named
    from lungssl.training.precision import pick_device

    written = None if model is None else model_format(model_folder(model))
    network = written in (REGISTRATION_FORMAT, JOINT_FORMAT)
    if register is not None and register not in PRESETS:
        raise ConfigError(f"--register {register!r} is unknown{did_you_mean(register, PRESETS)}")
    if register is not None and model is not None and not network:
        raise ConfigError(f"--register with --model {model}: it is no registration network; leave one of them out")
    if raw and (written in (None, REGISTRATION_FORMAT, COSEGMENTATION_FORMAT)):
        raise ConfigError("--raw is for models of lobes or lungs: of others no islands are removed; leave it out")
    if encoder is not None and (register is None or model is not None):
        raise ConfigError("--encoder belongs to --register PRESET without --model")
    if data is None:
        from lungssl.cohort import LESION_COHORT, builtin_cohort

        data = builtin_cohort(LESION_COHORT if written == COSEGMENTATION_FORMAT else None)
    cache, where = PairCache(data), pick_device(device)
    if model is not None and written == COSEGMENTATION_FORMAT:
        lesions, side_vox = load_cosegmentation(model_folder(model))
        check_spacing(f"--model {model}", lesions.encoder.spacing_mm, cache)
        pairs_of_lesions = finetuning_cosegment.judged_lesions(cache, split, side_vox=side_vox)
        scores = lesion_scoring.score_lesions(lesions, pairs_of_lesions, device=where)
        lesion_scoring.write_scores(out, scores)
        print(lesion_scoring.table(scores))
        return
    if model is not None and written == JOINT_FORMAT:
        both, names = load_joint(model_folder(model))
        check_spacing(f"--model {model}", both.encoder.spacing_mm, cache)
        patients = [p for p in cache.patients if split in ("all", cache.record(p).split)]
        judged = joint_scoring.score_joint(
            both, cache, patients, names=names, preset=register or "coarse", raw=raw, device=where, say=print
        )
        matrices = joint_scoring.stitches(both)
        joint_scoring.write_scores(out, judged, matrices)
        print(joint_scoring.table(judged, matrices))
        return
    if register is not None or network:
        pairs = registration_scoring.score_registrations(
            cache,
            split,
            preset=register or "default",
            encoder=encoder,
            encoder_share=encoder_share,
            model=model,
            device=where,
            say=print,
        )
        registration_scoring.write_scores(out, pairs)
        print(registration_scoring.table(pairs))
        return
    assert model is not None
    loaded, card = load_model(model_folder(model))
    for spacing_mm in card.spacing_mm:
        check_spacing(f"--model {model}", spacing_mm, cache)
    scores = evaluation.evaluate_model(
        loaded,
        cache,
        evaluation.evaluation_patients(cache, split, labels_named(card.labels)),
        names=card.labels,
        roi_vox=card.roi_vox,
        device=str(where),
        raw=raw,
    )
    evaluation.write_scores(out, scores)
    print(evaluation.table(scores))
