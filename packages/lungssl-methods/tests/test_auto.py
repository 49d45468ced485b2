import pytest
from lungssl_methods.auto import BaseRate, RunSize, auto_momentum, auto_prototypes
from lungssl_methods.dino import Dino
from lungssl_methods.phase_dino import PhaseDino


def run(effective_batch: int = 16, total_steps: int = 20_000, patients: int = 100) -> RunSize:
    return RunSize(effective_batch=effective_batch, total_steps=total_steps, patients=patients)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (run(12, 400), 256),  # the small recipe that was measured
        (run(16, 20_000), 4096),
        (run(64, 100_000, patients=5000), 8192),
        (run(64, 100_000, patients=4999), 4096),
        (run(2, 10), 64),
        (run(1, 0), 64),
    ],
)
def test_prototypes_go_with_the_rows_of_the_run(size: RunSize, expected: int) -> None:
    assert auto_prototypes(size).value == expected


def test_the_rate_goes_with_the_root_of_the_batch_or_with_nothing() -> None:
    assert BaseRate(lr=1e-3, batch=256, source="x").at(run(16)).value == pytest.approx(2.5e-4)
    assert "1e-03" not in BaseRate(lr=1e-3, batch=256, source="x").at(run(16)).reason
    assert BaseRate(lr=3e-4, source="x").at(run(16)).value == 3e-4


def test_reasons_name_what_decided() -> None:
    assert "9,600 teacher rows in the run, 32 to a prototype" in auto_prototypes(run(12, 400)).reason
    assert "16 samples a step" in auto_momentum(run()).reason
    config, reasons = Dino.Config(prototypes="auto").settled(run(12, 400))
    assert (config.prototypes, config.centering, config.momentum) == (256, "ema", 0.965936)
    assert set(reasons) == {"prototypes", "momentum", "centering"}
    assert config.settled(run(1000, 9))[0] == config and config.settled(run(1000, 9))[1] == {}
    assert isinstance(PhaseDino.Config(prototypes="auto").settled(run())[0], PhaseDino.Config)
