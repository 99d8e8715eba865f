"""Figures: schedules, convergence, image grids."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffes.adapters import AnySet
from diffes.search.schedule import Schedule, Stages

COLOURS = ("#0b6e99", "#d1603d", "#6a994e", "#7d5ba6", "#c99700", "#444444", "#c2578b", "#3fa7a0", "#8c5a3c", "#9aa5b1")
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, whatever the ending of the name."""
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight")


def schedules(named: Mapping[str, Schedule]) -> Figure:
    """Step plot of sparsity over timesteps, in the order of sampling: noise on the left.

    Each line is a hair above the one before, so that those of the same level can be told apart.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 3))
        axes: Axes = figure.subplots()
        for row, ((name, schedule), colour) in enumerate(zip(named.items(), itertools.cycle(COLOURS))):
            edges = [lo for lo, _ in schedule.stages.ranges] + [schedule.stages.ranges[-1][1]]
            sparsity = [level / schedule.max_level + 0.008 * row for level in schedule.levels]
            axes.stairs(sparsity, edges, label=name, color=colour, linewidth=2, baseline=None)
        axes.invert_xaxis()
        top = 1.03 + 0.008 * len(named)
        axes.set(xlabel="timestep (sampling goes from left to right)", ylabel="sparsity", ylim=(-0.03, top))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return figure


def convergence(fitness: Mapping[str, Sequence[float]], metric: str) -> Figure:
    """Every evaluation as a dot and the best so far as a line, by strategy.

    The axis leaves out the steep start of the lines; dots below it are counted in the label.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 3.5))
        axes: Axes = figure.subplots()
        curves = {name: np.maximum.accumulate(values) for name, values in fitness.items()}
        bottom, top = _axis_range(list(curves.values()))
        for (name, values), colour in zip(fitness.items(), itertools.cycle(COLOURS)):
            count = np.arange(1, len(values) + 1)
            hidden = int((np.array(values) < bottom).sum())
            label = f"{name}, best so far" + (f" ({hidden} evaluations below)" if hidden else "")
            axes.plot(count, values, ".", color=colour, alpha=0.35, markersize=5)
            axes.step(count, curves[name], where="post", color=colour, linewidth=2, label=label)
        axes.set_ylim(bottom, top)
        axes.set(xlabel="evaluations", ylabel=f"fitness ({metric})")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        return figure


