"""Helpers of all figures, and figures that are maps: schedules, sensitivity, splits, plans, images.

Curves are in `charts`.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from diffes.adapters import AnySet
from diffes.spaces.schedule import Plan, Schedule, Stages

STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
LINES = 3  # at most so many schedules are drawn as lines; more become rows of a heat map
LATER = "timestep (sampling goes from left to right)"
CALM = 1e-4  # relative differences below this are too small for an axis to show
_LOOKS = {  # colour and marker of names that appear in several figures
    "evolution": ("#0b6e99", "o"), "surrogate": ("#d1603d", "s"), "evopress": ("#6a994e", "^"), "tpe": ("#7d5ba6", "D"),
    "random": ("#c99700", "v"), "uniform": ("#444444", "X"), "nsga2": ("#c2578b", "P"), "cmaes": ("#3fa7a0", "<"),
    "optuna:sampler=GPSampler": ("#8c5a3c", ">"), "mosaic": ("#9aa5b1", "*"), "exhaustive": ("#1b1b8f", "p"),
    "searched": ("#0b6e99", "o"), "dense, fewer steps": ("#b23a48", "h"),
    "dense": ("#444444", "X"), "dense-planned": ("#d1603d", "s"), "levels": ("#6a994e", "^"), "joint": ("#0b6e99", "o"),
}  # fmt: skip
DPI = 150
_OTHERS = tuple(dict.fromkeys(_LOOKS.values()))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whatever the ending of the name."""
    figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight")


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker by name.

    Strategies and kinds of plans look the same in every figure. Other names take the remaining looks, in order.
    """
    names = list(dict.fromkeys(names))
    known = {name: _LOOKS[name] for name in names if name in _LOOKS}
    left = itertools.cycle([look for look in _OTHERS if look not in known.values()] or _OTHERS)
    return {name: known[name] if name in known else next(left) for name in names}


def limits(values: ArrayLike, below: float = 0.1, above: float = 0.1) -> tuple[float, float]:
    """Return the limits of an axis around finite values, with margins as shares of their range.

    If the values hardly differ, the margins are 1 % of the largest, so that no axis has ticks of 1e-9.
    """
    known = np.asarray(values, dtype=float).ravel()
    known = known[np.isfinite(known)]
    if not known.size:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    size = max(abs(low), abs(high))
    if high - low <= CALM * size:
        room = 0.01 * size or 1.0
        return low - room, high + room
    return low - below * (high - low), high + above * (high - low)


def plain(axes: Axes, which: Literal["x", "y"]) -> None:
    """Label an axis with the numbers as they are, without an offset."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(ScalarFormatter(useOffset=False))


def schedules(named: Mapping[str, Schedule | Sequence[Schedule]]) -> Figure:
    """Draw sparsity over timesteps in the order of sampling, noise on the left.

    Up to three names are lines; more are the rows of a heat map.

    Args:
        named: by name, a schedule, or the schedules of several seeds with the same stages. Of several, the mean and the
            standard deviation are drawn, the latter as a band around a line or in a second heat map.
    """
    runs = {name: [each] if isinstance(each, Schedule) else list(each) for name, each in named.items()}
    with matplotlib.rc_context(STYLE):
        return _lines(runs) if len(runs) <= LINES else _rows(runs)


def _lines(runs: Mapping[str, Sequence[Schedule]]) -> Figure:
    figure = Figure(figsize=(7, 3))
    axes: Axes = figure.subplots()
    shapes = zip((4.5, 2.8, 1.5), ("-", "--", ":"), strict=True)  # so that lines on top of each other all show
    for (name, (colour, _)), (width, line) in zip(looks(runs).items(), shapes, strict=False):
        edges, mean, spread = _sparsity(runs[name])
        many = f", mean of {len(runs[name])} seeds" if len(runs[name]) > 1 else ""
        axes.stairs(mean, edges, label=name + many, color=colour, linewidth=width, linestyle=line, baseline=None)
        if many:
            low, high = np.clip(mean - spread, 0, 1), np.clip(mean + spread, 0, 1)
            axes.stairs(high, edges, baseline=low, fill=True, color=colour, alpha=0.15)
    axes.invert_xaxis()
    axes.set(xlabel=LATER, ylabel="sparsity", ylim=(-0.03, 1.03))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(runs))
    return figure


