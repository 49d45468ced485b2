import json
from pathlib import Path

import pytest
import yaml
from lungssl.errors import ConfigError
from lungssl.training.run_folder import RunFolder

CONFIG = {"seed": 0, "backbone": {"name": "vit3d_nano", "dim": 128}, "train": {"steps": 10, "lr": 0.1}}


def test_a_new_folder_gets_its_files(tmp_path: Path) -> None:
    run = RunFolder.start(tmp_path / "a/b", CONFIG, data_fingerprint="f00d")
    assert yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8")) == CONFIG
    env = json.loads((run.path / "env.json").read_text(encoding="utf-8"))
    assert env["data"] == "f00d" and env["cores"] >= 1
    assert env["versions"]["torch"] and env["versions"]["lungssl"]
    assert run.checkpoints.is_dir() and run.export.is_dir()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    RunFolder.start(tmp_path, CONFIG)


def test_a_used_folder_is_refused_with_the_ways_forward(tmp_path: Path) -> None:
    RunFolder.start(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=r"holds a run already; continue it with --resume, replace it with --over"):
        RunFolder.start(tmp_path, CONFIG)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_other_things_is_never_touched(tmp_path: Path, options: dict[str, bool]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty and holds no run"):
        RunFolder.start(tmp_path, CONFIG, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_clears_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder.start(tmp_path, CONFIG)
    (run.checkpoints / "step_5").mkdir()
    run.metrics.write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.start(tmp_path, CONFIG, overwrite=True)
    assert not list(run.checkpoints.iterdir()) and not run.metrics.exists()
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_resume_names_the_key_that_changed(tmp_path: Path) -> None:
    RunFolder.start(tmp_path, CONFIG)
    changed = CONFIG | {"backbone": {"name": "vit3d_nano", "dim": 256}}
    with pytest.raises(ConfigError, match=r"backbone\.dim: the run in .* has 128, this command 256; resume with"):
        RunFolder.start(tmp_path, changed, resume=True)
    with pytest.raises(ConfigError, match=r"train\.clip: .* was begun without this setting, by another lungssl"):
        RunFolder.start(tmp_path, CONFIG | {"train": {**CONFIG["train"], "clip": 1.0}}, resume=True)


def test_resume_may_extend_the_steps(tmp_path: Path) -> None:
    RunFolder.start(tmp_path, CONFIG)
    longer = CONFIG | {"train": {"steps": 20, "lr": 0.1}}
    RunFolder.start(tmp_path, longer, resume=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == longer


def test_resume_with_other_data_is_refused(tmp_path: Path) -> None:
    RunFolder.start(tmp_path, CONFIG, data_fingerprint="aaaa")
    with pytest.raises(ConfigError, match="cache with fingerprint aaaa, this one has bbbb"):
        RunFolder.start(tmp_path, CONFIG, data_fingerprint="bbbb", resume=True)


def test_what_is_said_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder.start(tmp_path, CONFIG).say("step 1/2  loss 0.5")
    assert capsys.readouterr().err == "step 1/2  loss 0.5\n"
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith(" step 1/2  loss 0.5\n")
