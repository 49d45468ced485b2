"""The arrows between packages are those of the architecture, and nothing else."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "lungssl_ops": set(),
    "lungssl_data": {"lungssl_ops"},
    "lungssl_backbones": {"lungssl_ops"},
    "lungssl_methods": {"lungssl_ops", "lungssl_data", "lungssl_backbones"},
    "lungssl_tasks": {"lungssl_ops", "lungssl_data", "lungssl_backbones"},
    "lungssl": {"lungssl_ops", "lungssl_data", "lungssl_backbones", "lungssl_methods", "lungssl_tasks"},
}
SOURCES = sorted(ROOT.glob("packages/*/src/*")) + sorted(ROOT.glob("apps/*/src/*"))


def imported(source: str) -> set[str]:
    """Top-level names of all absolute imports, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_every_package_is_in_the_table() -> None:
    assert {path.name for path in SOURCES} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", SOURCES, ids=lambda path: path.name)
def test_a_package_imports_only_rows_above_its_own(package: Path) -> None:
    for path in package.rglob("*.py"):
        siblings = (imported(path.read_text(encoding="utf-8")) & set(MAY_IMPORT)) - {package.name}
        assert siblings <= MAY_IMPORT[package.name], f"{path.relative_to(ROOT)} imports {siblings}"


@pytest.mark.parametrize("package", SOURCES, ids=lambda path: path.name)
def test_every_sibling_imported_is_declared(package: Path) -> None:
    declared = (package.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for path in package.rglob("*.py"):
        for sibling in (imported(path.read_text(encoding="utf-8")) & set(MAY_IMPORT)) - {package.name}:
            assert f'"{sibling.replace("_", "-")}==' in declared, f"{path.relative_to(ROOT)} needs {sibling}"


@pytest.mark.parametrize("package", SOURCES, ids=lambda path: path.name)
def test_every_library_imported_is_declared(package: Path) -> None:
    """Those imported inside functions, too, which an installation without them would miss only when it gets there."""
    config = tomllib.loads((package.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for group in config.get("optional-dependencies", {}).values() for one in group]
    declared = {distribution(re.split(r"[^A-Za-z0-9._-]", one)[0]) for one in [*config["dependencies"], *extras]}
    from_name = metadata.packages_distributions()
    for path in package.rglob("*.py"):
        libraries = imported(path.read_text(encoding="utf-8")) - set(MAY_IMPORT) - sys.stdlib_module_names
        libraries -= {"triton"}  # comes with torch where there is one
        if path.name == "bench.py":  # peers to compare with, left out where they aren't installed
            continue
        for library in sorted(libraries):
            known = {distribution(one) for one in from_name.get(library, [library])}
            assert known & declared, f"{path.relative_to(ROOT)} imports {library}, of none of {sorted(declared)}"


def distribution(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_a_forbidden_arrow_would_be_seen() -> None:
    assert "lungssl_methods" in imported("def f():\n    from lungssl_methods.dino import Dino\n")
