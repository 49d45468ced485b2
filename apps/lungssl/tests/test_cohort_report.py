"""The page of a cohort: outliers first, names of files only, nothing from a damaged analysis."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from lungssl.cli import main
from lungssl.reports.cohort_report import robust_z
from PIL import Image


def write(folder: Path, name: str, *, recruited: float | None, doubt: str | None = None) -> None:
    pair = {"eelv_ml": 1500.0, "tidal_volume_ml": 480.0, "strain": 0.32, "net_recruited_percent": recruited}
    checks = [{"name": "exhale: gas", "found": "", "usual": "", "doubt": doubt}]
    held = {"headline": "", "parts": {"lungs": {"pair": pair}}, "checks": checks}
    (folder / f"{name}.json").write_text(json.dumps(held))


@pytest.fixture
def analyses(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for k, recruited in enumerate([4.0, 5.0, 6.0, 5.5, None, 4.5, 31.0]):
        write(folder, f"p{k}", recruited=recruited, doubt="<b>cut</b>" if k == 1 else None)
    picture = io.BytesIO()
    Image.fromarray(np.full((900, 1500, 3), 120, np.uint8)).save(picture, format="PNG")
    (folder / "p6.html").write_text(
        f'<img src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'
    )
    (folder / "other.json").write_text('{"what": "not an analysis"}')
    return folder


def test_the_most_unusual_pair_comes_first(analyses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "--cohort", str(analyses), "-o", str(tmp_path / "cohort.html")]) == 0
    assert "7 pairs" in capsys.readouterr().out
    page = (tmp_path / "cohort.html").read_text()
    names = re.findall(r'<tr><td data-v="([^"]+)"', page)
    assert names[:2] == ["p6", "p1"] and sorted(names) == [f"p{k}" for k in range(7)]
    assert page.count('class="odd">31.0') == 1 and page.count('class="odd">') == 2  # and the legend
    assert "&lt;b&gt;cut" in page and "<b>cut" not in page
    assert page.count("data:image/jpeg") == 1 and "http" not in page and "Research use only" in page


def test_few_pairs_have_no_outlier_and_wrong_folders_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["analyze", "--cohort", str(tmp_path), "-o", str(tmp_path / "cohort.html")]
    assert main(command) == 3 and "holds no analysis" in capsys.readouterr().err
    write(tmp_path, "a", recruited=1.0)
    assert main(command) == 0 and "Too few pairs" in (tmp_path / "cohort.html").read_text()
    assert main(command) == 2 and "give --overwrite" in capsys.readouterr().err
    (tmp_path / "b.json").write_text('{"headline": "", "parts": {"lungs": {}}, "checks": []}')
    assert main([*command, "--overwrite"]) == 3 and "b.json: a damaged analysis" in capsys.readouterr().err
    assert main(["analyze", "-o", str(tmp_path / "x.html")]) == 2
    assert "give --exhale and --inhale, or --cohort" in capsys.readouterr().err


def test_robust_z_of_known_values() -> None:
    assert robust_z([1.0, 2.0, 3.0, 4.0, 9.0]) == pytest.approx([0.6745 * k for k in (-2, -1, 0, 1, 6)])
    assert robust_z([1.0, None, 1.0, 1.0, 1.0, 7.0]) == [0.0] * 6  # no spread
