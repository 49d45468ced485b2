import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from lungssl import cli
from lungssl.cli import VERBS, main
from lungssl.errors import DataError, TrainingError

COMMAND = [sys.executable, "-c", "import sys; from lungssl.cli import main; sys.exit(main())"]


def _cpu_s(arguments: list[str], *, repeats: int = 5) -> float:
    """Least CPU seconds of a child process: the rest is what other processes cost it."""
    best = float("inf")
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(arguments, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["pretrain", "--ot", "runs/a"], ["pretrain", "dino_vit_nan", "--out", "a"], ["pretrian"]],
    ids=["help", "option", "recipe", "verb"],
)
def test_start_up_costs_less_than_0_3_s_of_cpu_over_the_bare_interpreter(arguments: list[str]) -> None:
    bare = _cpu_s([sys.executable, "-c", ""])
    assert _cpu_s([*COMMAND, *arguments]) - bare < 0.3


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; from lungssl.cli import main; code = main({arguments})\n"
        "heavy = {'torch', 'numpy', 'scipy', 'monai', 'pydantic', 'h5py', 'SimpleITK'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy [] 0"


def test_help_says_research_use_only_and_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "Research use only" in re.sub(r"\s+", " ", text)
    assert all(re.search(rf"^  {verb} ", text, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if not VERBS[verb].endswith(":app")])
def test_every_verb_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"Example: lungssl {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pretrain", "--ot", "x"],
            "error: No such option: --ot (Possible options: --data, --job, --out); see `lungssl pret",
        ),
        (["pretrian"], "error: No such command 'pretrian'. Did you mean 'pretrain'?; see `lungssl --help`"),
        (["pretrain", "dino_vit_nan", "--out", "x"], "error: unknown recipe 'dino_vit_nan'; did you mean 'dino_vit_"),
        (["pretrain", "dino_vit_nano"], "error: --out is missing: name the run folder"),
        (["config", "show", "dino_vit_nano", "train.lrr=1"], "error: train.lrr: unknown key; did you mean 'lr'?"),
        (["config", "shw"], "error: No such command 'shw'. Did you mean 'show'?; see `lungssl config --help`"),
        (["list", "reciped"], "error: Invalid value for "),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith(message) and text.count("\n") == 1


class CacheLikeError(ValueError):
    """As the data package's errors look from here."""


CacheLikeError.__module__ = "lungssl_data.pair"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("dim 7 does not split"), 2, "error: dim 7 does not split\n"),
        (DataError("no inhale scan"), 3, "error: no inhale scan\n"),
        (CacheLikeError("cache format 9"), 3, "error: cache format 9\n"),
        (FileNotFoundError(2, "No such file", "a.nii"), 3, "error: [Errno 2] No such file: 'a.nii'\n"),
        (MemoryError("96 GiB"), 4, "error: out of memory (96 GiB); lower train.batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "error: out of memory"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (TrainingError("loss is nan at step 3"), 1, "error: loss is nan at step 3\n"),
        (KeyError("oops"), 1, "error: KeyError: 'oops' (a bug in lungssl? --debug shows where)\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_are_one_line_with_their_exit_code(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails() -> None:
        patient_name = "must not be printed"
        raise error from RuntimeError(patient_name)

    monkeypatch.setattr(cli, "_fails", fails, raising=False)
    monkeypatch.setitem(VERBS, "fails", "lungssl.cli:_fails")
    assert main(["fails"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(text) and printed.count("\n") == 1
    assert main(["fails", "--debug"]) == code
    debugged = capsys.readouterr().err
    assert "Traceback" in debugged or code == 130  # Typer turns Ctrl-C into an exit code itself
    assert "patient_name =" not in debugged


def test_out_of_memory_in_torch_is_exit_4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry() -> None:
        import torch

        torch.empty(2**50)

    monkeypatch.setattr(cli, "_hungry", hungry, raising=False)
    monkeypatch.setitem(VERBS, "hungry", "lungssl.cli:_hungry")
    assert main(["hungry"]) == 4
    assert "lower train.batch" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -c 'import sys; from lungssl.cli import main; sys.exit(main())' list | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stdout == "methods:\n" and done.stderr == ""


def test_list_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "recipes"]) == 0
    assert re.search(r"^finetune/segment +Lobe segmentation", capsys.readouterr().out, re.MULTILINE)
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert {"methods:", "backbones:", "recipes:", "layouts:", "tasks:"} <= set(text.splitlines())


def test_config_show_is_a_recipe_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "mae_vit_nano", "train.steps=7"]) == 0
    file = tmp_path / "shown.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["config", "show", str(file)]) == 0
    assert capsys.readouterr().out == file.read_text(encoding="utf-8")
    assert main(["config", "show", str(file), "--describe"]) == 0
    described = capsys.readouterr().out
    assert "# Optimizer steps." in described
    file.write_text(described)
    assert main(["config", "validate", str(file)]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


def test_doctor_reports_and_passes_its_self_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^torch +\d+\.\d+.* threads of \d+ cores$", text, re.MULTILINE)
    assert re.search(r"bf16 products: (AMX|AVX-512|emulated)$", text, re.MULTILINE)
    assert text.endswith("ok           lungssl works here\n")
