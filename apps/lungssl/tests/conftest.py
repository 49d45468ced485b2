import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from lungssl_data.cache import write_pair
from lungssl_data.pair import PhasePair, PhaseScan, Split

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


@pytest.fixture(scope="session")
def fake_run() -> ModuleType:
    """The module fake_run.py."""
    return _neighbour("fake_run")


@pytest.fixture(scope="session")
def tiny_pair() -> ModuleType:
    """The module test_pretraining.py, for its tiny recipes and pairs."""
    return _neighbour("test_pretraining")


@pytest.fixture(scope="session")
def recipe_words(tiny_pair: ModuleType) -> list[str]:
    """Overrides that make `mae_vit_nano` six tiny steps without held-out patients."""
    return [*tiny_pair.RECIPES["mae_vit_nano"], "train.eval_batches=0"]


@pytest.fixture
def noise_cohort(tmp_path: Path) -> Path:
    """A cache of three patients with both phases, the last of split val, for runs that are started as commands."""
    random = np.random.default_rng(0)
    splits: tuple[Split, Split, Split] = ("train", "train", "val")
    for number, split in enumerate(splits):
        exhale, inhale = (
            PhaseScan(
                ct_hu=random.normal(-700, 200, (26, 28, 30)).clip(-1000, 400).astype(np.int16),
                valid=np.ones((26, 28, 30), np.uint8),
                lung=np.ones((26, 28, 30), np.uint8),
                spacing_mm=(5.0, 5.0, 5.0),
                origin_mm=(0.0, 0.0, 0.0),
            )
            for _ in range(2)
        )
        pair = PhasePair(patient=f"p{number}", exhale=exhale, inhale=inhale, split=split, exhale_to_inhale=np.eye(3, 4))
        write_pair(pair, tmp_path / "cache")
    return tmp_path / "cache"


def _neighbour(name: str) -> ModuleType:
    """Tests run in importlib mode and cannot import their neighbours."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
