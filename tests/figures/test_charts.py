"""What curves and fronts say in words, marks and limits; how they look is for people."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffes.figures import charts
from diffes.forms import PlanPoint
from diffes.results.artifact import best_within
from diffes.spaces.ledger import SearchResult
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.strategy import Evaluation


def searched(fitness: list[float], over: tuple[int, ...] = (), partly: tuple[int, ...] = ()) -> SearchResult:
    """A search that found this, some of it over the budget or on half of the probes."""
    evaluations = tuple(
        Evaluation(Schedule(Stages.equal(1), (1,), 2), value, 1, 0.0, 0.5 if i in partly else 1.0)
        for i, value in enumerate(fitness)
    )
    eligible = tuple(i not in over and i not in partly for i in range(len(fitness)))
    return SearchResult(max(evaluations, key=lambda e: e.fitness), evaluations, eligible, len(fitness), 1.0)


def labels(figure: Figure) -> list[str]:
    legend: Any = figure.axes[0].get_legend() or figure.legends[0]
    return [text.get_text() for text in legend.get_texts()]


def marks(figure: Figure, label: str, panel: int = 0) -> list[tuple[float, float]]:
    (line,) = [line for line in figure.axes[panel].lines if line.get_label() == label]
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata(), dtype=float)]


def test_the_steep_start_is_left_out_and_counted() -> None:
    fitness = [-100.0, -50.0, *np.linspace(0, 1, 30).tolist(), -80.0]
    figure = charts.convergence({"random": searched(fitness)}, "ssim")
    assert "random, best so far (3 evaluations below)" in labels(figure)
    assert -2 < figure.axes[0].get_ylim()[0] < 0 < 1 < figure.axes[0].get_ylim()[1]


def test_what_is_over_budget_is_shown_as_such_and_is_not_the_best() -> None:
    found = searched([3.0, 1.0, 0.5, 2.0, 9.0, -math.inf, 1.5], over=(0,), partly=(4,))
    figure = charts.convergence({"nsga2": found}, "ssim")
    assert marks(figure, "nsga2, over budget") == [(1, 3)]
    assert marks(figure, "nsga2, on some of the probes") == [(5, 9)]
    (best,) = [label for label in labels(figure) if "best so far" in label]
    drawn = [y for _, y in marks(figure, best)]
    assert math.isnan(drawn[0]) and drawn[1:] == [1, 1, 2, 2, 2, 2]


def test_the_best_so_far_holds_between_its_rises() -> None:
    points = [(10, 1.0), (20, 2.0), (40, 3.0)]
    assert charts._value_at(points, np.array([10, 15, 20, 39, 40, 99])).tolist() == [1, 1, 2, 2, 3, 3]


def test_the_median_of_the_seeds_is_drawn_and_held_where_a_search_had_ended() -> None:
    curves: dict[str, list[list[tuple[float, float]]]] = {"b": [[(5.0, 1.0)]], "c": [[]]}
    curves = {"a": [[(10.0, level), (30.0, level + 1)] for level in (0.0, 2.0, 10.0)]} | curves
    figure = charts.convergence_over_calls(curves, "ssim", allowed=25)
    assert [y for _, y in marks(figure, "a (3 seeds)")] == [2, 3]
    assert marks(figure, "b (1 seeds)") == [(5, 1)]
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert np.asarray(dotted[1].get_xydata()).tolist() == [[5, 1], [30, 1]]
    assert labels(figure) == ["a (3 seeds)", "b (1 seeds)", "what each may spend"]


def test_where_nothing_improves_the_axis_is_readable() -> None:
    curves = {"a": [[(10, 0.913), (30, 0.913 + 1e-9)]]}
    figures = [
        charts.convergence({"a": searched([0.913] * 12)}, "ssim"),
        charts.convergence_over_calls(curves, "ssim"),
        charts.spread_by_label({"a": [0.913, 0.913 + 1e-9]}, "ssim"),
    ]
    for figure, name in zip(figures, ("yaxis", "yaxis", "xaxis"), strict=True):
        axis = getattr(figure.axes[0], name)
        figure.draw_without_rendering()
        assert axis.get_offset_text().get_text() == ""
        assert all(len(tick.get_text()) <= 7 for tick in axis.get_ticklabels())


def test_a_front_has_its_budget_what_was_chosen_and_uniform_and_nothing_dominated() -> None:
    points = [(0.5, 0.6, False), (0.3, 0.7, False), (0.6, 0.9, False), (0.8, 0.95, True), (0.85, 0.95, True)]
    marked = {"chosen": (0.6, 0.9), "uniform": (0.69, 0.85)}
    figure = charts.fitness_over_macs({"searched": points}, "ssim", (0.7, "budget"), marked)
    assert marks(figure, "searched") == [(0.3, 0.7), (0.6, 0.9), (0.8, 0.95)]
    assert marks(figure, "searched, dominated") == [(0.5, 0.6), (0.85, 0.95)]
    assert marks(figure, "searched, over budget") == [(0.8, 0.95), (0.85, 0.95)]
    assert marks(figure, "chosen") == [(0.6, 0.9)] and marks(figure, "uniform") == [(0.69, 0.85)]
    assert [x for x, _ in marks(figure, "budget")] == [0.7, 0.7]


def plan(kind: str, budget: float, cost: float, ms: float, error: float | None) -> PlanPoint:
    known: dict[str, Any] = {"kind": kind, "budget": budget, "cost": cost, "ms": ms, "latent_mse": error}
    return PlanPoint.model_construct(None, **known, heldout_mean=None if error is None else -error)


def test_fronts_of_plans_likewise_in_cost_and_in_time() -> None:
    points = [
        plan("dense", 4, 4, 40, 0.4), plan("dense", 6, 6, 60, 0.3), plan("joint", 4, 3.9, 70, 0.1),
        plan("joint", 6, 6.5, 65, 0.05), plan("joint", 8, 8, 80, 0.2), plan("joint", 9, 9, 90, None),
    ]  # fmt: skip
    figure = charts.error_over_cost(points, "macs")
    assert marks(figure, "joint") == [(3.9, 0.1), (6.5, 0.05)] and marks(figure, "joint", 1) == [(65, 0.05)]
    assert marks(figure, "joint, dominated") == [(8, 0.2)]
    assert marks(figure, "joint, dominated", 1) == [(70, 0.1), (80, 0.2)]
    assert marks(figure, "over its budget") == [(6.5, 0.05)]
    assert marks(figure, "taken within its budget") == [(3.9, 0.1), (3.9, 0.1), (6.5, 0.05), (6.5, 0.05)]
    verticals = [line.get_xdata() for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [float(np.asarray(x)[0]) for x in verticals] == [4, 6, 8, 9]
    assert "dense, evenly spaced, 2M" in labels(figure)


def test_what_is_taken_is_the_best_on_heldout_probes_within_the_calls() -> None:
    points = [plan("dense", 4, 4, 1, 0.4), plan("joint", 4, 3.9, 1, 0.5), plan("joint", 6, 6, 1, None)]
    best = best_within(points, 6)
    assert best is points[0] and best_within(points, 3) is None and best_within([], 1) is None
