"""A mutation in a package of somebody else: found by name, checked by the suite that ships, run by `diffes compare`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MUTATION = '''
"""A mutation that knows nothing of diffes but its convention."""


def borrow(genome, *, space, rng, most=2):
    """One stage takes up to `most` levels from the stage sampled before it."""
    stages = space.visited
    if len(stages) > 1:
        i = int(rng.integers(len(stages) - 1))
        taker, giver = stages[i], stages[i + 1]
        amount = min(int(rng.integers(1, most + 1)), genome[giver], space.max_level - genome[taker])
        genome[giver] -= amount
        genome[taker] += amount
        if int(rng.integers(2)):
            genome[taker], genome[giver] = genome[giver], genome[taker]
    return ([int(level) for level in space.repair(genome, rng)],)
'''
CONFORMANCE = """
from diffes.testing import MutationConformance


class TestBorrow(MutationConformance):
    name = "borrow:most=3"
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What `pip install` leaves of a package with one module and one entry point."""
    site = tmp_path / "site"
    info = site / "borrow-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "borrow_package.py").write_text(MUTATION)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: borrow\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[diffes.mutations]\nborrow = borrow_package:borrow\n")
    (tmp_path / "test_borrow.py").write_text(CONFORMANCE)
    return site


@pytest.mark.slow
def test_a_mutation_of_another_package(package: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert len(MUTATION.strip().splitlines()) <= 25
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(Path(__file__).parents[1])])}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, "-m", *command], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "6 passed" in run("pytest", "-q", "-p", "no:cacheprovider", "test_borrow.py")
    run(
        "diffes.cli", "compare", "--seeds", "2", "--model", str(tiny_folder),
        "--method", "magnitude", "--stages", "4", "--steps", "4", "--metric", "latent_mse", "--max-evals", "20",
        "--probes", "2", "--heldout", "2", "--out", "compared", "--strategies", "evolution:mutation=borrow", "random",
    )  # fmt: skip
    cells = [json.loads(line) for line in (tmp_path / "compared" / "cells.jsonl").read_text().splitlines()]
    assert [cell["settings"]["strategy"] for cell in cells] == ["evolution:mutation=borrow"] * 2 + ["random"] * 2
    journals = b"".join(path.read_bytes() for path in (tmp_path / "compared" / "journals").glob("*.journal"))
    assert b'"borrow"' in journals  # the operator, beside the evaluations that it led to