def _rows(runs: Mapping[str, Sequence[Schedule]]) -> Figure:
    several = max(len(each) for each in runs.values()) > 1
    figure = Figure(figsize=(11 if several else 7, 1.2 + 0.34 * len(runs)), layout="constrained")
    panels = figure.subplots(1, 1 + several, sharey=True, squeeze=False)[0]
    panels_of = [("mean sparsity over seeds" if several else "sparsity", "magma_r", 1.0)]
    panels_of += [("standard deviation over seeds", "Blues", 0.5)] if several else []
    for column, (axes, (title, colours, top)) in enumerate(zip(panels, panels_of, strict=True)):
        for row, each in enumerate(runs.values()):
            edges, *values = _sparsity(each)
            image = axes.pcolormesh(
                edges, [row - 0.5, row + 0.5], values[column][None], cmap=colours, vmin=0, vmax=top,
                edgecolors="white", linewidth=0.6,
            )  # fmt: skip
        axes.set_yticks(range(len(runs)), [f"{name} ({len(each)})" if several else name for name, each in runs.items()])
        axes.set(xlabel=LATER, title=title, ylim=(len(runs) - 0.5, -0.5))
        axes.invert_xaxis()
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes)
    return figure


def _sparsity(runs: Sequence[Schedule]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the edges (S + 1,) of the stages, and mean and standard deviation (S,) of sparsity over schedules."""
    ranges = runs[0].stages.ranges
    values = np.array([np.array(each.levels) / each.max_level for each in runs])
    return [lo for lo, _ in ranges] + [ranges[-1][1]], values.mean(0), values.std(0, ddof=min(1, len(runs) - 1))


def sensitivity(table: Sequence[Sequence[float]], stages: Stages, metric: str) -> Figure:
    """Draw a heat map of the sensitivity: the fitness that each level of each stage costs on its own.

    The scale is logarithmic, and noise is on the left.

    Args:
        table: (S, H + 1) fitness of the dense model less that with one stage at one level; NaN in stages that no step
            of the sampler falls into. The first column, the dense model, is not drawn.
        stages: their ranges of timesteps.
        metric: name of the metric, for the label of the colour bar.
    """
    values = np.array(table, dtype=float)[::-1, 1:].T
    missing = np.isnan(values)
    losses = values[~missing & (values > 0)]
    most = float(losses.max()) if losses.size else 1.0
    least = max(float(losses.min()), most * 1e-5) if losses.size else 0.1
    norm = LogNorm(min(least, most / 10), most)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.4))
        axes: Axes = figure.subplots()
        colours = matplotlib.colormaps["magma_r"].with_extremes(bad="none")
        shown = np.ma.masked_where(missing | (values <= 0), np.maximum(values, least))
        extent = (-0.5, values.shape[1] - 0.5, 0.5, values.shape[0] + 0.5)
        image = axes.imshow(shown, origin="lower", aspect="auto", cmap=colours, norm=norm, extent=extent)
        nothing = {"facecolor": "#dceefb", "edgecolor": "white"}
        unvisited = {"facecolor": "#eeeeee", "edgecolor": "#bbbbbb", "hatch": "////"}
        handles: list[Patch] = []
        for cells, label, look in (
            (~missing & ~(values > 0), "costs nothing here, or gains", nothing),
            (missing, "no step of the sampler is in this stage", unvisited),
        ):
            style: dict[str, Any] = {**look, "linewidth": 0.5}
            for level, column in zip(*np.nonzero(cells), strict=True):
                axes.add_patch(Rectangle((column - 0.5, level + 0.5), 1, 1, **style))
            handles += [Patch(label=label, **style)] if cells.any() else []
        axes.set_xticks(
            range(len(stages)), [f"{lo}-{hi}" for lo, hi in reversed(stages.ranges)], rotation=45, ha="right"
        )
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="timesteps (sampling goes from left to right)", ylabel="level")
        figure.colorbar(image, label=f"loss of {metric}")
        if handles:
            axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
        return figure


def layer_split(prunable: Sequence[AnySet], kept: Sequence[Sequence[int]], schedule: Schedule) -> Figure:
    """Draw a heat map of the fraction that each layer loses in each stage of a schedule, noise on the left.

    Args:
        prunable: the group sets, in the order of the forward pass.
        kept: (S, sets) number of groups of each set that stay.
        schedule: the schedule, whose stages and levels label the columns.
    """
    short = [each.label for each in prunable]
    with matplotlib.rc_context(STYLE):
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
    """Draw a table of numbers, shaded within each column: the higher, the darker."""
    with matplotlib.rc_context(STYLE):
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


def plans(rows: Mapping[str, Plan]) -> Figure:
    """Draw the timesteps that each plan calls, and the level of each call: a row for each plan, noise on the left.

    Args:
        rows: plans by label.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.28 * len(rows)))
        axes: Axes = figure.subplots()
        for row, plan in enumerate(rows.values()):
            sparsity = [level / plan.max_level for level in plan.levels]
            dots = axes.scatter(
                plan.timesteps, [row] * len(sparsity), c=sparsity, cmap="magma_r", vmin=0, vmax=1, s=38,
                edgecolors="#444444", linewidths=0.6,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.invert_xaxis()
        axes.set(xlabel=LATER)
        axes.grid(axis="y", alpha=0.3)
        if rows:
            figure.colorbar(dots, label="removed (0 is dense)")
        return figure


def image_grid(rows: Mapping[str, Tensor], columns: Sequence[str] | None = None, differences: bool = False) -> Figure:
    """Draw rows of images (n, channels, h, w) in [0, 1], with a label for each row and column.

    Args:
        rows: images by label; the images of a column have the same noise.
        columns: labels of the columns.
        differences: also draw how far each image of the other rows is from that of the first row, averaged over
            channels, all on one scale.
    """
    n = max(len(images) for images in rows.values())
    size, halves = (1.3, 2) if differences else (1.08, 1)
    width = next(iter(rows.values())).shape[-1]
    gap = max(width // 20, 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + size * (halves * (n + 0.3) - 0.3), size * len(rows)))
        spaces = {"wspace": 0.6 / (2 * n + 0.3), "hspace": 0.05}
        grid = figure.subplots(len(rows), halves, squeeze=False, gridspec_kw=spaces)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[], anchor="E" if axes in grid[:, 0] else "W")
            axes.spines[:].set_visible(False)
        for axes, (name, images) in zip(grid[:, 0], rows.items(), strict=True):
            _strip(axes, images, gap, n)
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
        named = [((width + gap) * i + (width - 1) / 2, textwrap.fill(c, 15)) for i, c in enumerate((columns or ())[:n])]
        grid[0, 0].set_xticks([at for at, _ in named], [name for _, name in named], fontsize=7)
        grid[0, 0].tick_params(axis="x", top=True, bottom=False, labeltop=True, labelbottom=False, length=0)
        if differences:
            _differences(figure, grid[:, 1], rows, gap, n)
        return figure


def _strip(axes: Axes, images: Tensor, gap: int, n: int, cmap: str = "gray", vmax: float = 1.0) -> None:
    """Draw up to n images (m, channels, h, w) side by side, `gap` pixels apart; one channel takes the colour map."""
    rows, value = images.float().cpu(), 1.0 if images.shape[1] == 3 else math.nan
    strip = pad(rows, (0, gap), value=value).permute(2, 0, 3, 1).flatten(1, 2)[:, :-gap]
    axes.imshow(strip.squeeze(2).numpy(), cmap=cmap, vmin=0, vmax=vmax)
    axes.set_xlim(-0.5, n * (images.shape[-1] + gap) - gap - 0.5)


def _differences(figure: Figure, column: np.ndarray, rows: Mapping[str, Tensor], gap: int, n: int) -> None:
    """Draw how far images are from those of the first row. The colour bar takes the place of the first row."""
    (name, first), *others = ((name, images.float().cpu()) for name, images in rows.items())
    distances = [(images - first[: len(images)]).abs().mean(1, keepdim=True) for _, images in others]
    most = max((float(values.max()) for values in distances), default=0.0) or 1.0
    for axes, values in zip(column[1:], distances, strict=True):
        _strip(axes, values, gap, n, "inferno", most)
    column[-1].apply_aspect()
    top, beneath = column[0].get_position(), column[-1].get_position()
    column[0].remove()
    bar = figure.add_axes((beneath.x0, top.y0 + 0.55 * top.height, beneath.width, 0.15 * top.height))
    figure.colorbar(ScalarMappable(Normalize(0, most), "inferno"), cax=bar, orientation="horizontal")
    bar.set_title(f"mean absolute difference to {name}", fontsize=9)
