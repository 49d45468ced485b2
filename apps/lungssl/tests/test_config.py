import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml
from lungssl.config import describe, load_recipe, resolve
from lungssl.errors import ConfigError
from lungssl.recipe_files import list_recipes, recipe_text
from lungssl.training.config import TrainConfig


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_resolves_and_its_dump_is_the_same_recipe(name: str) -> None:
    recipe = load_recipe(name)
    dumped = yaml.safe_load(yaml.safe_dump(recipe.as_dict()))
    assert resolve(dumped) == recipe
    assert recipe_text(name).startswith("# ") and "# Launch: lungssl " in recipe_text(name)


@pytest.mark.parametrize("name", [name for name in list_recipes() if "nano" in name or "tiny" in name])
def test_every_small_pretraining_recipe_builds(name: str) -> None:
    from lungssl.pretraining import build_method

    encoder, method = build_method(load_recipe(name))
    assert method.encoder is encoder and sum(p.numel() for p in encoder.parameters()) > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.pach_vox=8", "backbone.pach_vox: unknown key; did you mean 'patch_vox'?"),
        ("trian.steps=1", "trian: unknown key; did you mean 'train'?"),
        ("train.stpes=1", "train.stpes: unknown key; did you mean 'steps'?"),
        ("views.zzz=1", "views.zzz: unknown key; known: global_vox, "),
        ("backbone.name=vit3d_nanoo", "backbone.name: unknown backbone 'vit3d_nanoo'; did you mean 'vit3d_nano'?"),
        ("method.name=dyno", "method.name: unknown method 'dyno'; did you mean 'dino'?"),
        ("method.pairs=crosss", "method.pairs: Input should be 'all', 'cross' or 'within'"),
        (
            "train.lr=fast",
            "unable to parse string as a number or Input should be 'auto', got 'fast'",
        ),
        ("train.steps=2.5", "train.steps: Input should be a valid integer"),
        ("train.steps=0", "train: steps must be at least 1, got 0"),
        ("train.lr=0", "train: final_lr 1e-06 is above lr 0.0; set both"),
        ("train.steps", "override 'train.steps' is not of the form section.key=value"),
        ("train.steps.x=1", "train.steps.x: train.steps is a single value"),
        ("data.phases=[", "data.phases: '[' is not a YAML value"),
        ("task.name=segment", "needs either a `method` (to pretrain) or a `task`"),
    ],
)
def test_a_mistake_is_named_with_its_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("dino_vit_nano", [override])
    assert message in str(caught.value)


def test_a_mistake_in_a_nested_section_is_named() -> None:
    with pytest.raises(ConfigError, match=r"task\.decoder\.base_widht: unknown key; did you mean 'base_width'"):
        load_recipe("finetune/segment", ["task.decoder.base_widht=8"])


def test_overrides_reach_every_field_with_its_type() -> None:
    recipe = load_recipe(
        "dino_vit_nano",
        "seed=7 train.lr=1e-3 data.phases=exhale views.zoom=[0.9,1.1] method.pairs=[1,0.5] train.compile=true "
        "data.labels= data.crop_vox=[48,56,64]".split(),
    )
    assert recipe.seed == 7
    assert recipe.train.lr == 0.001  # YAML 1.1 reads 1e-3 as text
    assert recipe.data.phases == "exhale" and recipe.data.labels is None
    assert recipe.data.crop_vox == (48, 56, 64)
    assert recipe.views.zoom == (0.9, 1.1)
    assert recipe.method is not None and recipe.method.config.pairs == (1.0, 0.5)
    assert recipe.train.compile is True


def test_another_name_begins_with_that_ones_own_settings() -> None:
    recipe = load_recipe("mae_vit_nano", ["method.mask_ratio=0.5", "method.name=simmim", "method.mask_unit_tokens=3"])
    assert recipe.method == load_recipe("mae_vit_nano", ["method={name: simmim, mask_unit_tokens: 3}"]).method
    same = load_recipe("mae_vit_nano", ["method.mask_ratio=0.5", "method.name=mae"])
    assert same.method is not None and same.method.config.mask_ratio == 0.5
    assert load_recipe("mae_vit_nano", ["backbone.name=resenc_tiny"]).backbone.name == "resenc_tiny"


def test_a_later_override_wins_and_files_are_recipes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe_text("mae_vit_nano"))
    assert load_recipe(file, ["train.steps=3", "train.steps=4"]).train.steps == 4


def test_unknown_recipes_are_named_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'dino_vit_nan'; did you mean 'dino_vit_nano'"):
        load_recipe("dino_vit_nan")
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        load_recipe(file)
    file.write_text("a: [\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(file)
    file.write_text("train: {steps: 1}\ntrain: {steps: 2}\n")
    with pytest.raises(ConfigError, match=r"key 'train' is there twice"):
        load_recipe(file)


def test_views_that_are_no_whole_number_of_tokens_are_refused() -> None:
    from lungssl.pretraining import build_method

    with pytest.raises(ConfigError, match=r"views\.global_vox: 44 is not a multiple of the 8 voxels .* try 48"):
        build_method(load_recipe("mae_vit_nano", ["views.global_vox=44"]))
    with pytest.raises(ConfigError, match=r"views\.global_vox: 72 is larger than data\.crop_vox"):
        build_method(load_recipe("mae_vit_nano", ["views.global_vox=72"]))


def test_configs_are_frozen_and_described() -> None:
    config = TrainConfig()
    with pytest.raises(FrozenInstanceError):
        config.steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    notes = describe(config)
    assert notes.keys() == {field for field in TrainConfig.__dataclass_fields__}
    assert notes["clip"] == "Largest global gradient norm; 0 is off."


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys\nfrom lungssl.config import load_recipe\n"
        "try:\n    load_recipe('dino_vit_nano', ['method.name=x'])\nexcept ValueError: pass\n"
        "print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
