"""A comparison as a YAML file: arms, seeds, labels and what is compared, resolved to a list of runs.

A plan's run has an id that is the hash of all that decides its result but the code (whose commit is in the result), so
that a changed plan repeats only what the change touches. Imports no torch; resolving a recipe does.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lungssl.cohort import CohortConfig
from lungssl.config import Recipe, apply_override, checked_section, load_recipe
from lungssl.errors import ConfigError, did_you_mean
from lungssl.recipe_files import recipe_text, yaml_values

Equalised = Literal["steps", "flops"]
LARGEST_WINDOW_VOX = 1024
"""Twice the side of a CT at its own voxels: no scan needs more."""
ARM_NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,40}"
"""Names of arms are in those of runs' folders."""
AFFINE = "affine"
"""Stands in contrasts for places by the coarse affine alone, without any encoder's features."""
Mode = Literal["full", "frozen"]
"""All weights are trained, or the decoder's alone."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A figure per test patient."""

    title: str
    unit: str
    digits: int
    higher_is_better: bool
    margin: float | None = None
    """Differences smaller than this don't matter in practice (`domain.md` F); None: no margin was set beforehand."""
    most: float = math.inf
    """Largest figure that there can be; the least is 0. No interval of a difference is wider."""
    of_labels: bool = False
    """Of a model learned from labels, not of the encoder alone."""
    of_places: bool = False
    """Has a figure for AFFINE."""


ENDPOINTS: dict[str, Endpoint] = {
    "landmark_mm": Endpoint(
        title="landmark error", unit="mm", digits=1, higher_is_better=False, of_places=True, margin=0.2
    ),
    "near_mm": Endpoint(
        title="landmark error near", unit="mm", digits=2, higher_is_better=False, of_places=True, margin=0.2
    ),
    "registration_mm": Endpoint(
        title="TRE, matched features", unit="mm", digits=2, higher_is_better=False, of_places=True, margin=0.2
    ),
    "probe_dice": Endpoint(
        title="lobe Dice, linear probe", unit="", digits=3, higher_is_better=True, most=1, margin=0.01
    ),
    "dice": Endpoint(title="lobe Dice", unit="", digits=3, higher_is_better=True, most=1, margin=0.01, of_labels=True),
    "nsd": Endpoint(title="lobe NSD at 2 mm", unit="", digits=3, higher_is_better=True, most=1, of_labels=True),
    "hd95_mm": Endpoint(title="lobe HD95", unit="mm", digits=1, higher_is_better=False, of_labels=True),
    "airless_g": Endpoint(
        title="error of non-aerated mass", unit="g", digits=1, higher_is_better=False, of_labels=True
    ),
    "recruited_g": Endpoint(title="error of recruitment", unit="g", digits=1, higher_is_better=False, of_labels=True),
    "retrieval": Endpoint(title="cross-phase retrieval, 1 / rank", unit="", digits=2, higher_is_better=True, most=1),
    "shift_near_mm": Endpoint(
        title="landmark error near, shifted", unit="mm", digits=2, higher_is_better=False, of_places=True
    ),
    "shift_registration_mm": Endpoint(
        title="TRE, matched features, shifted", unit="mm", digits=2, higher_is_better=False, of_places=True, margin=0.2
    ),
    "shift_probe_dice": Endpoint(
        title="lobe Dice, linear probe, shifted", unit="", digits=3, higher_is_better=True, most=1, margin=0.01
    ),
    "shift_dice": Endpoint(
        title="lobe Dice, shifted", unit="", digits=3, higher_is_better=True, most=1, margin=0.01, of_labels=True
    ),
}
"""TRE's margin is also that of looking up; the others are secondary and have none. `shift_`: of `Plan.shift`."""


