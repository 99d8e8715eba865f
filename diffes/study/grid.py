"""Grids of searches: any settings are varied, over seeds, and each cell is measured on held-out probes."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffes.config import ALONE, ResourceSettings, RunConfig, WorkerOptions, changed, names_of
from diffes.errors import DiffesError, at_least, unknown_name
from diffes.progress import Progress
from diffes.results.lock import held
from diffes.results.record import RunRecord
from diffes.study.begin import with_threads
from diffes.study.cells import CELLS, SHARED, finished, key_of
from diffes.study.comparison import Comparison, Failure, hashable
from diffes.study.equal_cost import calls_of, config_of

CALLS_OF = {"probes", "steps", "guidance", "genes", "calls"}  # settings on which the calls of an evaluation depend
UNSEEN = names_of(ResourceSettings) | {"seed", "study", "device"}  # settings that get no column in a table


def grid(base: RunConfig, varied: Mapping[str, Sequence[Any]], seeds: int) -> list[RunConfig]:
    """Return every combination of the varied values, times seeds from `base.seed` on, grouped by calibrated model.

    If combinations may differ in the cost of an evaluation, and no limit is varied, all may spend the denoiser calls
    of `base`.

    Raises:
        DiffesError: a value is out of its range, or there are no seeds or values.
    """
    at_least("seeds", seeds, 1)
    known = {field.name for field in dataclasses.fields(RunConfig)} - {"seed"}
    if unknown := sorted(set(varied) - known):
        raise unknown_name("option to vary", unknown[0], known)
    if not varied:
        raise DiffesError("there is nothing to vary: name a setting and its values")
    if empty := [name for name, values in varied.items() if not values]:
        raise DiffesError(f"there is nothing to run: {empty[0]} has no values; give at least one")
    if CALLS_OF & set(varied) and "max_evals" not in varied and "max_calls" not in varied:
        base = replace(base, max_calls=calls_of(base.resolved()))
    outer = _outer(varied)
    places = itertools.product(*(range(len(values)) for values in varied.values()))
    chosen = [dict(zip(varied, each, strict=True)) for each in places]  # place of the value of each setting
    chosen.sort(key=lambda place: [place[name] for name in outer])
    combinations = [changed(base, **{name: varied[name][i] for name, i in place.items()}) for place in chosen]
    return [replace(config.resolved(), seed=base.seed + i) for config in combinations for i in range(seeds)]


def _outer(varied: Mapping[str, Sequence[Any]]) -> list[str]:
    return [name for name in varied if name not in SHARED]


def run_experiment(
    base: RunConfig,
    varied: Mapping[str, Sequence[Any]],
    seeds: int,
    out: Path,
    progress: Progress,
    workers: WorkerOptions = ALONE,
) -> Comparison:
    """Run the cells of a grid, and write all results in `out`, those of earlier commands included.

    A cell that fails is noted, and the next command tries it again; the others go on. If the compared costs differ by
    more than 0.5 %, the searches are repeated at a higher budget, so that values at the budget itself lie between two
    measured ones. Each search may spend the same number of denoiser calls.

    Raises:
        DiffesError: see `grid` and `run_cells`; or all cells failed.
        OSError: see `run_cells`.
    """
    cells = grid(with_threads(base, out / CELLS), varied, seeds)
    with held(out):
        done, failed = finished(out, cells, progress, seed=base.seed, workers=workers)
        if not done:
            raise DiffesError(f"all {len(failed)} cells failed, the first with: {failed[0].error}")
        comparison = _comparison(varied, cells, done, failed)
        ours = {key_of(cell.to_json()) for cell in cells}
        again = [
            config for r in comparison.to_interpolate() if key_of((config := config_of(r.settings)).to_json()) in ours
        ]
        if again:
            done, more = finished(out, again, progress, seed=base.seed, above=True, workers=workers)
            comparison = _comparison(varied, cells, done, [*failed, *more])
        comparison.write(out)
    return comparison


def _comparison(
    varied: Mapping[str, Sequence[Any]],
    cells: Sequence[RunConfig],
    done: Mapping[str, RunRecord],
    failed: Sequence[Failure],
) -> Comparison:
    """Build the comparison, the cells of this command first, by all settings in which any two cells differ."""
    keys = dict.fromkeys([*(key_of(cell.to_json()) for cell in cells), *done])
    records = [done[key] for key in keys if key in done]
    settings = [*(record.settings for record in records), *(each.settings for each in failed)]
    others = [field.name for field in dataclasses.fields(RunConfig) if field.name not in {*varied, *UNSEEN}]

    def differing(candidates: Iterable[str]) -> list[str]:
        return [name for name in candidates if len({hashable(each.get(name)) for each in settings}) > 1]

    names = [*varied, *differing(others)]
    alike = Counter(tuple(hashable(r.settings.get(name)) for name in (*names, "seed")) for r in records)
    if max(alike.values(), default=0) > 1:  # a seed was searched again with other resources, which then get a column
        names += differing(sorted(UNSEEN - {"seed"}))
    return Comparison(tuple(names), tuple(records), tuple(failed))


def run_cells(
    cells: Sequence[RunConfig], out: Path, progress: Progress, *, equal_calls: bool = True
) -> list[RunRecord]:
    """Run the cells that are not in `out` yet, one after the other. Each is saved when it is finished.

    An interrupted cell continues from its own journal. A cell that fails does not stop the others.

    Args:
        cells: settings of each cell; cells of one calibrated model should follow each other.
        out: folder of the results.
        progress: progress display of the cells, and of the search within a cell.
        equal_calls: every cell may spend the denoiser calls of `calls_of`, however many schedules they measure; else it
            stops at its own `max_evals` or `max_calls`.

    Returns:
        A record for each cell, in their order.

    Raises:
        DiffesError: a setting is unusable, or `out` cannot be written, is in use, or holds something else; or a cell
            failed, which is raised after the others are done.
        OSError: `out` cannot be written.
    """
    cells = [with_threads(cell.resolved(), out / CELLS) for cell in cells]
    with held(out):
        calibrated = cells[0].seed if cells else 0
        done, failed = finished(out, cells, progress, seed=calibrated, equal_calls=equal_calls)
    if failed:
        raise DiffesError(f"{len(failed)} of {len(cells)} cells failed, the first with: {failed[0].error}")
    return [done[key_of(cell.to_json())] for cell in cells]
