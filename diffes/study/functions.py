"""Searches, fronts, comparisons and ablations as functions, for notebooks: what the commands of the same names do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from diffes.config import COMPARED, FRONT, RunConfig, WorkerOptions, settings_of
from diffes.errors import DiffesError
from diffes.figures import tables
from diffes.forms import FrontRecord, PlanPoint
from diffes.progress import Progress, RichProgress
from diffes.results.artifact import plan_of, read_front
from diffes.results.folder import Finished
from diffes.results.frames import dataframe
from diffes.results.record import Report
from diffes.results.report import read_report
from diffes.spaces.schedule import Plan
from diffes.study.comparison import Comparison
from diffes.study.front import complete_front
from diffes.study.grid import run_experiment
from diffes.study.run import complete_run

T = TypeVar("T")


@dataclass(frozen=True)
class Front:
    """Finished front. A notebook shows its table and what it says.

    Args:
        out: its folder, for `diffes.apply`, `diffes sample` and `diffes export`.
        record: content of its `front.json`.
    """

    out: Path
    record: FrontRecord

    @property
    def points(self) -> list[PlanPoint]:
        """Plans with their measurements."""
        return self.record.points

    def plans(self) -> dict[str, Plan]:
        """Return the plans by kind and budget, as `diffes.apply` and `figures.plots.plans` take them."""
        return {f"{point.kind}, {point.budget:g}": plan_of(self.record, point) for point in self.points}

    def verdicts(self) -> list[str]:
        """Return a sentence for each budget that compares its plans."""
        return tables.verdicts(self.record)

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame with a row for each plan.

        Raises:
            DiffesError: pandas is not installed.
        """
        return dataframe([point.model_dump() for point in self.points])

    def _repr_markdown_(self) -> str:
        rows = [tables.COLUMNS, ["---"] * len(tables.COLUMNS), *tables.rows_of(self.points)]
        return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), *(f"\n{line}" for line in self.verdicts())])


def search(
    out: str | Path,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    workers: int = 1,
    **settings: Any,
) -> Front | Report:
    """Search a plan, or a schedule (genes="levels"), and write a run folder, as `diffes search` does.

    The same call on an unfinished folder goes on where it stopped, and on a finished one returns what is there.

    Args:
        out: the folder.
        progress: progress display; bars when left out.
        overwrite: replace what is there.
        workers: number of processes that measure.
        settings: fields of `diffes.RunConfig`.

    Returns:
        The front of one budget, or the report of a schedule.

    Raises:
        DiffesError: a setting is unusable, or the folder holds something else.
    """
    config = settings_of(settings).resolved()
    options: dict[str, Any] = {"overwrite": overwrite, "workers": WorkerOptions(workers)}
    if config.genes == "levels":
        make = partial(complete_run, config, Path(out), progress or RichProgress(), **options)
        return _made(make, partial(read_report, Path(out)))
    assert config.calls is not None
    return _front_of(Path(out), config, [config.calls], progress, **options)


def front(
    out: str | Path,
    budgets: Sequence[float],
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    workers: int = 1,
    **settings: Any,
) -> Front:
    """Search plans at several budgets in dense calls, and write a folder, as `diffes front` does; see `search`."""
    if settings.get("calls") is not None:
        raise DiffesError(f"calls={settings['calls']} is one budget. In a front, use budgets instead")
    config = settings_of(dataclasses.asdict(FRONT) | settings)
    return _front_of(Path(out), config, budgets, progress, overwrite=overwrite, workers=WorkerOptions(workers))


def _front_of(
    out: Path, config: RunConfig, budgets: Sequence[float], progress: Progress | None, **options: Any
) -> Front:
    make = partial(complete_front, config, budgets, out, progress or RichProgress(), **options)
    return Front(out, _made(make, partial(read_front, out)))


def _made(make: Callable[[], T], read: Callable[[], T]) -> T:
    """Make a result, or read it if its folder holds it."""
    try:
        return make()
    except Finished:
        return read()


def compare(
    out: str | Path,
    strategies: Sequence[str] | None = None,
    *,
    seeds: int = 5,
    progress: Progress | None = None,
    workers: int = 1,
    **settings: Any,
) -> Comparison:
    """Compare strategies at an equal number of denoiser calls, over seeds, as `diffes compare` does.

    Args:
        out: folder of the results; what is finished there is not run again.
        strategies: names, with options after a colon; the first is what the others are tested against. Those of
            `diffes compare` when left out.
        seeds: number of searches of each.
        progress: progress display; bars when left out.
        workers: number of processes that measure.
        settings: fields of `diffes.RunConfig`.

    Raises:
        DiffesError: a setting is unusable, or all cells failed.
    """
    config = settings_of(settings)
    if config.strategy != "auto":
        raise DiffesError(f"strategy={config.strategy!r} is one strategy. In a comparison, use strategies instead")
    if isinstance(strategies, str):
        raise DiffesError(f"strategies are a list of names, got the text {strategies!r}")
    names = list(strategies) if strategies else COMPARED[config.kind]
    return run_experiment(
        config, {"strategy": names}, seeds, Path(out), progress or RichProgress(), WorkerOptions(workers)
    )


def ablate(
    out: str | Path,
    varied: Mapping[str, Sequence[Any]],
    *,
    seeds: int = 3,
    progress: Progress | None = None,
    workers: int = 1,
    **settings: Any,
) -> Comparison:
    """Measure every combination of some settings, over seeds, as `diffes ablate` does; see `compare`.

    Args:
        out: folder of the results.
        varied: values by the name of a setting, for instance {"calls": [4, 6], "solver": ["fitted", "dpmsolver++"]}.
        seeds: number of searches of each combination.
        progress: progress display; bars when left out.
        workers: number of processes that measure.
        settings: fields of `diffes.RunConfig`.
    """
    config = settings_of(settings)
    if not isinstance(varied, Mapping):
        raise DiffesError(f"varied holds values by the name of a setting, like {{'calls': [4, 6]}}, got {varied!r}")
    return run_experiment(config, varied, seeds, Path(out), progress or RichProgress(), WorkerOptions(workers))
