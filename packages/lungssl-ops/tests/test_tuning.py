import json
from dataclasses import asdict
from pathlib import Path

import pytest
from lungssl_ops import tuning
from lungssl_ops.tuning import Config, pick

SMALL, BIG, HUGE = (Config(blocks={"BLOCK": size}, num_warps=4) for size in (64, 128, 4096))
CANDIDATES = (SMALL, BIG, HUGE)
TIMES_MS = {64: 2.0, 128: 1.0, 4096: float("inf")}


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a GPU would have been given to measure, with nothing known of it; the GPU's times are TIMES_MS."""
    pytest.importorskip("triton", reason="no triton, or its interpreter has no numpy")
    asked: list[int] = []

    def milliseconds(launch: object, config: Config) -> float:
        asked.append(config.blocks["BLOCK"])
        return TIMES_MS[config.blocks["BLOCK"]]

    monkeypatch.setenv("LUNGSSL_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LUNGSSL_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "_arch", lambda: "sm_90")
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "winners")
    _forget()
    return asked


def _forget() -> None:
    tuning._measured.clear()
    tuning._known.cache_clear()


def _pick(key: str = "k9") -> Config:
    return pick("box", key, CANDIDATES, lambda config: None)


def _ship(table: dict[str, Config]) -> None:
    tuning.SHIPPED.mkdir()
    text = json.dumps({place: asdict(config) for place, config in table.items()})
    (tuning.SHIPPED / "sm_90.json").write_text(text, encoding="utf-8")


def test_without_winners_the_first_candidate_is_used_and_nothing_measured(launches: list[int]) -> None:
    assert _pick() == SMALL and launches == []


def test_the_interpreter_takes_the_first_candidate(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNGSSL_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "interpreting", lambda: True)
    assert _pick() == SMALL and launches == []


def test_shipped_winners_are_used_without_measuring(launches: list[int]) -> None:
    _ship({"box/k9": BIG})
    assert _pick() == BIG and _pick("k7") == SMALL and launches == []


def test_asked_to_it_measures_each_candidate_once_and_remembers(
    launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _ship({"box/k9": SMALL})
    monkeypatch.setenv("LUNGSSL_AUTOTUNE", "1")
    assert _pick() == _pick() == BIG and launches == [64, 128, 4096]
    monkeypatch.delenv("LUNGSSL_AUTOTUNE")
    _forget()  # as another process
    assert _pick() == BIG and launches == [64, 128, 4096]


def test_a_winner_of_another_version_of_the_kernel_does_not_count(launches: list[int]) -> None:
    _ship({"box/k9": Config(blocks={"BLOCK": 128}, num_warps=16)})
    assert _pick() == SMALL


def test_without_a_cache_folder_the_winner_lasts_for_the_process(
    launches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("LUNGSSL_OPS_CACHE", str(tmp_path / "file" / "below"))
    assert _pick() == SMALL
    monkeypatch.setenv("LUNGSSL_AUTOTUNE", "1")
    assert _pick() == _pick() == BIG
    (record,) = caplog.records
    assert "box/k9 last for this process only: no cache folder" in record.getMessage()


def test_a_file_that_is_no_table_is_named(launches: list[int]) -> None:
    _ship({})
    (tuning.SHIPPED / "sm_90.json").write_text('{"box/k9": {"block": 3}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"winners/sm_90.json is no table of launch parameters \(.*block.*; delete it"):
        _pick()


def test_export_puts_the_user_s_winners_over_the_shipped_ones(
    launches: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _ship({"box/k9": SMALL, "box/k5": SMALL})
    with pytest.raises(FileNotFoundError, match="run the benchmarks with LUNGSSL_AUTOTUNE=1 first"):
        tuning.main(["--export", str(tuning.SHIPPED)])
    monkeypatch.setenv("LUNGSSL_AUTOTUNE", "1")
    _pick()
    tuning.main(["--export", str(tuning.SHIPPED)])
    shipped = tuning.SHIPPED / "sm_90.json"
    assert capsys.readouterr().out.split() == [str(shipped)]
    assert json.loads(shipped.read_text(encoding="utf-8")) == {"box/k9": asdict(BIG), "box/k5": asdict(SMALL)}


def test_what_the_package_ships_can_be_read() -> None:
    shipped = sorted(tuning.SHIPPED.glob("*.json"))
    if not shipped:
        pytest.skip("no GPU has been measured: the package ships no winners")
    assert all(tuning._read(path) for path in shipped)
