"""Comparisons as a user makes them, on phantoms of 8 mm and runs of three steps."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lungssl.cli import main
from lungssl.cohort import CohortConfig, make_cohort
from lungssl.comparison import estimates, findings, runs
from lungssl.comparison.cost import Cost, check_fair
from lungssl.comparison.findings import contrasts, power_note, sentences, shown_interval
from lungssl.comparison.judging import Judge
from lungssl.comparison.plan import ENDPOINTS, Plan, Regime, finetune_runs, load_plan, pretrain_runs, shard_of
from lungssl.comparison.runs import Outcome, array_of, carry_out
from lungssl.errors import ConfigError, DataError
from lungssl.recipe_files import list_recipes
from lungssl.reports.comparison_report import area_under, write_report
from lungssl.training.run_folder import environment
from lungssl_data.cache import PairCache
from lungssl_tasks.registration import EstimateConfig
from safetensors.torch import load_file

FIT = ("frozen", "full")
SMALL: dict[str, Any] = {
    "title": "Does it pay?",
    "recipe": "demo/pretrain",
    "overrides": [
        "train.steps=3",
        "train.batch=2",
        "train.eval_every=3",
        "train.checkpoint_every=1",
        "views.local_vox=8",
    ],
    "arms": {
        "A0": {"isolates": "floor", "pretrained": False},
        "A1": {"isolates": "one phase", "overrides": ["data.phases=exhale", "method.pairs=within"]},
        "A4": {"isolates": "pairing", "overrides": ["method.pairs=cross"]},
    },
    "contrasts": [["A4", "A1"], ["A4", "A0"]],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    for _ in make_cohort(CohortConfig(patients=12, spacing_mm=8.0), folder):
        pass
    return folder


def write_plan(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def quiet(line: str) -> None:
    """Say nothing."""


def values(outcome: Outcome) -> dict[str, Any]:
    return {name: (row["values"], row["scalars"]) for name, row in outcome.results.items()}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("whole")
    return carry_out(load_plan(write_plan(folder / "plan.yml")), data=data, out=folder / "out", say=quiet)


@pytest.mark.parametrize("name", list_recipes("plan"))
def test_shipped_plans_resolve(name: str) -> None:
    plan = load_plan(name)
    runs = pretrain_runs(plan, "data")
    assert len({run.id for run in runs}) == len(runs) == len(plan.arms) * len(plan.seeds)
    assert len({one.id for run in runs for one in finetune_runs(plan, run)}) >= len(runs) * (plan.labels is not None)
    assert load_plan(name, [f"seeds={list(plan.seeds)}"]) == plan


def test_a_plans_mistakes_are_named(tmp_path: Path) -> None:
    plan = str(write_plan(tmp_path / "plan.yaml"))
    with pytest.raises(ConfigError, match="contrasts name arm 'A5'; known: A0, A1, A4"):
        load_plan(plan, ["contrasts=[[A5, A1]]"])
    with pytest.raises(ConfigError, match=r"plan\.sedes: unknown key; did you mean 'seeds'"):
        load_plan(plan, ["sedes=[1]"])
    with pytest.raises(ConfigError, match=r"seeds must be different and at least one, got \[1, 1\]"):
        load_plan(plan, ["seeds=[1,1]"])
    with pytest.raises(ConfigError, match=r"primary names endpoint 'dyce'; did you mean 'dice'"):
        load_plan(plan, ["primary=[dyce]"])
    with pytest.raises(ConfigError, match=r"arms\.A4: .*unknown key"):
        pretrain_runs(load_plan(plan, ["arms.A4.overrides=[train.stebs=3]"]), "data")
    with pytest.raises(ConfigError, match=r"primary 'dice@7' is of 7 labelled patients"):
        load_plan(plan, ["primary=[dice@7]", "labels.patients=[5]"])
    with pytest.raises(ConfigError, match=r"primary_contrasts has \('A0', 'A1'\), which contrasts hasn't"):
        load_plan(plan, ["primary_contrasts=[[A0, A1]]"])
    with pytest.raises(ConfigError, match=r"arms\.A0\.weights: no file none\.safetensors"):
        pretrain_runs(load_plan(plan, ["arms.A0.weights=none.safetensors"]), "data")
    with pytest.raises(ConfigError, match=r"weights x of another training: set pretrained: false"):
        load_plan(plan, ["arms.A1.weights=x"])
    for override, said in (
        ("arms.A4.displacment=estimated", r"plan\.arms\.A4\.displacment: unknown key; did you mean 'displacement'"),
        ("labels.drawz=4", r"plan\.labels\.drawz: unknown key; did you mean 'draws'"),
        ("shift.textur_rho=0", r"plan\.shift\.textur_rho: unknown key; did you mean 'texture_rho'"),
        ("phantoms.texture_rho=7", "a texture_rho of 0 to 1, got 16, 5 and 7"),
        ("contrasts=[[A1, A1]]", "contrasts compare A1 with itself"),
        ("contrasts=[]", r"contrasts must be different and at least one, got \[\]"),
        ("primary=[]", r"primary must be different and at least one, got \[\]"),
        ("primary=[dice]", "primary 'dice' is of models learned from labels, and the plan has no `labels`"),
        ("primary=[landmark_mm@5]", "landmark_mm is of the encoder, without labels; write 'landmark_mm'"),
        ("primary=[shift_near_mm]", "primary 'shift_near_mm' is of a shift test, and the plan has no `shift`"),
        ("primary_contrasts=[]", "primary_contrasts is empty; leave it out"),
        ("window_vox=0", "window_vox must be 1 to 1024, got 0"),
        ("window_vox=1000000", "window_vox must be 1 to 1024, got 1000000"),
        ("primary=['dice@']", "primary 'dice@': write how many labelled patients after the @"),
        ("seeds=[-1]", r"seeds must be 0 or more, got \[-1\]"),
        ("contrasts=[[A4, A1], [A1, A4]]", "contrasts have A4 and A1 both ways"),
        ("contrasts=[[affine, A1]]", "contrasts name arm 'affine'"),
        ("arms.affine={isolates: x}", "an arm can't be called 'affine'"),
        ("arms.A1.overrides=[seed=5]", "overrides have 'seed=5', and a plan's seeds are in `seeds`"),
        ("labels={overrides: [seed=5]}", "overrides have 'seed=5'"),
        ("labels={patients: [5, 5]}", r"labels\.patients must be different and at least one, got \[5, 5\]"),
        ("labels={modes: []}", r"labels\.modes must be different and at least one, got \[\]"),
        ("labels={draws: 0}", r"labels\.draws must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_plan(plan, [override])
    with pytest.raises(
        ConfigError, match=r"primary 'dice@5' is of all weights trained, and labels\.modes has no `full`"
    ):
        load_plan(plan, ["labels={patients: [5], modes: [frozen]}", "primary=[dice@5]"])
    for text, said in (
        ("? [a, b]\n: 1", r"key \['a', 'b'\] is no word"),
        ("[" * 3000, "not valid YAML: nested too deep"),
    ):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_plan(str(tmp_path / "broken.yaml"))
    odd = write_plan(tmp_path / "odd.yaml", arms=SMALL["arms"] | {"../x": {"isolates": "y", "pretrained": False}})
    with pytest.raises(ConfigError, match=r"arm '\.\./x': expected a letter or digit"):
        load_plan(str(odd))
    with pytest.raises(ConfigError, match="no such plan file"):
        load_plan(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"--shard 3/2: expected i/n"):
        shard_of([], "3/2")


def test_a_changed_plan_touches_only_what_the_change_decides(tmp_path: Path) -> None:
    path = str(write_plan(tmp_path / "plan.yaml", labels={"patients": [1, 2]}))

    def ids(*overrides: str) -> dict[str, list[str]]:
        plan = load_plan(path, overrides)
        return {run.arm: [run.id, *(f.id for f in finetune_runs(plan, run))] for run in pretrain_runs(plan, "data")}

    before = ids()
    assert ids("title=Other", "contrasts=[[A1, A0]]") == before
    arm = ids("arms.A4.overrides=[method.pairs=all]")
    assert arm["A1"] == before["A1"] and arm["A0"] == before["A0"] and not set(arm["A4"]) & set(before["A4"])
    labels = ids("labels.patients=[1,3]")
    assert {arm: one[:2] for arm, one in labels.items()} == {arm: one[:2] for arm, one in before.items()}
    assert labels["A1"][2] != before["A1"][2]
    longer = ids("overrides=[train.steps=5]")
    assert longer["A0"] == before["A0"] and longer["A1"][0] != before["A1"][0]  # nothing is trained in A0
    assert ids("overrides=[views.global_vox=24]")["A0"] != before["A0"]  # it is judged by windows of that size
    windows = ids("window_vox=32")
    assert windows["A0"][0] != before["A0"][0] and windows["A1"][0] != before["A1"][0]


def test_an_unfair_plan_is_refused_with_the_figure(data: Path, tmp_path: Path) -> None:
    plan = load_plan(str(write_plan(tmp_path / "p.yaml")), ["arms.A4.overrides=[method.pairs=cross,train.steps=4]"])
    with pytest.raises(
        ConfigError, match=r"unfair: A4 has 4 steps and A1 3 steps \(\+33.3%\).*set arms.A4.* train.steps=3"
    ):
        carry_out(plan, data=data, out=tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()
    larger = load_plan(
        str(write_plan(tmp_path / "q.yaml", equalise="flops")), ["arms.A4.overrides=[views.locals_per_slot=3]"]
    )
    with pytest.raises(ConfigError, match=r"unfair: A4 has [\d.e-]+ TFLOP and A1 [\d.e-]+ TFLOP \(\+.*within 2%"):
        carry_out(larger, data=data, out=tmp_path / "out", say=quiet)


def test_primary_is_what_was_declared_beforehand() -> None:
    plan = load_plan("phases")
    five = Regime(patients=5)
    assert plan.is_primary(("A5", "A1"), "dice", five) and plan.is_primary(("A5", "A1"), "registration_mm", None)
    assert not plan.is_primary(("A5", "A1"), "dice", Regime(patients=5, mode="frozen"))
    assert not plan.is_primary(("A5", "A4"), "dice", five) and not plan.is_primary(("A5", "A1"), "nsd", five)


def test_frozen_probes_a_shift_test_estimates_and_foreign_weights(
    whole: Outcome, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small comparison with all that a plan can ask for beside A0, A1 and A4."""
    monkeypatch.setattr(runs, "EstimateConfig", lambda: EstimateConfig(iterations=1))
    shift = tmp_path / "shift"
    for _ in make_cohort(CohortConfig(patients=1, spacing_mm=8.0, seed=900, motion="ffd"), shift):
        pass
    encoder = next(whole.folder.glob("runs/A4-*/export/encoder.safetensors"))
    dense = ["method={name: phase_dino, prototypes: 32, head_hidden: 16, head_bottleneck: 8, mass_weight: 0}"]
    dense += ["data.patients=2", "train.steps=1"]
    plan = load_plan(
        str(
            write_plan(
                tmp_path / "p.yaml",
                arms={
                    "A5": {"isolates": "geometry", "displacement": "estimated", "overrides": dense},
                    "S": {"isolates": "another training", "pretrained": False, "weights": str(encoder)},
                },
                contrasts=[["A5", "S"]],
                primary=["dice@1"],
                labels={"recipe": "demo/segment", "patients": [1], "modes": ["frozen", "full"]}
                | {"overrides": ["train.steps=2", "train.eval_batches=0", "views.global_vox=32"]},
                shift={},
            )
        )
    )
    with pytest.raises(ConfigError, match="`shift` and --shift-data belong together"):
        carry_out(plan, data=data, out=tmp_path / "none", say=quiet)
    with pytest.raises(ConfigError, match=r"has 12 patients of --data, e\.g\. phantom000; take others"):
        carry_out(plan, data=data, shift=data, out=tmp_path / "none", say=quiet)
    for _ in make_cohort(CohortConfig(patients=1, spacing_mm=7.0, seed=950), tmp_path / "coarse"):
        pass
    with pytest.raises(ConfigError, match=r"is for voxels of 8 mm, .*coarse has 7 mm"):
        carry_out(plan, data=data, shift=tmp_path / "coarse", out=tmp_path / "none", say=quiet)
    outcome = carry_out(plan, data=data, shift=shift, out=tmp_path / "out", say=quiet)
    assert not outcome.missing and all(row["failed"] is None for row in outcome.results.values())
    assert outcome.costs["A5"].registration_s > 0 and "MIND-SSC" in outcome.costs["A5"].displacement
    estimated = {path.stem for path in (tmp_path / "out/estimated").glob("*/*.h5")}
    assert len(estimated) == 9 and not estimated & set(PairCache(data).split("test"))
    same, there = array_of(outcome, "S", "landmark_mm"), array_of(whole, "A4", "landmark_mm")
    assert same is not None and there is not None and (same[1] == there[1]).all()
    for mode in ("frozen", "full"):
        regime = Regime(patients=1, mode=mode)
        for endpoint, patients in (("dice", 3), ("airless_g", 3), ("recruited_g", 3), ("shift_dice", 1)):
            found = array_of(outcome, "A5", endpoint, regime)
            assert found is not None and found[1].shape == (patients, 1, 1) and (found[1] >= 0).all()
    frozen, full = (load_file(next((tmp_path / "out/runs").glob(f"A5-{m}-*/export/model/*.safetensors"))) for m in FIT)
    weights = load_file(next((tmp_path / "out/runs").glob("A5-seed0-*/export/encoder.safetensors")))
    key = "stem.weight"
    assert (frozen[f"encoder.{key}"] == weights[key]).all() and (full[f"encoder.{key}"] != weights[key]).any()
    html = write_report(outcome).read_text()
    assert "1 labelled, frozen" in html and "TRE, matched features, shifted" in html and "registration, min" in html


