"""The notebooks run from top to bottom, on the shipped pipeline with small settings, and are what they should be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SHORT = """
SETTINGS |= dict(method="magnitude", stages=2, steps=4, probes=2, heldout=2, calibration_samples=8, max_evals=3)
EVALUATIONS, SEEDS = 3, 1
"""
PLANS = "SETTINGS |= dict(nodes=8, fit_probes=2)\n"
ALSO = {
    "00": PLANS, "01": PLANS + 'STRATEGIES = ["evopress", "random"]', "02": PLANS,
    "03": "STAGES = [1, 2]; SETTINGS['budget'] = 0.8", "04": 'METRICS = ["ssim", "latent_mse"]', "05": PLANS,
    "06": PLANS + "GENERATIONS = 2", "07": PLANS + "BUDGETS = [2]",
}  # fmt: skip


def test_all_eight_are_there() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["00", "01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_short_small_and_was_executed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) < 25
    assert path.stat().st_size < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    functions = [line for cell in code for line in cell.source.splitlines() if line.startswith("def ")]
    assert functions == (["def slide(genome, *, space, rng):"] if path.stem.startswith("02") else [])


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """One for all: most of what a notebook takes here are its imports."""
    manager = NotebookClient(nbformat.v4.new_notebook()).create_kernel_manager()
    run_sync(manager.start_kernel)()
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, kernel: Any) -> None:
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += SHORT + ALSO.get(path.stem[:2], "")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path}"))
    NotebookClient(notebook, km=kernel, timeout=300).execute()
