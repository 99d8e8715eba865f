"""The commands as functions of Python."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from conftest import CHEAP, Counting

import diffes
from diffes.errors import DiffesError
from diffes.results.record import Report
from diffes.study.comparison import Comparison
from diffes.study.functions import Front

SMALL: dict[str, Any] = CHEAP | {"probes": 2, "heldout": 2, "max_evals": 3}


@pytest.mark.slow
def test_a_search_is_a_front_of_one_budget_or_a_report(tiny_folder: Path, tmp_path: Path) -> None:
    settings = SMALL | {"model": str(tiny_folder), "progress": Counting()}
    found = diffes.search(tmp_path / "plan", **settings, genes="steps", calls=2.0, nodes=6, fit_probes=2)
    assert isinstance(found, Front) and {point.budget for point in found.points} == {2.0}
    assert found.verdicts() and "| dense-fitted |" in found._repr_markdown_()
    report = diffes.search(tmp_path / "levels", **settings, genes="levels")
    assert isinstance(report, Report) and report.run.settings["genes"] == "levels"
    again = diffes.search(tmp_path / "plan", **settings, genes="steps", calls=2.0, nodes=6, fit_probes=2)
    assert isinstance(again, Front) and again == found and list(found.plans())[-1] == "dense-fitted, 2"
    read = diffes.search(tmp_path / "levels", **settings, genes="levels")
    assert isinstance(read, Report) and read == report
    with pytest.raises(DiffesError, match=r"holds a finished run .*genes was 'steps' and is 'levels'"):
        diffes.search(tmp_path / "plan", **settings, genes="levels")
    with pytest.raises(DiffesError, match="seed was 0 and is 1"):
        diffes.search(tmp_path / "levels", **settings, genes="levels", seed=1)
    assert (tmp_path / "plan" / "front.json").exists() and (tmp_path / "levels" / "report.json").exists()
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(DiffesError, match="to_dataframe needs pandas"):
            found.to_dataframe()
    else:
        assert list(report.to_dataframe()["name"])[:3] == ["searched", "uniform", "dense, fewer steps"]


@pytest.mark.slow
def test_comparisons_and_fronts_take_settings_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    plain = {name: value for name, value in SMALL.items() if name != "strategy"}
    settings = plain | {
        "model": str(tiny_folder),
        "progress": Counting(),
        "nodes": 6,
        "fit_probes": 2,
        "genes": "steps",
    }
    compared = diffes.compare(tmp_path / "compare", ["random", "evopress"], seeds=1, calls=2.0, **settings)
    assert isinstance(compared, Comparison) and len(compared.records) == 2
    varied = diffes.ablate(tmp_path / "ablate", {"solver": ["fitted", "ddim"]}, seeds=1, calls=2.0, **settings)
    assert [line["solver"] for line in varied.summary()] == ["fitted", "ddim"]
    front = diffes.front(tmp_path / "front", [1.0, 2.0], **settings)
    assert {point.budget for point in front.points} == {1.0, 2.0}
    with pytest.raises(DiffesError, match=r"unknown setting 'node'\. Did you mean 'nodes'"):
        diffes.front(tmp_path / "x", [1.0], node=3)
    with pytest.raises(DiffesError, match="use --budget instead"):
        diffes.search(tmp_path / "x", genes="levels", calls=3)
    assert not (tmp_path / "x").exists()