def _axis_range(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """Limits of a fitness axis: what best-so-far curves do after their first tenth, and as much room below."""
    settled = np.concatenate([curve[len(curve) // 10 :] for curve in curves])
    settled = settled[np.isfinite(settled)]
    room = max(float(np.ptp(settled)), 1e-9)
    return float(settled.min()) - room, float(settled.max()) + 0.1 * room


def convergence_over_calls(curves: Mapping[str, Sequence[Sequence[Sequence[float]]]], metric: str) -> Figure:
    """Best so far over denoiser calls: the median over seeds as a line, the quartiles as a band.

    Args:
        curves: by label, for each seed the points (denoiser calls, best fitness) at which the best rises.
        metric: names the axis.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 3.8))
        axes: Axes = figure.subplots()
        bounds = []
        for (label, runs), colour in zip(curves.items(), itertools.cycle(COLOURS)):
            first, last = max(run[0][0] for run in runs), max(run[-1][0] for run in runs)
            calls = np.unique([first, *(point[0] for run in runs for point in run if point[0] >= first), last])
            values = np.array([_best_at(run, calls) for run in runs])
            low, middle, high = np.percentile(values, [25, 50, 75], axis=0)
            axes.fill_between(calls, low, high, step="post", color=colour, alpha=0.2, linewidth=0)
            axes.step(calls, middle, where="post", color=colour, linewidth=2, label=f"{label} ({len(runs)} seeds)")
            bounds.append(middle[calls >= last / 6] if last > first else middle)  # leaves the steep start out
        axes.set_ylim(*_axis_range(bounds))
        axes.set(xlabel="denoiser calls", ylabel=f"best fitness so far ({metric})")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize=8)
        return figure


def _best_at(points: Sequence[Sequence[float]], calls: np.ndarray) -> np.ndarray:
    """The best so far of one run after each number of calls."""
    at = np.searchsorted([point[0] for point in points], calls, side="right") - 1
    return np.array([point[1] for point in points])[at]


def spread_by_label(values: Mapping[str, Sequence[float]], name: str) -> Figure:
    """One dot for each seed and a bar at the median, by label."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 0.6 + 0.35 * len(values)))
        axes: Axes = figure.subplots()
        for row, ((_, seeds), colour) in enumerate(zip(values.items(), itertools.cycle(COLOURS))):
            axes.plot(seeds, [row] * len(seeds), "o", color=colour, alpha=0.5, markersize=5)
            axes.plot([float(np.median(seeds))] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2.5)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set_xlabel(name)
        axes.grid(axis="x", alpha=0.3)
        return figure


def damage(table: Sequence[Sequence[float]], stages: Stages, metric: str) -> Figure:
    """Heat map of what each level of each stage costs on its own, noise on the left.

    Args:
        table: (S, H + 1) fitness of the dense model less that with one stage at one level.
        stages: their ranges of timesteps.
        metric: names the colours.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 3.2))
        axes: Axes = figure.subplots()
        values = np.array(table)[::-1].T
        image = axes.imshow(values, origin="lower", aspect="auto", cmap="magma_r")
        axes.set_xticks(
            range(len(stages)), [f"{lo}-{hi}" for lo, hi in reversed(stages.ranges)], rotation=45, ha="right"
        )
        axes.set(xlabel="timesteps (sampling goes from left to right)", ylabel="level")
        figure.colorbar(image, label=f"loss of {metric}")
        return figure


def split(prunable: Sequence[AnySet], kept: Sequence[Sequence[int]], schedule: Schedule) -> Figure:
    """Heat map of how the levels of a schedule are shared out: what each layer loses in each stage, noise on the left.

    Args:
        prunable: the group sets, in the order of the forward pass.
        kept: (S, sets) how many groups of each stay.
        schedule: its stages and levels label the columns.
    """
    short = [re.sub(r"transformer_blocks\.|attentions\.|_blocks", "", each.name) for each in prunable]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 1.4 + 0.19 * len(prunable)))
        axes: Axes = figure.subplots()
        lost = 1 - np.array(kept, dtype=float)[::-1].T / np.array([each.n_groups for each in prunable])[:, None]
        image = axes.imshow(lost, aspect="auto", cmap="magma_r", vmin=0, vmax=1)
        columns = zip(reversed(schedule.stages.ranges), reversed(schedule.levels), strict=True)
        axes.set_xticks(
            range(len(kept)), [f"{lo}-{hi}\nlevel {k}" for (lo, hi), k in columns], rotation=45, ha="right", fontsize=8
        )
        axes.set_yticks(range(len(short)), short, fontsize=8)
        axes.set(xlabel="timesteps (sampling goes from left to right)")
        figure.colorbar(image, label="removed fraction")
        return figure


def table(rows: Mapping[str, Sequence[float]], columns: Sequence[str]) -> Figure:
    """Numbers by row and column, shaded within each column: the higher, the darker."""
    with matplotlib.rc_context(_STYLE):
        values = np.array(list(rows.values()))
        figure = Figure(figsize=(1.6 + 1.1 * len(columns), 0.6 + 0.4 * len(rows)))
        axes: Axes = figure.subplots()
        spread = np.where(np.ptp(values, axis=0) > 0, np.ptp(values, axis=0), 1)
        axes.imshow((values - values.min(0)) / spread, cmap="Greens", vmax=1.6, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{value:.4g}", ha="center", va="center")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return figure


def front(named: Mapping[str, Sequence[tuple[float, float]]], currency: str, metric: str) -> Figure:
    """Fitness against cost, by label: points (cost as a fraction of the dense model's, fitness)."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6, 3.8))
        axes: Axes = figure.subplots()
        for (label, points), colour in zip(named.items(), itertools.cycle(COLOURS)):
            ordered = np.array(sorted(points))
            axes.plot(ordered[:, 0], ordered[:, 1], "o-", color=colour, markersize=4, linewidth=1.2, label=label)
        axes.set(xlabel=f"{currency}, fraction of the dense model's", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        return figure


def fronts(points: Sequence[Mapping[str, Any]], currency: str) -> Figure:
    """Error against cost, and against measured time, of the plans of a front, by kind.

    Args:
        points: with `kind`, `cost` in dense calls, `ms` and `latent_mse`.
        currency: what the cost counts.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.8))
        left, right = figure.subplots(1, 2, sharey=True)
        for kind, colour in zip(dict.fromkeys(point["kind"] for point in points), itertools.cycle(COLOURS)):
            chosen = [p for p in points if p["kind"] == kind and p["latent_mse"] is not None]
            for axes, name in ((left, "cost"), (right, "ms")):
                ordered = sorted((point[name], point["latent_mse"]) for point in chosen)
                axes.plot(*zip(*ordered, strict=True), "o-", color=colour, markersize=4, linewidth=1.2, label=kind)
        left.set(xlabel=f"cost in dense calls, by {currency}", ylabel="held-out latent MSE", yscale="log")
        right.set(xlabel="milliseconds a run, measured")
        for axes in (left, right):
            axes.grid(alpha=0.3, which="both")
        left.legend()
        return figure


def plans(points: Sequence[Mapping[str, Any]], max_level: int) -> Figure:
    """Which timesteps each plan calls, and how thin: a row for each plan, noise on the left.

    Args:
        points: with `kind`, `budget`, `timesteps` and `levels`.
        max_level: H.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.28 * len(points)))
        axes: Axes = figure.subplots()
        for row, point in enumerate(points):
            sparsity = [level / max_level for level in point["levels"]]
            dots = axes.scatter(
                point["timesteps"], [row] * len(sparsity), c=sparsity, cmap="magma_r", vmin=0, vmax=1, s=38,
                edgecolors="#444444", linewidths=0.6,
            )  # fmt: skip
        axes.set_yticks(range(len(points)), [f"{point['kind']}, {point['budget']:g}" for point in points])
        axes.invert_yaxis()
        axes.invert_xaxis()
        axes.set(xlabel="timestep (sampling goes from left to right)")
        axes.grid(axis="y", alpha=0.3)
        if points:
            figure.colorbar(dots, label="removed (0 is dense)")
        return figure


def image_grid(rows: Mapping[str, Tensor], columns: Sequence[str] | None = None) -> Figure:
    """Rows of images (n, channels, h, w) in [0, 1], same noise in each column, a label for each row and column."""
    n = max(len(images) for images in rows.values())
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1.5 + n, 1.08 * len(rows)))
        grid = figure.subplots(len(rows), n, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
        for row, (name, images) in zip(grid, rows.items(), strict=True):
            for axes, image in zip(row, images.float().cpu().permute(0, 2, 3, 1).numpy(), strict=False):
                axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            for axes in row:
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, title in zip(grid[0], columns or (), strict=False):
            axes.set_title(textwrap.fill(title, 15), fontsize=7)
        return figure
