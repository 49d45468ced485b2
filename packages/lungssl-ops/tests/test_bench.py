import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lungssl_ops import bench, measure
from lungssl_ops.bench import OPS, main
from lungssl_ops.bench_tables import END, START, readme_block, write_block
from lungssl_ops.measure import Case
from torch import Tensor

REPOSITORY = Path(__file__).parents[3]
RESULT = {
    "benchmark": "ops",
    "ratios": {},
    "checks": {"sums_below_1e-05": True},
    "machine": {"device": "Abacus 3", "threads": 2, "torch": "2.15.0", "gb_per_s": 9.5},
    "commit": "abc1234",
    "command": "OMP_NUM_THREADS=2 python benchmarks/bench_ops.py",
    "rows": [
        {
            "op": "sums",
            "size": "N3",
            "run": "ours",
            "min_ms": 1.0,
            "median_ms": 2.0,
            "p25_ms": 1.5,
            "p75_ms": 2.5,
            "peak_mb": 0.25,
            "floor_ms": 0.5,
            "floor_share": 0.5,
            "error": 3e-7,
        }
    ],
}


def test_the_last_line_is_the_json_of_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "ops.json"
    main(["--quick", "--out", str(out)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary.keys() == {"benchmark", "ratios", "checks", "machine", "commit"}
    assert summary["benchmark"] == "ops" and all(summary["checks"].values())
    assert {f"{op}_ran" for op in OPS} <= summary["checks"].keys()
    assert all(ratio > 0 for ratio in summary["ratios"].values())
    assert summary["machine"]["threads"] == torch.get_num_threads()
    table = json.loads(out.read_text(encoding="utf-8"))
    assert table["command"].startswith(f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/bench_ops.py --q")
    columns = {"min_ms", "median_ms", "p25_ms", "p75_ms", "peak_mb", "floor_ms", "floor_share", "error"}
    assert all(columns <= row.keys() for row in table["rows"])
    # The float32 gradient of 6 views x 4 samples x 512 logits must be allocated, whatever the method.
    ours = next(row for row in table["rows"] if row["op"] == "multicrop_ce" and row["run"] == "ours")
    assert ours["peak_mb"] >= 6 * 4 * 512 * 4 / 2**20


def _sums(**options: object) -> Iterator[Case]:
    ones = torch.ones(1000)
    runs = {"ours": lambda: ones * 2, "half": lambda: ones * 1.0, "reference": lambda: ones + ones}
    tolerance = {"ours": 1e-5, "half": 1e-5}
    yield Case(op="sums", size="N1000", floor_bytes=8000, runs=runs, tolerance=tolerance, stem="sums")
    raise RuntimeError("the GPU has gone")


def test_an_op_that_fails_is_a_failed_check_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_cases", lambda op, **options: _sums() if op == "lncc" else iter(()))
    monkeypatch.setattr(bench, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench, "flops_per_s", lambda device: 1e9)
    with pytest.raises(SystemExit) as exit_status:
        main(["--quick", "--out", str(tmp_path / "ops.json")])
    assert exit_status.value.code == 1
    printed = capsys.readouterr()
    assert "the GPU has gone" in printed.err
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary["checks"].pop("lncc_ran") is False
    assert summary["checks"].pop("sums_N1000_half_error_below_1e-05") is False
    assert all(summary["checks"].values()) and len(summary["checks"]) == len(OPS)
    assert summary["ratios"].keys() == {
        f"sums{what}_vs_{run}" for what in ("", "_memory") for run in ("half", "reference")
    }
    rows = json.loads((tmp_path / "ops.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["run"], row["error"]) for row in rows] == [("ours", 0.0), ("half", 0.5), ("reference", 0.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.json", "--only", "lncd"], "--only lncd: no op's name holds this text; the ops are multicrop_ce"),
        (["--quick"], "--out FILE.json is missing"),
        (["--readme", "README.md"], "--readme and --from go together"),
        pytest.param(
            ["--out", "x.json", "--device", "cuda"],
            "--device cuda: torch sees no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2 and message in capsys.readouterr().err


def test_the_block_of_a_readme_says_how_it_was_measured() -> None:
    assert readme_block(RESULT).splitlines() == [
        START,
        "`OMP_NUM_THREADS=2 python benchmarks/bench_ops.py` on Abacus 3, threads: 2, torch 2.15.0, commit abc1234, "
        "memory at 9.5 GB/s.",
        "All 1 checks passed.",
        "",
        "| op | size | run | median [p25, p75] ms | min ms | peak MB | floor ms | share of floor | error |",
        "|---|---|---|---|---|---|---|---|---|",
        "| sums | N3 | ours | 2.00 [1.50, 2.50] | 1.00 | 0.2 | 0.50 | 0.50 | 3e-07 |",
        END,
    ]
    failed = RESULT | {"checks": {"a": False, "b": True, "c": False}}
    assert "Checks that failed: a, c." in readme_block(failed).splitlines()


def test_only_the_block_of_a_readme_is_rewritten(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "ops.json"
    readme.write_text(f"# Ops\n\n{START}\nold\n{END}\n\nThe end.\n", encoding="utf-8")
    results.write_text(json.dumps(RESULT), encoding="utf-8")
    for _ in range(2):
        main(["--readme", str(readme), "--from", str(results)])
        assert readme.read_text(encoding="utf-8") == f"# Ops\n\n{readme_block(RESULT)}\n\nThe end.\n"
    readme.write_text(f"{END}\n{START}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="needs one line <!-- bench:start --> and, below it, one line"):
        write_block(readme, RESULT)


def test_the_package_s_readme_holds_the_committed_results(tmp_path: Path) -> None:
    results = REPOSITORY / "benchmarks" / "results" / "ops.json"
    if not results.exists():
        pytest.skip("the package is tested outside its repository, whose benchmarks/results/ops.json isn't here")
    readme = REPOSITORY / "packages" / "lungssl-ops" / "README.md"
    shutil.copy(readme, tmp_path)
    main(["--readme", str(tmp_path / "README.md"), "--from", str(results)])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "ops.json"),
        (["--quick", "--compile"], "ops_quick.json"),
        (["--only", "ema", "--device", "cuda:1"], "ops_cuda_ema.json"),
    ],
)
def test_the_script_keeps_parts_of_the_table_in_files_of_their_own(
    words: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = REPOSITORY / "benchmarks" / "bench_ops.py"
    if not script.exists():
        pytest.skip("the package is tested outside its repository, whose benchmarks/bench_ops.py isn't here")
    called: list[list[str]] = []
    monkeypatch.setattr(bench, "main", called.append)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")
    assert called == [["--out", str(REPOSITORY / "benchmarks" / "results" / name), *words]]


def test_slow_rivals_are_repeated_less_and_warm_up_does_not_count() -> None:
    calls = {"fast": 0, "slow": 0}

    def call(name: str) -> Tensor:
        calls[name] += 1
        return torch.zeros(1)

    runs = {"fast": lambda: call("fast"), "slow": lambda: call("slow")}
    seconds = measure.timings(runs, repeats=20, device="cpu", slow=("slow",))
    assert {name: len(taken) for name, taken in seconds.items()} == {"fast": 20, "slow": 4}
    assert calls == {"fast": 22, "slow": 6}


def test_peak_memory_is_what_a_call_holds_at_once() -> None:
    def two_at_once() -> Tensor:
        first = torch.zeros(2**18)  # 1 MiB
        second = first + 1
        del first
        return second * 2

    assert measure.peak_mb(two_at_once, "cpu") == pytest.approx(2.0, abs=0.01)


def test_the_commit_is_that_of_the_package_s_own_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    assert measure.commit() == "lungssl-ops 0.1.0"
    if not (REPOSITORY / ".git").exists():
        pytest.skip("the package is tested outside its repository")
    monkeypatch.undo()
    assert len(measure.commit().removesuffix("-dirty")) >= 7 and " " not in measure.commit()
