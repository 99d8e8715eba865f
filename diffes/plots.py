"""Figures: schedules, convergence, image grids."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffes.schedule import Schedule

COLOURS = ("#0b6e99", "#d1603d", "#6a994e", "#7d5ba6", "#c99700", "#444444")
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight")


def schedules(named: Mapping[str, Schedule], path: Path) -> None:
    """Step plot of sparsity over timesteps, in the order of sampling: noise on the left."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 3))
        axes: Axes = figure.subplots()
        for (name, schedule), colour in zip(named.items(), itertools.cycle(COLOURS)):
            edges = [lo for lo, _ in schedule.plan.stages] + [schedule.plan.stages[-1][1]]
            sparsity = [level / schedule.max_level for level in schedule.levels]
            axes.stairs(sparsity, edges, label=name, color=colour, linewidth=2, baseline=None)
        axes.invert_xaxis()
        axes.set(xlabel="timestep (sampling goes from left to right)", ylabel="sparsity", ylim=(-0.03, 1.03))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        _save(figure, path)


def convergence(fitness: Mapping[str, Sequence[float]], metric: str, path: Path) -> None:
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
        _save(figure, path)


def _axis_range(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """Limits of a fitness axis: what best-so-far curves do after their first tenth, and as much room below."""
    settled = np.concatenate([curve[len(curve) // 10 :] for curve in curves])
    settled = settled[np.isfinite(settled)]
    room = max(float(np.ptp(settled)), 1e-9)
    return float(settled.min()) - room, float(settled.max()) + 0.1 * room


def convergence_bands(curves: Mapping[str, Sequence[Sequence[float]]], metric: str, path: Path) -> None:
    """Best so far by strategy: the median over seeds as a line, the quartiles as a band."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 3.5))
        axes: Axes = figure.subplots()
        for (name, runs), colour in zip(curves.items(), itertools.cycle(COLOURS)):
            length = min(map(len, runs))
            low, middle, high = np.percentile([run[:length] for run in runs], [25, 50, 75], axis=0)
            count = np.arange(1, length + 1)
            axes.fill_between(count, low, high, step="post", color=colour, alpha=0.2, linewidth=0)
            axes.step(count, middle, where="post", color=colour, linewidth=2, label=f"{name} ({len(runs)} seeds)")
        axes.set_ylim(*_axis_range([np.array(run) for runs in curves.values() for run in runs]))
        axes.set(xlabel="evaluations", ylabel=f"best fitness so far ({metric})")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        _save(figure, path)


def image_grid(rows: Mapping[str, Tensor], path: Path, columns: Sequence[str] | None = None) -> None:
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
        _save(figure, path)
