"""What of `benchmarks/ops_gpu.py` can be tested where there is no GPU."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lungssl_ops.bench import OPS

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "ops_gpu.py"
if not SCRIPT.exists():
    pytest.skip(
        "the package is tested outside its repository, whose benchmarks/ops_gpu.py isn't here", allow_module_level=True
    )


@pytest.fixture(scope="module")
def ops_gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ops_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ops_gpu"] = module  # where dataclasses look for the annotations' names
    spec.loader.exec_module(module)
    return module


def _row(op: str, size: str, run: str, median_ms: float, **others: float) -> dict[str, object]:
    return {"op": op, "size": size, "run": run, "median_ms": median_ms, "peak_mb": 1.0, "floor_share": 0.5} | others


ROWS = [
    _row("lncc", "160x160x160_w9", "ours", 0.15, floor_share=0.4),
    _row("lncc", "160x160x160_w9", "monai", 1.0, floor_share=0.01),
    _row("lncc", "96x96x96_w9", "ours", 0.01),
    _row("warp", "160", "ours", 0.3, floor_share=0.1),
    _row("prototype_ce", "N2074_K65536_D256", "flash", 1.5, peak_mb=200.0),
]


def test_predictions_stand_beside_what_was_measured(ops_gpu: ModuleType) -> None:
    lines = ops_gpu.predictions_table(ROWS).splitlines()
    assert "| LNCC | lncc | 160x160x160_w9 | ours | ≤ 0.2 ms | 0.15 ms | pass |" in lines
    assert "| LNCC, MONAI | lncc | 160x160x160_w9 | monai | ≥ 2.5 ms | 1 ms | miss |" in lines
    assert "| LNCC, fused_lncc | lncc | ^160 | fused_lncc | ≥ 0.3 and ≤ 0.5 ms | not measured | |" in lines
    assert "| its memory | prototype_ce | N2074_K65536_D256 | flash | ≤ 150 MB | 200 MB | miss |" in lines
    assert len(lines) == 2 + len(ops_gpu.PREDICTIONS)


def test_predictions_are_of_ops_that_are_benchmarked(ops_gpu: ModuleType) -> None:
    assert {prediction.op for prediction in ops_gpu.PREDICTIONS} <= set(OPS)


def test_the_worst_of_ours_is_profiled(ops_gpu: ModuleType) -> None:
    assert ops_gpu.worst(ROWS)["op"] == "warp"
    with pytest.raises(ValueError, match="no row of the results is ours; run --stage bench first"):
        ops_gpu.worst(ROWS[1:2])


def test_the_stage_predictions_needs_only_the_results(
    ops_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ops_cuda.json").write_text(json.dumps({"rows": ROWS}), encoding="utf-8")
    with pytest.raises(SystemExit) as status:
        ops_gpu.main(["--stage", "predictions", "--out", str(tmp_path)])
    assert status.value.code == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"stage": "predictions", "pass": 2, "miss": 3, "not measured": 10, "passed": True}
    assert "| warp and Jacobian |" in (tmp_path / "predictions.md").read_text(encoding="utf-8")


def test_a_stage_without_results_or_gpu_is_refused(
    ops_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        ops_gpu.main(["--stage", "profile", "--out", str(tmp_path)])
    assert "has no ops_cuda.json; run --stage bench into it first" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        ops_gpu.main(["--stage", "correctness", "--out", str(tmp_path / "new")])
    assert "--stage correctness: torch sees no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("code", "lines", "passed"),
    [
        (0, ["SKIPPED [1] test_lncc.py:9: no compiler", "9 passed, 1 skipped"], True),
        (0, ["SKIPPED [2] test_lncc.py:9: bf16 is wrong under the interpreter", "9 passed, 2 skipped"], False),
        (1, ["1 failed"], False),
    ],
)
def test_on_a_gpu_bf16_may_not_be_skipped(
    code: int, lines: list[str], passed: bool, ops_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops_gpu, "_run", lambda command, log, variables: (code, "\n".join(lines)))
    result = ops_gpu.correctness(tmp_path)
    assert result["passed"] is passed and result["status"] == code


def test_a_command_s_words_are_kept_as_they_come_and_the_interpreter_is_off(
    ops_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os, sys; print(os.environ.get('TRITON_INTERPRET'), os.environ['WORD']); sys.exit(3)"
    status, text = ops_gpu._run([sys.executable, "-c", code], tmp_path / "log.txt", {"WORD": "here"})
    assert (status, text) == (3, "None here\n")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == text