@dataclass(frozen=True, kw_only=True, order=True)
class Regime:
    """What is learned from labels, but for the draw."""

    patients: int
    """Labelled."""
    mode: Mode = "full"

    def __str__(self) -> str:
        return f"{self.patients} labelled{'' if self.mode == 'full' else ', frozen'}"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of pretraining."""

    isolates: str
    """What its contrasts show, in a few words for the table."""
    recipe: str | None = None
    """Name or file; None: the plan's."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, after the plan's own."""
    pretrained: bool = True
    """False: the encoder as it starts, the floor (A0), or as `weights` has it."""
    weights: str | None = None
    """Encoder file of another training, e.g. supervised or public, for a row beside those of this plan."""
    displacement: Literal["cache", "estimated"] = "cache"
    """Where dense methods have correspondences from: what the cache holds (exact, for phantoms), or an estimate from
    the scans alone, made beforehand; its time is counted."""

    def __post_init__(self) -> None:
        if self.weights is not None and self.pretrained:
            raise ValueError(f"weights {self.weights} of another training: set pretrained: false")


@dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """What is learned from labels, on each arm's encoders."""

    recipe: str = "finetune/segment"
    """A fine-tuning recipe; its backbone is replaced by the arm's."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` of it."""
    patients: tuple[int, ...] = (1, 5)
    """Regimes: labelled patients. Draws are nested in them (`lungssl_data.draws`)."""
    draws: int = 1
    """Draws of so many patients."""
    modes: tuple[Mode, ...] = ("full",)
    """Each regime in each of them."""

    def __post_init__(self) -> None:
        for name, values in (("patients", self.patients), ("modes", self.modes)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"labels.{name} must be different and at least one, got {list(values)}")
        if min(self.patients) < 1 or self.draws < 1:
            raise ValueError(
                f"labels.patients and labels.draws must be at least 1, got {list(self.patients)} and {self.draws}"
            )

    def regimes(self) -> list[Regime]:
        """The fewest labels first."""
        return [Regime(patients=n, mode=mode) for n in sorted(self.patients) for mode in self.modes]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison. Raises ValueError for contrasts of arms that aren't there."""

    title: str
    """The question, in words."""
    recipe: str
    """Pretraining recipe that arms start from, by name or file."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` for every arm."""
    arms: dict[str, Arm]
    """By the letters of `domain.md` F, or any names."""
    contrasts: tuple[tuple[str, str], ...]
    """Pairs of arms, first less second. `affine` as second stands for no encoder at all."""
    primary: tuple[str, ...] = ("landmark_mm",)
    """Endpoints that the plain sentences are about, declared beforehand; with `primary_contrasts` one family of tests,
    which a test whose runs are missing or failed stays in, with p = 1.
    `dice@5`: at 5 labelled patients with all weights trained; `dice`: in every regime."""
    primary_contrasts: tuple[tuple[str, str], ...] | None = None
    """Those of `contrasts` that the family is of; None: all."""
    equalise: Equalised = "steps"
    """What no two pretrained arms may differ in by more than 2 %: `steps` (and samples a step), or measured `flops`."""
    seeds: tuple[int, ...] = (0,)
    """Of pretraining; what is learned from labels has the same."""
    labels: LabelPlan | None = None
    """None: only endpoints of the encoder itself."""
    phantoms: CohortConfig = field(default_factory=CohortConfig)
    """Where no --data is given."""
    window_vox: int | None = None
    """Side of the windows through which encoders are judged, a multiple of their token stride; None: `views.global_vox`
    of the arm. Fewer and larger ones are quicker, and a convolution takes any size."""
    shift: CohortConfig | None = None
    """Other phantoms, all of whose patients only judge: the shift test. --shift-data takes its place."""

    def __post_init__(self) -> None:
        for name in self.arms:
            if not re.fullmatch(ARM_NAME, name):
                raise ValueError(
                    f"arm {name!r}: expected a letter or digit, then up to 40 of these, '_', '.', '+', '-'"
                )
        if AFFINE in self.arms:
            raise ValueError(f"an arm can't be called {AFFINE!r}, which stands for no encoder in contrasts")
        for first, second in self.contrasts:
            for name, known in ((first, list(self.arms)), (second, [*self.arms, AFFINE])):
                if name not in known:
                    raise ValueError(f"contrasts name arm {name!r}{did_you_mean(name, known)}")
            if first == second:
                raise ValueError(f"contrasts compare {first} with itself")
            if (second, first) in self.contrasts:
                raise ValueError(f"contrasts have {first} and {second} both ways; one of them says it all")
        for name, values in (("contrasts", self.contrasts), ("primary", self.primary)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be different and at least one, got {list(values)}")
        for entry in self.primary:
            self._check_primary(entry)
        if self.primary_contrasts is not None and not self.primary_contrasts:
            raise ValueError("primary_contrasts is empty; leave it out for all contrasts")
        if self.window_vox is not None and not 1 <= self.window_vox <= LARGEST_WINDOW_VOX:
            raise ValueError(f"window_vox must be 1 to {LARGEST_WINDOW_VOX}, got {self.window_vox}")
        if unknown := set(self.primary_contrasts or ()) - set(self.contrasts):
            raise ValueError(f"primary_contrasts has {sorted(unknown)[0]}, which contrasts hasn't")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different and at least one, got {list(self.seeds)}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be 0 or more, got {list(self.seeds)}")
        of_labels = self.labels.overrides if self.labels is not None else ()
        for override in (*self.overrides, *of_labels, *(one for arm in self.arms.values() for one in arm.overrides)):
            if override.partition("=")[0].strip() == "seed":
                raise ValueError(f"overrides have {override!r}, and a plan's seeds are in `seeds`; drop it there")

    def _check_primary(self, entry: str) -> None:
        name, at, labels = entry.partition("@")
        if at and not labels:
            raise ValueError(f"primary {entry!r}: write how many labelled patients after the @, e.g. {name}@5")
        if name not in ENDPOINTS:
            raise ValueError(f"primary names endpoint {name!r}{did_you_mean(name, ENDPOINTS)}")
        of_labels = ENDPOINTS[name].of_labels
        if of_labels and self.labels is None:
            raise ValueError(f"primary {entry!r} is of models learned from labels, and the plan has no `labels`")
        if labels and not of_labels:
            raise ValueError(f"primary {entry!r}: {name} is of the encoder, without labels; write {name!r}")
        if labels and (self.labels is None or labels not in map(str, self.labels.patients)):
            raise ValueError(f"primary {entry!r} is of {labels} labelled patients, and labels.patients has no such")
        if labels and self.labels is not None and "full" not in self.labels.modes:
            raise ValueError(f"primary {entry!r} is of all weights trained, and labels.modes has no `full`")
        if name.startswith("shift_") and self.shift is None:
            raise ValueError(f"primary {entry!r} is of a shift test, and the plan has no `shift`")

    def is_primary(self, contrast: tuple[str, str], endpoint: str, regime: Regime | None) -> bool:
        """Whether this test is of the family declared beforehand."""
        names = {endpoint} if regime is None else {endpoint, f"{endpoint}@{regime.patients}" * (regime.mode == "full")}
        family = self.contrasts if self.primary_contrasts is None else self.primary_contrasts
        return bool(names & set(self.primary)) and contrast in family

    def as_dict(self) -> dict[str, Any]:
        """Plain YAML values; loading them gives the same plan."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretraining of one arm with one seed, and the figures of its encoder."""

    arm: str
    seed: int
    recipe: Recipe
    pretrained: bool
    weights: str | None = None
    displacement: Literal["cache", "estimated"] = "cache"
    window_vox: int
    """Of the windows through which the encoder is judged."""
    id: str


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """A model learned from some labels on such an encoder, and its figures."""

    parent: Pretrain
    recipe: Recipe
    regime: Regime
    draw: int
    id: str


def load_plan(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read, override and check a plan. Raises ConfigError that names the key."""
    try:
        values = yaml_values(recipe_text(name_or_path, "plan"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name_or_path}: a plan is a mapping with title, recipe, arms and contrasts")
    for override in overrides:
        apply_override(values, override)
    return checked_section(Plan, values, "plan")


def arm_recipe(plan: Plan, arm: str, seed: int) -> Recipe:
    """The pretraining recipe of an arm. Raises ConfigError that names the arm."""
    mine = plan.arms[arm]
    try:
        recipe = load_recipe(mine.recipe or plan.recipe, [*plan.overrides, *mine.overrides, f"seed={seed}"])
    except ConfigError as error:
        raise ConfigError(f"arms.{arm}: {error}") from error
    if recipe.method is None:
        name = mine.recipe or plan.recipe
        raise ConfigError(f"arms.{arm}: {name} is no pretraining recipe; see `lungssl list recipes`")
    return recipe


def pretrain_runs(plan: Plan, data: str, shift: str | None = None) -> list[Pretrain]:
    """Every arm with every seed, seeds outermost, so that a plan that is stopped early has whole comparisons.

    `data` is the cache's fingerprint, `shift` that of the shift test's.
    """
    runs = []
    for seed in plan.seeds:
        for name, arm in plan.arms.items():
            recipe = arm_recipe(plan, name, seed)
            decides = [recipe.as_dict(), data] if arm.pretrained else [start_of(recipe), data, "untrained"]
            if plan.window_vox is not None:
                decides.append(plan.window_vox)
            if arm.weights is not None:
                decides.append(weights_sha256(name, arm.weights))
            if arm.displacement == "estimated":
                from lungssl_tasks.registration import EstimateConfig

                decides.append(asdict(EstimateConfig()))
            runs.append(
                Pretrain(
                    arm=name,
                    seed=seed,
                    recipe=recipe,
                    pretrained=arm.pretrained,
                    weights=arm.weights,
                    displacement=arm.displacement,
                    window_vox=plan.window_vox or recipe.views.global_vox,
                    id=_id(name, seed, decides if shift is None else [*decides, shift]),
                )
            )
    return runs


def finetune_runs(plan: Plan, parent: Pretrain) -> list[Finetune]:
    """What is learned from labels on one encoder: the fewest labels first."""
    if plan.labels is None:
        return []
    runs = []
    for regime in plan.labels.regimes():
        more = [f"seed={parent.seed}"] + (["task.freeze_encoder=true"] if regime.mode == "frozen" else [])
        recipe = load_recipe(plan.labels.recipe, [*plan.labels.overrides, *more])
        if recipe.task is None:
            raise ConfigError(f"labels.recipe: {plan.labels.recipe} is no fine-tuning recipe; take finetune/segment")
        for draw in range(plan.labels.draws):
            decides = [parent.id, recipe.as_dict(), regime.patients, draw]
            about = f"{parent.arm}-{regime.mode}-{regime.patients}labels-draw{draw}"
            found = _id(about, parent.seed, decides)
            runs.append(Finetune(parent=parent, recipe=recipe, regime=regime, draw=draw, id=found))
    return runs


def weights_sha256(arm: str, path: str) -> str:
    """Of an arm's own encoder file; ConfigError where it isn't there."""
    if not Path(path).is_file():
        raise ConfigError(f"arms.{arm}.weights: no file {path}; give an encoder.safetensors of `lungssl export`")
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def start_of(recipe: Recipe) -> dict[str, Any]:
    """What decides the weights before the first step, and how they are judged."""
    values = recipe.as_dict()
    return {"seed": values["seed"], "backbone": values["backbone"], "global_vox": values["views"]["global_vox"]}


def shard_of(runs: Sequence[Pretrain], text: str | None) -> list[Pretrain]:
    """The part `i/n` of the runs, i from 1: every n-th. Raises ConfigError for other text."""
    if text is None:
        return list(runs)
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"--shard {text}: expected i/n with i from 1 to n, e.g. 2/4")
    return list(runs[int(part) - 1 :: int(parts)])


def _id(about: str, seed: int, decides: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    return f"{about}-seed{seed}-{digest}"


def as_text(values: Mapping[str, Any]) -> str:
    """YAML of plain values, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False)
