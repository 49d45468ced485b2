import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(example.group(1), str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "p01 built" in printed
    assert "('global', 0, (2, 1, 16, 16, 16), (2, 3, 16, 16, 16))" in printed
