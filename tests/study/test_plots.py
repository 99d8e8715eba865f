"""What figures say in words and limits; how they look is for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffes.search.schedule import Schedule, Stages
from diffes.study import plots


def test_the_steep_start_is_left_out_and_counted() -> None:
    fitness = [-100.0, -50.0, *np.linspace(0, 1, 30).tolist(), -80.0]
    axes = plots.convergence({"random": fitness}, "ssim").axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert "random, best so far (3 evaluations below)" in labels
    assert -2 < axes.get_ylim()[0] < 0 < 1 < axes.get_ylim()[1]


def test_the_best_so_far_holds_between_its_rises() -> None:
    points = [(10, 1.0), (20, 2.0), (40, 3.0)]
    assert plots._best_at(points, np.array([10, 15, 20, 39, 40, 99])).tolist() == [1, 1, 2, 2, 3, 3]


def test_the_median_of_the_seeds_is_drawn() -> None:
    curves = {"a": [[(10, level), (30, level + 1)] for level in (0.0, 2.0, 10.0)]}
    (line,) = plots.convergence_over_calls(curves, "ssim").axes[0].lines
    assert line.get_label() == "a (3 seeds)"
    assert np.asarray(line.get_ydata()).tolist() == [2, 3]


def test_schedules_run_from_noise_to_image() -> None:
    axes = plots.schedules({"found": Schedule(Stages.equal(2), (4, 0), 4)}).axes[0]
    left, right = axes.get_xlim()
    assert left > right
    steps: Any = axes.patches[0]
    assert steps.get_data().values.tolist() == pytest.approx([1, 0])


def test_a_figure_is_a_png_whatever_its_name(tmp_path: Path) -> None:
    plots.save(plots.table({"row": [1.0, 2.0]}, ["a", "b"]), tmp_path / "figure.partial")
    with Image.open(tmp_path / "figure.partial") as image:
        assert image.format == "PNG"
