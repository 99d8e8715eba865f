"""Figures of curves or points against an axis: progress of searches, held-out fitness, fronts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffes.figures.plots import STYLE, limits, looks, plain
from diffes.forms import PlanPoint, TimedOn
from diffes.results.artifact import best_within
from diffes.spaces.ledger import SearchResult

CHOSEN: dict[str, Any] = {
    "marker": "o", "color": "none", "markeredgecolor": "black", "markersize": 12, "linestyle": "none",
}  # fmt: skip
OVER: dict[str, Any] = {
    "marker": "x", "color": "#b00020", "markersize": 9, "linestyle": "none"
}  # fmt: skip


def convergence(searches: Mapping[str, SearchResult], metric: str) -> Figure:
    """Draw every evaluation of each search, and its best so far as a line, by strategy.

    Evaluations over the budget, or on some of the probes only, have marks of their own and are never the best. The axis
    leaves out the steep start of the lines; the label says how many evaluations lie below it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.8))
        axes: Axes = figure.subplots()
        curves = {name: np.array(found.curve()) for name, found in searches.items()}
        bottom, top = limits(np.concatenate([curve[len(curve) // 10 :] for curve in curves.values()]), below=1)
        for name, (colour, marker) in looks(searches).items():
            found, curve = searches[name], curves[name]
            fitness, counts = np.array([e.fitness for e in found.evaluations]), np.array(found.eligible)
            whole = np.array([e.fidelity == 1 for e in found.evaluations])
            hidden = int((fitness < bottom).sum())
            best = f"{name}, best so far" + (f" ({hidden} evaluations below)" if hidden else "")
            x = np.arange(1, len(curve) + 1)
            for shown, mark, size, label in (
                (counts, marker, 4, None),
                (whole & ~counts, "x", 5, f"{name}, over budget"),
                (~whole, "|", 5, f"{name}, on some of the probes"),
            ):
                if shown.any():
                    axes.plot(x[shown], fitness[shown], mark, color=colour, alpha=0.6, markersize=size, label=label)
            axes.step(x, np.where(curve > -np.inf, curve, np.nan), where="post", color=colour, linewidth=2, label=best)
        axes.set_ylim(bottom, top)
        plain(axes, "y")
        axes.set(xlabel="evaluations", ylabel=f"fitness ({metric})")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
        return figure


def convergence_over_calls(
    curves: Mapping[str, Sequence[Sequence[Sequence[float]]]],
    metric: str,
    allowed: int | None = None,
    what: str = "best fitness so far",
) -> Figure:
    """Draw the best so far over denoiser calls: the median over seeds as a line, the quartiles as a band.

    The line is dotted after the search has ended.

    Args:
        curves: by label, for each seed the points (denoiser calls, best fitness) at which the best rises.
        metric: name of the metric, for the label of the axis.
        allowed: denoiser calls that each search could spend.
        what: label of the axis, for points that are something else than the best so far, which never falls.
    """
    runs_of = {label: [run for run in runs if run] for label, runs in curves.items()}
    runs_of = {label: runs for label, runs in runs_of.items() if runs}
    end = max((run[-1][0] for runs in runs_of.values() for run in runs), default=1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2))
        axes: Axes = figure.subplots()
        bounds: list[float] = []
        for label, (colour, marker) in looks(curves).items():
            if label not in runs_of:
                continue
            runs = runs_of[label]
            first, last = max(run[0][0] for run in runs), max(run[-1][0] for run in runs)
            calls = np.unique([first, *(point[0] for run in runs for point in run if point[0] >= first), last])
            values = np.array([_value_at(run, calls) for run in runs])
            low, middle, high = np.percentile(values, [25, 50, 75], axis=0)
            axes.fill_between(calls, low, high, step="post", color=colour, alpha=0.2, linewidth=0)
            axes.step(
                calls, middle, where="post", color=colour, linewidth=2, marker=marker, markevery=[-1], markersize=6,
                label=f"{label} ({len(runs)} seeds)",
            )  # fmt: skip
            axes.plot([last, end], [middle[-1]] * 2, ":", color=colour, linewidth=1.2)
            bounds += middle[calls >= last / 6].tolist() if last > first else middle.tolist()  # without the steep start
        axes.set_ylim(*limits(bounds, below=0.3))
        plain(axes, "y")
        if allowed is not None:
            axes.axvline(allowed, color="#888888", linestyle="--", linewidth=1, label="what each may spend")
        axes.set(xlabel="denoiser calls", ylabel=f"{what} ({metric})")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)
        return figure


def _value_at(points: Sequence[Sequence[float]], calls: np.ndarray) -> np.ndarray:
    """Return the value of one run after each number of calls."""
    at = np.searchsorted([point[0] for point in points], calls, side="right") - 1
    return np.array([point[1] for point in points])[np.maximum(at, 0)]


def spread_by_label(values: Mapping[str, Sequence[float]], name: str) -> Figure:
    """Draw a mark for each seed and a bar at the median, by label."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 0.35 * len(values)))
        axes: Axes = figure.subplots()
        for row, (label, (colour, marker)) in enumerate(looks(values).items()):
            seeds = values[label]
            axes.plot(seeds, [row] * len(seeds), marker, color=colour, alpha=0.5, markersize=5)
            axes.plot([float(np.median(seeds))] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2.5)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set_xlim(*limits([value for seeds in values.values() for value in seeds]))
        plain(axes, "x")
        axes.set_xlabel(name)
        axes.grid(axis="x", alpha=0.3)
        return figure


def fitness_over_macs(
    named: Mapping[str, Sequence[tuple[float, float, bool]]],
    metric: str,
    budget: tuple[float, str],
    marked: Mapping[str, tuple[float, float]],
) -> Figure:
    """Draw fitness against MACs, by label. Lines connect points that no point of the same label dominates.

    Args:
        named: points (MACs as a fraction of the dense model's, fitness, whether over the budget) by label.
        metric: name of the metric, which labels the axis.
        budget: position of the budget on the axis of MACs, and its label.
        marked: further points (MACs, fitness) by name: the chosen one, and uniform.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4))
        axes: Axes = figure.subplots()
        for label, (colour, marker) in looks(named).items():
            over = [point[:2] for point in named[label] if point[2]]
            _undominated(axes, [point[:2] for point in named[label]], label, colour, marker, best=max)
            if over:
                axes.plot(*zip(*over, strict=True), **OVER, label=f"{label}, over budget")
        for name, point in marked.items():
            look = CHOSEN if name == "chosen" else {"marker": "X", "color": looks([name])[name][0], "markersize": 9}
            axes.plot(*point, **{"linestyle": "none", **look, "label": name, "zorder": 5})
        axes.axvline(budget[0], color="#888888", linestyle="--", linewidth=1, label=budget[1])
        axes.set(xlabel="MACs, fraction of the dense model's", ylabel=metric)
        plain(axes, "y")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
        return figure


def _undominated(
    axes: Axes, points: Sequence[tuple[float, float]], label: str, colour: str, marker: str, best: Any
) -> None:
    """Draw points (cost, value), filled and connected if no other point is cheaper and as good, else hollow.

    `best` is `max` or `min`, and picks the better of two values.
    """
    ordered = sorted(points, key=lambda point: (point[0], point[1] if best is min else -point[1]))
    kept: list[tuple[float, float]] = []
    for point in ordered:
        if not kept or (point[1] != kept[-1][1] and best(point[1], kept[-1][1]) == point[1]):
            kept.append(point)
    rest = [point for point in ordered if point not in kept]
    axes.plot(*zip(*kept, strict=True), marker, color=colour, markersize=5, linewidth=1.2, linestyle="-", label=label)
    if rest:
        axes.plot(
            *zip(*rest, strict=True), marker, color="none", markeredgecolor=colour, markersize=5, linestyle="none",
            label=f"{label}, dominated",
        )  # fmt: skip


KINDS = {
    "dense": "dense, evenly spaced, 2M", "off-the-shelf": "dense, evenly spaced, best solver",
    "dense-planned": "dense, searched for 2M", "dense-fitted": "dense, searched and fitted",
    "levels": "levels at fixed steps, 2M", "joint": "joint",
}  # fmt: skip


def error_over_cost(points: Sequence[PlanPoint], currency: str, timing: TimedOn | None = None) -> Figure:
    """Draw the error of the plans of a front against cost, and against measured time, by kind.

    Args:
        points: plans of a front.
        currency: name of the currency of the cost.
        timing: conditions of the timing.
    """
    known = [point for point in points if point.latent_mse is not None]
    budgets = sorted({point.budget for point in points})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2))
        left, right = figure.subplots(1, 2, sharey=True)
        for kind, (colour, marker) in looks(point.kind for point in known).items():
            for axes, name in ((left, "cost"), (right, "ms")):
                mine = [(getattr(point, name), point.latent_mse or 0.0) for point in known if point.kind == kind]
                _undominated(axes, mine, KINDS.get(kind, kind), colour, marker, best=min)
        for i, budget in enumerate(budgets):
            left.axvline(budget, color="#888888", linestyle="--", linewidth=0.8, label=None if i else "budgets")
        chosen = [point for budget in budgets if (point := best_within(known, budget)) is not None]
        over = [point for point in known if point.cost > point.budget * (1 + 1e-6)]
        for axes, name in ((left, "cost"), (right, "ms")):
            for those, mark, label in ((chosen, CHOSEN, "taken within its budget"), (over, OVER, "over its budget")):
                if those:
                    axes.plot(
                        *zip(*((getattr(p, name), p.latent_mse) for p in those), strict=True), **mark, label=label
                    )
        left.set(xlabel=f"cost in dense calls, by {currency}", ylabel="held-out latent MSE", yscale="log")
        timed = "" if timing is None else f", batch {timing.batch}, {timing.device}, threads: {timing.threads}"
        right.set(xlabel=f"milliseconds a run{timed}")
        for axes in (left, right):
            axes.grid(alpha=0.3, which="both")
        handles, labels = left.get_legend_handles_labels()
        more = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
        once = more | dict(zip(labels, handles, strict=True))
        figure.legend(once.values(), once.keys(), loc="lower center", bbox_to_anchor=(0.5, 0.89), ncols=4, fontsize=8)
        return figure