def test_what_is_fair_is_within_two_percent() -> None:
    def cost(tflop: int, samples: int = 10, steps: int = 5) -> Cost:
        return Cost(
            steps=steps, samples=samples, patients=1, scans=1, voxels=1, tokens=1, flops=tflop * 10**12, displacement=""
        )

    floor = cost(0, 0, 0)
    check_fair({"a": cost(1000), "floor": floor, "b": cost(1020)}, "flops")
    with pytest.raises(ConfigError, match=r"b has 1021 TFLOP and a 1000 TFLOP \(\+2\.1%\)"):
        check_fair({"a": cost(1000), "floor": floor, "b": cost(1021)}, "flops")
    with pytest.raises(ConfigError, match=r"b has 20 samples and a 10 .*the same train\.batch"):
        check_fair({"a": cost(1000), "floor": floor, "b": cost(1000, 20)}, "steps")


def test_a_comparison_reports_every_arm_by_patient(whole: Outcome) -> None:
    assert not whole.missing and len(whole.results) == 3
    assert whole.costs["A0"].flops == 0 and whole.costs["A1"].scans * 2 == whole.costs["A4"].scans
    assert whole.costs["A1"].samples == whole.costs["A4"].samples == 6
    found = array_of(whole, "A4", "landmark_mm")
    assert found is not None
    patients, errors = found
    assert len(patients) == 3 and errors.shape == (3, 1, 1) and (errors > 1).all() and (errors < 300).all()
    html = write_report(whole).read_text()
    markdown = (whole.folder / "report.md").read_text()
    for text in (html, markdown):
        assert "A4 against A1, landmark error: no answer" in text and "fewer than 5 patients" in text
    assert html.count("data:image/png") == 2 and "http" not in html.replace("http-equiv", "")
    lines = (whole.folder / "patients.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 8 * 3  # arms, figures, patients
    assert not any(line.startswith("/") for line in markdown.splitlines())


def test_a_finished_comparison_repeats_nothing_and_a_killed_one_goes_on(
    whole: Outcome, data: Path, tmp_path: Path
) -> None:
    """SIGKILL in the second run, once it has a checkpoint: the results are those of the comparison that was not."""
    plan = write_plan(tmp_path / "plan.yaml")
    command = [sys.executable, "-c", "import sys; from lungssl.cli import main; sys.exit(main(sys.argv[1:]))"]
    arguments = ["compare", str(plan), "--data", str(data), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, *arguments],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("runs/A1-*/checkpoints/step_1")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/results").glob("*.json")}
    assert len(kept) == 1
    assert main(arguments) == 0
    outcome = carry_out(load_plan(str(plan)), data=data, out=tmp_path / "out", say=quiet)
    assert values(outcome) == values(whole)
    name, written = next(iter(kept.items()))
    assert (tmp_path / "out/results" / name).stat().st_mtime_ns == written
    assert not list((tmp_path / "out").glob("runs/*/checkpoints"))


def test_shards_made_apart_are_one_comparison(whole: Outcome, data: Path, tmp_path: Path) -> None:
    plan = str(write_plan(tmp_path / "plan.yaml"))
    for part in ("1/2", "2/2"):
        out = tmp_path / part.replace("/", "-")
        assert main(["compare", plan, "--data", str(data), "--out", str(out), "--shard", part]) == 0
        assert not (out / "report.html").exists()
    shutil.copytree(tmp_path / "2-2/results", tmp_path / "1-2/results", dirs_exist_ok=True)
    outcome = carry_out(load_plan(plan), data=data, out=tmp_path / "1-2", say=quiet)
    assert not outcome.missing and values(outcome) == values(whole)


# Jobs outlive the command that started them, of which Python warns.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_jobs_in_the_background_make_what_the_command_makes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    floors = {name: {"isolates": "floor", "pretrained": False} for name in ("first", "second")}
    plan = str(write_plan(tmp_path / "plan.yaml", arms=floors, contrasts=[["second", "first"]]))
    command = ["compare", plan, "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*command, "--launcher", "local", "--shards", "2", "--job", "timeout_min=5"]) == 0
    assert "2 jobs:" in capsys.readouterr().out
    deadline = time.monotonic() + 240
    while len(list((tmp_path / "out/results").glob("*.json"))) < 2:
        assert time.monotonic() < deadline, [p.read_text() for p in (tmp_path / "out/jobs").glob("*.err")]
        time.sleep(0.2)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/results").glob("*.json")}
    assert main(command) == 0 and (tmp_path / "out/report.html").is_file()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/results").glob("*.json")} == made


def test_a_run_that_another_process_makes_is_left_out_with_what_starts_from_it(data: Path, tmp_path: Path) -> None:
    floors = {name: {"isolates": "floor", "pretrained": False} for name in ("first", "second")}
    short = ["train.steps=2", "train.eval_batches=0", "train.checkpoint_every=2", "views.global_vox=32"]
    labels = {"recipe": "demo/segment", "patients": [1], "overrides": short}
    changes: dict[str, Any] = {"arms": floors, "contrasts": [["second", "first"]], "labels": labels}
    plan = load_plan(str(write_plan(tmp_path / "plan.yaml", **changes)))
    cache = PairCache(data)
    first = pretrain_runs(plan, cache.fingerprint())[0]
    learned = finetune_runs(plan, first)
    assert learned
    (tmp_path / "out/runs").mkdir(parents=True)
    (tmp_path / "out/plan.yaml").touch()
    said: list[str] = []
    with open(tmp_path / "out/runs" / f".{first.id}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = carry_out(plan, data=data, out=tmp_path / "out", say=said.append)
    assert {first.id, *(one.id for one in learned)} <= set(outcome.missing)
    assert sum("another process" in line for line in said) == 1 + len(learned)


def test_what_cannot_be_submitted_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(write_plan(tmp_path / "p.yaml")), "--data", str(data), "--out", str(tmp_path / "out")]
    for more, said in (
        (["--shards", "2"], "add --launcher local or slurm"),
        (["--launcher", "local", "--shard", "1/2"], "starts all: leave one of them out"),
        (["--launcher", "local", "--job", "gpus"], "expected KEY=VALUE"),
        (["--launcher", "local", "--shards", "0"], "--shards 0: expected 1 or more"),
        (["--launcher", "local", "--job", "minutes=3"], "minutes"),
        (["--launcher", "slurm"], "--launcher slurm"),
    ):
        monkeypatch.setattr(runs, "describe", lambda *_, **__: "")
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err


def test_a_run_that_breaks_down_is_told_and_drops_no_arm_silently(data: Path, tmp_path: Path) -> None:
    plan = load_plan(
        str(write_plan(tmp_path / "plan.yaml")),
        ["arms.A1.overrides=[data.phases=exhale,method.pairs=within,train.lr=1.0e+30,train.warmup=0,train.clip=0]"],
    )
    outcome = carry_out(plan, data=data, out=tmp_path / "out", say=quiet)
    failed = [row for row in outcome.results.values() if row["failed"]]
    assert len(failed) == 1 and failed[0]["arm"] == "A1" and "is nan at step" in failed[0]["failed"]
    assert "is nan at step" in write_report(outcome).read_text()


def test_a_used_folder_that_is_no_comparison_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    plan = str(write_plan(tmp_path.parent / "plan.yaml"))
    assert main(["compare", plan, "--data", str(data), "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no comparison" in capsys.readouterr().err
    assert main(["compare", "tinny", "--out", str(tmp_path)]) == 2
    assert "unknown plan 'tinny'; did you mean 'tiny'?" in capsys.readouterr().err
    assert main(["compare", plan, "--data", str(data)]) == 2
    assert "--out is missing" in capsys.readouterr().err


def test_a_folder_whose_displacements_are_being_estimated_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "estimated" / "1234").mkdir(parents=True)  # killed there, or another shard is there now
    runs.check_folder(tmp_path)
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match="holds no comparison"):
        runs.check_folder(tmp_path)


def test_more_labels_than_there_are_are_refused_before_any_run(data: Path, tmp_path: Path) -> None:
    plan = load_plan(str(write_plan(tmp_path / "plan.yaml", labels={"patients": [1, 50]}, primary=["dice"])))
    with pytest.raises(ConfigError, match=r"asks for 50 labelled patients, and \d of split train have lobes"):
        carry_out(plan, data=data, out=tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


def test_a_run_that_another_process_makes_is_left_to_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load_plan(str(write_plan(tmp_path / "plan.yaml")))
    held, *others = [run.id for run in pretrain_runs(plan, PairCache(data).fingerprint())]
    made: list[str] = []
    monkeypatch.setattr(runs, "fair_costs", lambda *_, **__: {})
    monkeypatch.setattr(runs._Worker, "_make", lambda self, step: made.append(step.id))
    (tmp_path / "out/runs").mkdir(parents=True)
    (tmp_path / "out/plan.yaml").touch()
    with open(tmp_path / f"out/runs/.{held}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = carry_out(plan, data=data, out=tmp_path / "out", say=quiet)
    assert made == others and held in outcome.missing
    carry_out(plan, data=data, out=tmp_path / "out", say=quiet)
    assert made == [*others, held, *others]  # let go of; nothing was written, so all are made again


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "A0-seed0-12345678.json"
    whole = {"id": path.stem, "arm": "A0", "seed": 0, "failed": None, "values": {}, "scalars": {}}
    whole |= {"seconds": 1.0, "commit": None}
    wrong: list[dict[str, Any]] = [
        {"arm": "B0"},
        {"id": "A1"},
        {"values": None},
        {"values": {"dice": {"p0": "0.9"}}},
        {"scalars": {"rankme": None}},
        {"failed": "boom", "values": {"dice": {"p0": 0.9}}},
    ]
    for text in ("", "{", json.dumps({"id": "x"}), *(json.dumps(whole | change) for change in wrong)):
        path.write_text(text)
        with pytest.raises(
            DataError, match=r"A0-seed0-12345678\.json: damaged, .* delete it, and the run is made again"
        ):
            runs.read_result(path)
    path.write_text(json.dumps(whole))
    assert runs.read_result(path) == whole


def test_labels_without_the_encoder_are_no_failed_run(data: Path, tmp_path: Path) -> None:
    plan = load_plan(str(write_plan(tmp_path / "plan.yaml", labels={"patients": [1]}, primary=["dice"])))
    parent = pretrain_runs(plan, "data")[0]
    result = {"id": parent.id, "arm": "A0", "seed": 0, "failed": None, "values": {}, "scalars": {}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{parent.id}.json").write_text(json.dumps(result | {"seconds": 1.0, "commit": None}))
    worker = runs._Worker(caches={"cache": data}, judge=Judge(PairCache(data), None), out=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="copy runs/ of all shards into"):
        worker._finetune(finetune_runs(plan, parent)[0])


def test_estimates_of_other_scans_are_others(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    for _ in make_cohort(CohortConfig(patients=3, spacing_mm=8.0, seed=700), other):
        pass
    calls: list[str] = []

    def estimate(pair: Any, config: EstimateConfig) -> Any:
        calls.append(pair.patient)
        return pair.displacement

    monkeypatch.setattr(estimates, "estimate_displacement", estimate)
    folders = [
        estimates.estimated_cache(PairCache(where), tmp_path / "estimated", EstimateConfig(), say=quiet)
        for where in (data, other, data)
    ]
    assert folders[0] == folders[2] != folders[1]
    assert len(calls) == len({*PairCache(data).split("train"), *PairCache(data).split("val")}) + len(
        {*PairCache(other).split("train"), *PairCache(other).split("val")}
    )
    made = PairCache(data).split("train")[:2]
    assert estimates.registration_seconds(folders[0], made) <= estimates.registration_seconds(folders[0], calls)


def test_a_dry_run_says_what_it_would_cost(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(write_plan(tmp_path / "plan.yaml"))
    assert main(["compare", plan, "--data", str(data), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 encoders, 0 models" in said and "A1       one phase: 7 patients, 7 scans, 3 steps" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml"]


def test_the_area_under_a_label_curve_is_its_mean_height() -> None:
    assert area_under(np.array([1.0, 2.0, 8.0]), np.array([0.2, 0.4, 0.8])) == pytest.approx((0.3 + 2 * 0.6) / 3)


def planted(
    tmp_path: Path, effect: dict[str, float], contrasts: tuple[tuple[str, str], ...] = (("A4", "A1"),)
) -> Outcome:
    """Two seeds, twelve patients with errors about 6 mm."""
    plan = Plan(
        title="Planted",
        recipe="demo/pretrain",
        arms=load_plan("tiny").arms,
        contrasts=contrasts,
        primary=("landmark_mm",),
        seeds=(0, 1),
    )
    results = {
        f"{arm}-{seed}": {
            "id": f"{arm}-{seed}",
            "arm": arm,
            "seed": seed,
            "failed": None,
            "commit": None,
            "values": {
                "landmark_mm": {
                    f"p{i}": 6
                    + 0.3 * i
                    + effect.get(arm, 0)
                    + 0.1 * ((7 * i + 3 * seed + len(arm)) % 5 - 2) * (arm != "A1")
                    for i in range(12)
                }
            },
            "scalars": {},
        }
        for arm in plan.arms
        for seed in plan.seeds
    }
    return Outcome(folder=tmp_path, plan=plan, costs={}, results=results, missing=[])


@pytest.mark.parametrize(
    ("shift_mm", "said"),
    [(-1.0, "A4 is better."), (1.0, "A4 is worse."), (0.0, "They are equivalent, within ±0.2 mm.")],
)
def test_planted_effects_are_told_in_plain_words(tmp_path: Path, shift_mm: float, said: str) -> None:
    outcome = planted(tmp_path, {"A4": shift_mm})
    (sentence,) = sentences(outcome, contrasts(outcome))
    assert sentence.startswith("A4 against A1, landmark error:") and sentence.endswith(said)
    assert "12 patients" in sentence


def test_what_one_seed_alone_shows_is_said_to_be_of_these_seeds(tmp_path: Path) -> None:
    outcome = planted(tmp_path, {"A4": -1.0})
    for patient in (figures := outcome.results["A4-1"]["values"]["landmark_mm"]):
        figures[patient] += 1.2  # with this seed A4 is no better
    (sentence,) = sentences(outcome, contrasts(outcome))
    assert "A4 is better with these encoders; for other seeds it isn't shown (p 0." in sentence


def test_arms_are_compared_with_no_encoder_at_all(tmp_path: Path) -> None:
    outcome = planted(tmp_path, {"A4": -1.0, "A1": 0.0}, contrasts=(("A4", "affine"), ("A1", "affine")))
    floor = {patient: 6 + 0.3 * i for i, patient in enumerate(f"p{i}" for i in range(12))}
    outcome = dataclasses.replace(outcome, floors={"landmark_mm": floor})
    found = {one.key: one for one in contrasts(outcome)}
    assert all(ENDPOINTS[one.endpoint].of_places for one in found.values())
    better, same = (found[arm, "affine", "landmark error"] for arm in ("A4", "A1"))
    assert better.difference is not None and better.difference.mean == pytest.approx(-1.0, abs=0.05)
    assert better.verdict() == "better" and same.verdict() == "equivalent"
    outcome = dataclasses.replace(
        outcome, plan=dataclasses.replace(outcome.plan, contrasts=(("A1", "A0"), *outcome.plan.contrasts),
                                          primary_contrasts=(("A1", "A0"),))
    )  # fmt: skip
    said = sentences(outcome, contrasts(outcome))
    assert said[1:] == [
        "landmark error: the coarse affine alone, without any encoder, has 7.6 mm. Shown to be better than it "
        "(exploratory): A4 of A4, A1."
    ]
    (tmp_path / "env.json").write_text(json.dumps(environment() | {"data": "none"}))
    assert "the coarse affine alone, no encoder" in write_report(outcome).read_text()


def test_an_interval_holds_no_difference_that_there_cannot_be() -> None:
    assert findings._possible((-0.2, 2.5), 1) == (-0.2, 1)
    assert findings._possible((float("-inf"), 0.5), 1) == (float("-inf"), 0.5)


def test_the_guides_plan_resolves(tmp_path: Path) -> None:
    """As it stands in the guide, but for the encoder of other people that it names."""
    guide = (Path(__file__).parents[3] / "docs" / "guide" / "compare.md").read_text()
    text = guide.split("```yaml\n")[1].split("```")[0].replace("other/encoder.safetensors", str(tmp_path / "encoder"))
    (tmp_path / "encoder").write_bytes(b"weights")
    (tmp_path / "plan.yaml").write_text(text)
    plan = load_plan(str(tmp_path / "plan.yaml"))
    for run in pretrain_runs(plan, "data"):
        assert finetune_runs(plan, run)


def test_what_lacks_a_run_has_no_answer_and_the_rest_has_one(tmp_path: Path) -> None:
    outcome = planted(tmp_path, {"A4": -1.0}, contrasts=(("A4", "A1"), ("A4", "A0")))
    (tmp_path / "env.json").write_text(json.dumps(environment() | {"data": "none"}))
    outcome.results["A1-1"] |= {"failed": "loss is nan at step 2", "values": {}}
    said = sentences(outcome, contrasts(outcome))
    assert said[0].startswith("A4 against A1, landmark error: no answer, as runs are missing or failed")
    assert said[1].startswith("A4 against A0") and said[1].endswith("A4 is better.")
    for text in (write_report(outcome).read_text(), (tmp_path / "report.md").read_text()):
        assert said[1] in text and "loss is nan at step 2" in text


def test_every_primary_contrast_is_adjusted_for_the_others(tmp_path: Path) -> None:
    outcome = planted(tmp_path, {"A4": -1.0})
    (one,) = [c for c in contrasts(outcome) if c.primary]
    assert one.difference is not None and one.p_holm == one.difference.p
    assert {c.endpoint for c in contrasts(outcome)} == {
        n for n, e in ENDPOINTS.items() if not e.of_labels and not n.startswith("shift_")
    }
    text = json.dumps([c.verdict() for c in contrasts(outcome)])
    assert text.count("missing") == 4  # the other figures weren't planted


def test_a_failed_run_makes_no_other_test_easier(tmp_path: Path) -> None:
    pairs = (("A4", "A1"), ("A4", "A0"))
    whole = planted(tmp_path, {"A4": -0.15, "A0": 0.5}, contrasts=pairs)
    before = {one.key: one.p_holm for one in contrasts(whole) if one.primary}
    for seed in (0, 1):
        whole.results[f"A0-{seed}"] |= {"failed": "loss is nan", "values": {}}
    after = {one.key: one for one in contrasts(whole) if one.primary}
    (kept,) = [one for one in after.values() if one.difference is not None]
    assert kept.difference is not None and kept.p_holm == min(1.0, 2 * kept.difference.p)
    assert kept.p_holm >= (before[kept.key] or 0)


def test_a_figure_that_is_missing_for_a_patient_or_no_number_has_no_answer(tmp_path: Path) -> None:
    outcome = planted(tmp_path, {"A4": -1.0})
    del outcome.results["A1-1"]["values"]["landmark_mm"]["p3"]
    assert contrasts(outcome)[0].verdict() == "missing"
    outcome = planted(tmp_path, {"A4": -1.0})
    outcome.results["A1-1"]["values"]["landmark_mm"]["p3"] = float("nan")
    assert contrasts(outcome)[0].verdict() == "missing"


def test_ties_give_no_interval_and_an_exploratory_contrast_needs_its_p(tmp_path: Path) -> None:
    (one,) = [c for c in contrasts(planted(tmp_path, {"A4": -1.0})) if c.primary]
    assert one.difference is not None and one.verdict() == "better"
    exploratory = dataclasses.replace(one, p_holm=None, primary=False)
    assert exploratory.verdict() == "better"
    weak = dataclasses.replace(exploratory, difference=dataclasses.replace(one.difference, p=0.067))
    assert weak.verdict() == "not shown"
    tied = dataclasses.replace(one.difference, interval_95=(float("-inf"), -0.1), interval_90=(float("-inf"), -0.2))
    assert dataclasses.replace(one, difference=tied).verdict() == "not shown"
    assert shown_interval(tied, 2) == "none, too many ties"


def test_a_plans_words_are_no_markup(tmp_path: Path) -> None:
    outcome = planted(tmp_path, {"A4": -1.0})
    arms = {name: dataclasses.replace(arm, isolates="a|b\n<i>c") for name, arm in outcome.plan.arms.items()}
    outcome = dataclasses.replace(
        outcome, plan=dataclasses.replace(outcome.plan, title="<script>1</script>", arms=arms)
    )
    (tmp_path / "env.json").write_text(json.dumps(environment() | {"data": "none"}))
    html, markdown = write_report(outcome).read_text(), (tmp_path / "report.md").read_text()
    assert "<script>1" not in html + markdown and "<i>" not in html + markdown
    assert "| a\\|b &lt;i>c |" in markdown


def test_an_experiment_that_can_show_nothing_says_so(tmp_path: Path) -> None:
    """Five patients: the least p is 2 / 32, above 0.05, however large the difference."""
    outcome = planted(tmp_path, {"A4": -5.0})
    assert power_note(contrasts(outcome)) is None
    for row in outcome.results.values():
        row["values"]["landmark_mm"] = {f"p{i}": row["values"]["landmark_mm"][f"p{i}"] for i in range(5)}
    found = contrasts(outcome)
    assert "With 5 patients and 1 primary tests no p after Holm can be below 0.062" in str(power_note(found))
    (sentence,) = sentences(outcome, found)
    assert sentence.endswith("The interval leaves 0 out, but not the p of all primary tests together: not shown.")
