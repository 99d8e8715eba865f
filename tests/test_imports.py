"""The two columns of the architecture: who may import whom, read from the source."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffes
from diffes.spaces.operators import CROSSOVERS, MUTATIONS

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "pyiqa"}
ANYONE = {  # modules at the root that every folder may use
    "config", "errors", "files", "forms", "plugins", "progress", "registry",
}  # fmt: skip
ORDER = ["spaces", "results", "solvers", "adapters", "pruning", "runtime", "measure", "workers", "problems", "study"]
MAY_IMPORT = {folder: set(ORDER[:i]) for i, folder in enumerate(ORDER)}  # a folder may use those before it
MAY_IMPORT["adapters"] -= {"results"}
MAY_IMPORT["figures"] = {"spaces", "results", "solvers", "adapters"}
MAY_IMPORT["study"] |= {"figures"}
MAY_IMPORT["testing"] = set(ORDER) - {"results", "workers", "study"}


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


def parts_of_diffes(path: Path) -> set[str]:
    """Folders and root modules of diffes that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("diffes.")}


def test_imported_sees_every_form(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import torch.nn as nn\ndef f():\n    from diffes import runtime\n    from diffes.pruning.bank import Bank\n"
    )
    assert imported(source) >= {"torch.nn", "diffes.runtime", "diffes.pruning.bank"}
    assert packages(source) == {"torch", "diffes"}
    assert parts_of_diffes(source) == {"runtime", "pruning"}


def test_every_folder_has_its_rule() -> None:
    folders = {path.parent.name for path in (ROOT / "diffes").glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_itself_and_what_its_rule_allows(folder: str) -> None:
    files = sorted((ROOT / "diffes" / folder).rglob("*.py"))
    assert len(files) > 1
    for path in files:
        assert parts_of_diffes(path) <= MAY_IMPORT[folder] | {folder} | ANYONE, path


def test_what_anyone_may_use_imports_no_folder() -> None:
    for name in ANYONE:
        assert parts_of_diffes(ROOT / "diffes" / f"{name}.py") <= ANYONE


@pytest.mark.parametrize("path", sorted((ROOT / "diffes" / "spaces").rglob("*.py")), ids=lambda path: path.stem)
def test_spaces_know_no_torch(path: Path) -> None:
    assert not packages(path) & HEAVY


def test_the_library_never_imports_the_strategies() -> None:
    files = sorted((ROOT / "diffes").rglob("*.py"))
    assert len(files) > 20
    assert [str(path) for path in files if "search_strategies" in packages(path)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "search_strategies").rglob("*.py")), ids=lambda path: path.stem)
def test_strategies_import_only_spaces(path: Path) -> None:
    assert not packages(path) & HEAVY
    assert "diffes" not in imported(path), "import from the module itself, not from the package"
    assert parts_of_diffes(path) <= {"spaces"} | ANYONE


@pytest.mark.parametrize("path", sorted((ROOT / "diffes" / "spaces").rglob("*.py")), ids=lambda path: path.stem)
def test_spaces_call_no_operator_by_name(path: Path) -> None:
    names = {*MUTATIONS.names(), *CROSSOVERS.names()}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    texts = [str(node.value).split(":")[0] for node in nodes if isinstance(node, ast.Constant)]
    assert not names & set(texts)


@pytest.mark.slow
def test_strategies_are_imported_without_torch() -> None:
    modules = [f"{path.parent.name}.{path.stem}" for path in (ROOT / "search_strategies").glob("[a-z]*.py")]
    modules += ["diffes.spaces.loop", "diffes.spaces.store", "diffes.testing"]
    code = f"import sys, {', '.join(modules)}; print(sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def loaded(code: str, modules: set[str]) -> list[str]:
    """Which of these modules are there once a new process has run some code; what it prints itself is left out."""
    code += f"\nimport sys; print(); print(*sorted({modules!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[-1].split()


def test_help_and_the_package_itself_load_no_library_of_numbers_or_models() -> None:
    slow = HEAVY | {"numpy", "scipy", "deap", "optuna", "matplotlib", "safetensors", "rich"}
    show = (
        "from diffes.cli import main\ntry:\n    main([{}])\nexcept SystemExit as stopped:\n    assert not stopped.code"
    )
    assert loaded("import diffes", slow) == []
    assert loaded(show.format("'--help'"), slow) == []
    assert loaded(show.format("'search', '--help'"), slow) == []
    assert loaded("import numpy", slow) == ["numpy"]


def test_no_public_name_is_also_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(diffes.__path__)}
    assert not modules & set(diffes.__all__)  # importing the module would put it in the function's place
