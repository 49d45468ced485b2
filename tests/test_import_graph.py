"""The arrows between packages are those of the architecture, and nothing else."""

import ast
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


def test_a_forbidden_arrow_would_be_seen() -> None:
    assert "lungssl_methods" in imported("def f():\n    from lungssl_methods.dino import Dino\n")
