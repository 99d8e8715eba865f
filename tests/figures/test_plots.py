"""What maps and image grids say in words, limits and colours; how they look is for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image

from diffes.figures import plots
from diffes.spaces.schedule import Schedule, Stages


def schedule(*levels: int) -> Schedule:
    return Schedule(Stages.equal(len(levels)), levels, 4)


def test_schedules_run_from_noise_to_image() -> None:
    axes = plots.schedules({"found": schedule(4, 0)}).axes[0]
    left, right = axes.get_xlim()
    assert left > right
    steps: Any = axes.patches[0]
    assert steps.get_data().values.tolist() == pytest.approx([1, 0])


def test_up_to_three_schedules_are_lines_where_they_are_and_all_to_be_seen() -> None:
    same = {name: schedule(4, 2) for name in ("a", "b", "c")}
    axes = plots.schedules(same).axes[0]
    lines: list[Any] = list(axes.patches)
    assert [line.get_data().values.tolist() for line in lines] == [[1, 0.5]] * 3
    assert len({line.get_linestyle() for line in lines}) == len({line.get_linewidth() for line in lines}) == 3
    assert axes.get_ylim()[1] < 1.05


def test_more_schedules_are_rows_of_a_map_with_the_spread_over_seeds_beside_it() -> None:
    named = {name: [schedule(4, 0), schedule(0, 0)] for name in "abcd"} | {"coarse": [schedule(2), schedule(2)]}
    mean, spread, *_ = plots.schedules(named).axes
    rows, deviations = ([np.asarray(mesh.get_array()) for mesh in axes.collections] for axes in (mean, spread))
    assert np.ravel(rows[0]).tolist() == [0.5, 0] and np.ravel(rows[4]).tolist() == [0.5]
    assert np.ravel(deviations[0]).tolist() == pytest.approx([0.5**0.5, 0]) and np.ravel(deviations[4]).tolist() == [0]
    assert [label.get_text() for label in mean.get_yticklabels()] == ["a (2)", "b (2)", "c (2)", "d (2)", "coarse (2)"]
    assert mean.get_xlim()[0] > mean.get_xlim()[1]


def test_strategies_look_the_same_in_every_figure_and_no_two_alike() -> None:
    names = ["evolution", "uniform", "mine", "random", "evolution:mu=2", "tpe"]
    looks = plots.looks(names)
    assert len(set(looks.values())) == len(names)
    assert all(plots.looks([name])[name] == looks[name] for name in ("evolution", "uniform", "random", "tpe"))
    assert len(plots.looks(map(str, range(40)))) == 40


@pytest.mark.parametrize("value", [0.913, -3e-4, 0.0, 1e5])
def test_an_axis_on_which_nothing_changes_does_not_count_in_billionths(value: float) -> None:
    low, high = plots.limits([value, value * (1 + 1e-9), float("nan"), -float("inf")])
    assert low < value < high and high - low >= 0.01 * abs(value)
    assert plots.limits([1, 2], below=0.5, above=0.25) == (0.5, 2.25) and plots.limits([]) == (0, 1)


def test_damage_is_on_a_logarithmic_scale_and_what_costs_nothing_is_explained() -> None:
    table = [[0, 1e-4, 1e-2], [0, -1e-3, 1e-1], [float("nan")] * 3]
    figure = plots.sensitivity(table, Stages.equal(3), "ssim")
    axes = figure.axes[0]
    (image,) = axes.images
    assert type(image.norm).__name__ == "LogNorm" and (image.norm.vmin, image.norm.vmax) == (1e-4, 1e-1)
    shown: Any = image.get_array()
    assert shown.mask.tolist() == [[True, True, False], [True, False, False]]  # levels upwards, noise on the left
    boxes = [(box.get_x(), box.get_y()) for box in axes.patches if isinstance(box, Rectangle)]
    assert boxes == [(0.5, 0.5), (-0.5, 0.5), (-0.5, 1.5)]
    legend: Any = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "costs nothing here, or gains",
        "no step of the sampler is in this stage",
    ]
    plots.sensitivity([[0, 0.0], [0, 0.0]], Stages.equal(2), "ssim")


def test_differences_are_beside_the_images_on_one_scale() -> None:
    first = torch.zeros(2, 3, 4, 4)
    figure = plots.image_grid({"dense": first, "near": first + 0.1, "far": first + 0.3}, differences=True)
    strips = [axes.images[0] for axes in figure.axes if axes.images]
    differences = [strip for strip in strips if strip.get_cmap().name == "inferno"]
    assert sorted(np.asarray(strip.get_array()).shape for strip in strips) == [(4, 9)] * 2 + [(4, 9, 3)] * 3
    values = [np.asarray(strip.get_array())[:, [0, 8]].ravel() for strip in differences]
    assert np.concatenate(values) == pytest.approx([0.1] * 8 + [0.3] * 8)
    assert all(strip.get_clim() == pytest.approx((0, 0.3)) for strip in differences)
    assert "mean absolute difference to dense" in [axes.get_title() for axes in figure.axes]


def test_a_figure_is_a_png_whatever_its_name(tmp_path: Path) -> None:
    plots.save(plots.table({"row": [1.0, 2.0]}, ["a", "b"]), tmp_path / "figure.partial")
    with Image.open(tmp_path / "figure.partial") as image:
        assert image.format == "PNG"
