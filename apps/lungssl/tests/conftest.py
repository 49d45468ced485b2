import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


def _neighbour(name: str) -> ModuleType:
    """Tests run in importlib mode and cannot import their neighbours."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
