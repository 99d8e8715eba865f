"""The two columns of the architecture: who may import whom, read from the source."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffes

ROOT = Path(__file__).parents[1]
FIRST_COLUMN = ("errors", "registry", "schedule", "space", "strategy", "search", "store")
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "pyiqa"}


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth; names taken from packages count as modules too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def test_imported_sees_every_form(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import torch.nn as nn\ndef f():\n    from diffes import routing\n    from diffes.bank import Bank\n"
    )
    assert imported(source) >= {"torch.nn", "diffes.routing", "diffes.bank"}
    assert packages(source) == {"torch", "diffes"}


@pytest.mark.parametrize("module", FIRST_COLUMN)
def test_first_column_knows_no_torch_and_no_second_column(module: str) -> None:
    names = imported(ROOT / "diffes" / f"{module}.py")
    assert not {name.split(".")[0] for name in names} & (HEAVY | {"search_strategies"})
    assert {name.split(".")[1] for name in names if name.startswith("diffes.")} <= set(FIRST_COLUMN)


def test_the_library_never_imports_the_strategies() -> None:
    files = sorted((ROOT / "diffes").rglob("*.py"))
    assert len(files) > len(FIRST_COLUMN)
    assert [str(path) for path in files if "search_strategies" in packages(path)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "search_strategies").rglob("*.py")), ids=lambda path: path.stem)
def test_strategies_import_only_the_first_column(path: Path) -> None:
    names = imported(path)
    assert not {name.split(".")[0] for name in names} & HEAVY
    assert "diffes" not in names, "import from the module itself, not from the package"
    assert {name.split(".")[1] for name in names if name.startswith("diffes.")} <= set(FIRST_COLUMN)


def test_strategies_are_imported_without_torch() -> None:
    code = (
        "import sys, search_strategies.evolution, search_strategies.optuna_search, diffes.search, diffes.store; "
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_public_name_is_also_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(diffes.__path__)}
    assert not modules & set(diffes.__all__)  # importing the module would put it in the function's place
