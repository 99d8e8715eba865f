"""Cell of a grid: a search and its result on held-out probes, in this process or in a worker."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from diffes.config import RunConfig
from diffes.measure.metrics import Metric, make_metric
from diffes.problems.heldout import record_of
from diffes.problems.shared import Shared
from diffes.problems.workbench import Workbench, search_on
from diffes.progress import Progress, Silent
from diffes.results.record import RunRecord
from diffes.spaces.space import SearchSpace, Table
from diffes.spaces.store import EvaluationStore
from diffes.study.equal_cost import calls_of
from diffes.workers import NAMED, CausedError, Worker


def run_cell(bench: Workbench, journal: Path, progress: Progress, *, equal_calls: bool) -> RunRecord:
    """Run one search, and measure its result beside its rivals at the same cost.

    Args:
        bench: the calibrated model with the settings of the cell.
        journal: file that keeps the evaluations.
        progress: progress display.
        equal_calls: whether the denoiser calls of `calls_of` are the limit, however many schedules they measure.
    """
    store = EvaluationStore(journal, bench.space)
    limited = bench
    if equal_calls:
        limited = replace(bench, config=replace(bench.config, max_evals=10**9, max_calls=calls_of(bench.config)))
    return record_of(bench, search_on(limited, progress, store))


@dataclass(frozen=True)
class Job:
    """Cell in the form that is sent to a worker.

    Args:
        config: settings of the cell.
        levels: the calibrated stages, levels and steps.
        costs: (S, H + 1) cost of one call in each stage at each level.
        journal: file that keeps the evaluations.
        equal_calls: see `run_cell`.
    """

    config: RunConfig
    levels: SearchSpace
    costs: Table
    journal: Path
    equal_calls: bool


class CellWorker(Worker):
    """Worker that can also run whole cells."""

    def __init__(self, config: RunConfig, threads: int) -> None:
        super().__init__(config, threads)
        self._metric: Metric | None = None
        self._shared = Shared()

    def cell(self, job: Job) -> RunRecord:
        """Run a cell.

        Raises:
            CausedError: the cell raised an error that an `OSError` caused.
            Exception: the cell raised any other error.
        """
        assert self._router is not None
        config = replace(job.config, **{name: getattr(self._config, name) for name in NAMED})
        try:
            if self._metric is None or self._metric.name != config.metric:
                self._metric = make_metric(config.metric, self._adapter.device)
            bench = Workbench(
                config, self._adapter, job.levels, self._router, self._metric, job.costs, shared=self._shared
            )
            record = run_cell(bench, job.journal, Silent(), equal_calls=job.equal_calls)
        except Exception as error:
            if isinstance(error.__cause__, OSError):
                raise CausedError(error, error.__cause__) from error
            raise
        return replace(record, settings=job.config.to_json())
