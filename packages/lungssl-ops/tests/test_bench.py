import json
from pathlib import Path

import pytest
from lungssl_ops.bench import main


def test_the_last_line_is_the_json_of_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "ops.json"
    main(["--quick", "--out", str(out)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary.keys() == {"benchmark", "ratios", "checks", "machine", "commit"}
    assert summary["benchmark"] == "ops" and all(summary["checks"].values())
    assert all(ratio > 0 for ratio in summary["ratios"].values())
    table = json.loads(out.read_text(encoding="utf-8"))
    assert {"median_ms", "p25_ms", "p75_ms", "peak_mb", "floor_ms", "error"} <= table["rows"][0].keys()
    # The float32 gradient of 6 views x 4 samples x 512 logits must be allocated, whatever the method.
    ours = next(row for row in table["rows"] if row["run"] == "ours")
    assert ours["peak_mb"] >= 6 * 4 * 512 * 4 / 2**20
