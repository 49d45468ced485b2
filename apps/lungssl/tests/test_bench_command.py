"""`lungssl bench ops`: what its options become; the benchmark itself is tested in lungssl-ops."""

import re
from pathlib import Path

import lungssl_ops.bench
import pytest
from lungssl.cli import main


def test_the_options_reach_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(lungssl_ops.bench, "main", called.append)
    out = tmp_path / "lncc.json"
    assert main(["bench", "ops", "--quick", "--only", "lncc", "--out", str(out)]) == 0
    assert main(["bench", "ops", "--compile"]) == 0
    assert called == [
        ["--device", "cpu", "--only", "lncc", "--out", str(out), "--quick"],
        ["--device", "cpu", "--only", "", "--out", "ops.json", "--compile"],
    ]


def test_one_op_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ema.json"
    assert main(["bench", "ops", "--quick", "--only", "ema", "--out", str(out)]) == 0
    assert out.exists() and '"ema_ran": true' in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "lncd"], "error: --only lncd: no op's name holds this text; the ops are multicrop_ce, "),
        (["--device", "abacus"], "error: --device abacus: not usable here ("),
    ],
)
def test_what_makes_no_sense_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--help"]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Example: OMP_NUM_THREADS=1 lungssl bench ops --quick --only lncc --out ops.json" in text
