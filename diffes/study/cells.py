"""Cells in a folder: each is a search and its result on held-out probes. They run one by one, or whole in workers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffes.config import (
    ALONE,
    KINDS,
    LATER,
    ProblemSettings,
    RunConfig,
    SearchSettings,
    WorkerOptions,
    names_of,
)
from diffes.errors import DiffesError
from diffes.files import CONFIG, checksum, parse_json, read_json, write_json
from diffes.forms import CellCosts, checked
from diffes.problems.checks import are_known_elsewhere, check_settings
from diffes.problems.workbench import Workbench, prepare, vary
from diffes.progress import Progress
from diffes.results.lock import clear_leftovers, is_unused
from diffes.results.record import RunRecord
from diffes.study.cell import CellWorker, Job, run_cell
from diffes.study.comparison import Failure
from diffes.study.equal_cost import config_of, denser
from diffes.workers import are_here, check_asynchronous, pool_of

log = logging.getLogger(__name__)
CELLS, COSTS, JOURNALS = "cells.jsonl", "costs.json", "journals"
SHARED = names_of(ProblemSettings, SearchSettings) | {"storage"}  # settings that differ in cells of one model
_AS_OLD = RunConfig(genes="levels").resolved()
_UNPRICED: dict[str, Any] = {  # settings that costs do not depend on
    name: getattr(_AS_OLD, name) for name in SHARED - {"cost", "probes", "genes"}
}


def finished(
    out: Path,
    cells: Sequence[RunConfig],
    progress: Progress,
    *,
    seed: int,
    equal_calls: bool = True,
    above: bool = False,
    workers: WorkerOptions = ALONE,
) -> tuple[dict[str, RunRecord], list[Failure]]:
    """Run the cells that are missing in a folder that this process holds.

    Args:
        out: see `grid.run_cells`.
        cells: see `grid.run_cells`.
        progress: see `grid.run_cells`.
        seed: seed of the calibration.
        equal_calls: see `grid.run_cells`.
        above: run finished cells again, each at the budget above.
        workers: worker settings.

    Returns:
        All records in the folder, by key, and the cells that failed.

    Raises:
        DiffesError: a setting is unusable, or `out` cannot be written or holds something else.
        OSError: `out` cannot be written.
    """
    for cell in cells:
        check_settings(cell)
        for name in ("study", "storage"):
            if (given := getattr(cell, name)) is not None:
                raise DiffesError(f"each search here has a journal of its own: leave --{name} {given} out")
        check_asynchronous(cell, workers)
        if equal_calls and cell.time_limit is not None:
            raise DiffesError(
                f"all searches here spend equally many denoiser calls, which --time-limit {cell.time_limit:g} would "
                "cut; leave it out, and set --max-calls or --max-evals"
            )
    _open(out)
    done = {key_of(record.settings): record for record in _read(out / CELLS)}
    if others := {record.calibration_seed for record in done.values()} - {None, seed}:
        raise DiffesError(
            f"the cells in --out {out} were calibrated with seed {others.pop()}, which is the --seed of their command, "
            f"and here --seed is {seed}. Keep --seed and raise --seeds, or name another folder."
        )
    unlike = {key_of(cell.to_json()): cell for cell in cells}
    left = [cell for key, cell in unlike.items() if above or key not in done]
    costs = checked(CellCosts, read_json(out / COSTS) if (out / COSTS).exists() else {}, out / COSTS).root
    run = _Run(out, progress, seed, workers, equal_calls, above, done, costs)
    with progress.task(f"{len(cells)} cells" + " at the budget above" * above, len(cells)) as advance, run.pools:
        advance("", len(cells) - len(left))
        for _, of_one_model in itertools.groupby(left, _model_of):
            group = sorted(of_one_model, key=lambda cell: cell.seed)  # cells of a seed share probes and references
            whole = whole_in_workers(group, workers)
            run.side_by_side(whole, advance)
            for cell in group:
                if all(cell is not each for each in whole):
                    run.one(cell)
                    advance("")
    return done, [run.failed[key] for key in unlike if key in run.failed]


def whole_in_workers(group: Sequence[RunConfig], workers: WorkerOptions) -> list[RunConfig]:
    """Return the cells that workers run whole, one cell per worker at a time.

    Evaluations of all other cells are spread over the workers. These are: the last cells, if they are fewer than the
    workers; asynchronous cells; cells that need something registered in this process only; and all cells if workers do
    not see the folder, or evaluations have a timeout.

    Args:
        group: cells of one calibrated model that are left to do.
        workers: worker settings.
    """
    if not are_here(workers) or workers.evaluation_timeout is not None:
        return []
    able = [cell for cell in group if not cell.asynchronous and are_known_elsewhere(cell)]
    return able[: len(able) // workers.workers * workers.workers]


@dataclass
class _Run:
    """State of a command that runs cells: what they share, which are done, and which failed.

    Args:
        out: the folder.
        progress: progress display.
        seed: seed of the calibration.
        workers: worker settings.
        equal_calls: see `run_cell`.
        above: whether cells run at the budget above.
        done: records by key; new ones are added.
        costs: cost tables by key of the settings that they depend on; new ones are added.
        failed: cells that failed, by key.
        pools: ends the workers.
        bench: workbench of the previous cell.
    """

    out: Path
    progress: Progress
    seed: int
    workers: WorkerOptions
    equal_calls: bool
    above: bool
    done: dict[str, RunRecord]
    costs: dict[str, Any]
    failed: dict[str, Failure] = field(default_factory=dict)
    pools: ExitStack = field(default_factory=ExitStack)
    bench: Workbench | None = None

    def one(self, cell: RunConfig) -> None:
        """Run a cell in this process. Its evaluations run on the workers, if there are any."""
        with self._noted(cell):
            bench = self._ready(cell)
            journal = self._journal(bench)
            record = run_cell(bench, journal, self.progress, equal_calls=self.equal_calls)
            self._keep(cell, record)

    def side_by_side(self, cells: Sequence[RunConfig], advance: Callable[..., None]) -> None:
        """Run cells of one model whole in the workers, after the costs of all are known.

        Args:
            cells: the cells.
            advance: advances the bar.
        """
        jobs: dict[Path, Job] = {}
        left: dict[Path, list[RunConfig]] = {}  # by journal: two cells may share a budget above
        for cell in cells:
            with self._noted(cell):
                bench = self._ready(cell)
                journal = self._journal(bench)
                jobs[journal] = Job(bench.config, bench.levels, bench.costs, journal, self.equal_calls)
                left.setdefault(journal, []).append(cell)
        advance("", len(cells) - sum(map(len, left.values())))
        if not jobs:
            return
        doing = f"{self.workers.workers} workers, a cell each"
        advance(doing, 0)
        try:
            bench = self.bench or self._ready(next(itertools.chain(*left.values())))
            assert bench.pool is not None
            for job, found in bench.pool.cells(bench.router.bank, list(jobs.values())):
                for cell in left[job.journal]:
                    if isinstance(found, Exception):
                        self._note(cell, found)
                    else:
                        self._keep(cell, found)
                advance(f"{doing}, {bench.pool.waiting} waiting", len(left.pop(job.journal)))
        except Exception as error:  # the workers do not start
            for cell in itertools.chain(*left.values()):
                self._note(cell, error)
                advance("")

    def _ready(self, cell: RunConfig) -> Workbench:
        """Return the workbench with the settings of a cell, at the budget above if `above` is set."""
        if self.bench is None or _model_of(self.bench.config) != _model_of(cell):
            self.bench = None  # there may be no memory for two calibrated models
            self.pools.close()
            settings = replace(_to_calibrate(cell), seed=self.seed)
            pool = self.pools.enter_context(pool_of(settings, self.workers, CellWorker))
            self.bench = prepare(settings, self.progress, pool=pool)
        priced = _key_of_costs(cell)
        if self.bench.costs and _key_of_costs(self.bench.config) != priced:
            self.bench = replace(self.bench, costs=[])
        self.bench = vary(self.bench, cell, self.progress, self.costs.get(priced))
        if priced not in self.costs:
            self.costs[priced] = self.bench.costs
            write_json(self.out / COSTS, self.costs)
        if self.above:
            cell = denser(cell, self.bench.space)
            self.bench = vary(self.bench, cell, self.progress, self.costs[priced])
        return self.bench

    def _journal(self, bench: Workbench) -> Path:
        return (self.out / JOURNALS / f"{key_of(bench.config.to_json())}.journal").absolute()

    def _keep(self, cell: RunConfig, record: RunRecord) -> None:
        """Add the record of a cell to the folder."""
        key = key_of(cell.to_json())
        record = replace(record, calibration_seed=self.seed)
        record = replace(self.done[key], above=record) if self.above else record
        with (self.out / CELLS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json()) + "\n")
        self.done[key] = RunRecord.from_json(record.to_json())

    @contextmanager
    def _noted(self, cell: RunConfig) -> Iterator[None]:
        """Note that a cell failed if the block raises."""
        try:
            yield
        except Exception as error:
            self._note(cell, error)
            self.bench = self.bench if isinstance(error, DiffesError) else None  # its state is unknown

    def _note(self, cell: RunConfig, error: Exception) -> None:
        """Note that a cell failed.

        Raises:
            Exception: the error itself, if the disk is full or not accessible: the next cell would fail as well.
        """
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            raise error
        log.error("a cell failed: %s", cell, exc_info=error)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.failed[key_of(cell.to_json())] = Failure(cell.to_json(), text)


def key_of(settings: Mapping[str, Any]) -> str:
    """Return the key of a cell with these settings.

    Settings that are missing because they were added later count as their defaults, a missing allocation as "equal".
    """
    known = _AS_OLD.to_json() | {"allocation": "equal"} | LATER | dict(settings)
    if known["allocation"] == "sensitivity":
        known["allocation"] = "damage"  # its older name, so that keys of older versions are found
    for name, default in LATER.items():
        if known[name] == default:  # so that keys of older versions are found
            del known[name]
    return checksum(known)[:16]


def _to_calibrate(cell: RunConfig) -> RunConfig:
    """Return settings that calibrate the model of a cell, and do not fail because of its search or its budget."""
    plain: dict[str, Any] = {"strategy": "random", "mutation": None, "crossover": None, "asynchronous": False}
    plain |= {"study": None, "solver": None, "nodes": None, "calls": None, "budget": None, "cost": "auto"}
    return replace(cell, **plain).resolved() if cell.genes in KINDS else replace(cell, asynchronous=False, study=None)


def _key_of_costs(cell: RunConfig) -> str:
    """Return the key of the costs of a cell: of its model, its currency, and what it times."""
    return key_of(cell.to_json() | _UNPRICED | {"genes": "levels" if cell.kind == "levels" else "joint"})


def _model_of(config: RunConfig) -> list[Any]:
    """Return the settings that are the same in all cells of one calibrated model."""
    return [getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in SHARED]


def _open(out: Path) -> None:
    ours = (out / CELLS).exists() or ((out / JOURNALS).exists() and not (out / CONFIG).exists())
    if not is_unused(out) and not ours:
        raise DiffesError(f"--out {out} is not empty and holds no comparison of diffes; name another folder")
    clear_leftovers(out)
    (out / JOURNALS).mkdir(parents=True, exist_ok=True)


def _read(path: Path) -> list[RunRecord]:
    """Read the records of finished cells. Drop a line that a kill cut off, so that its cell runs again."""
    if not path.exists():
        return []
    try:
        content = path.read_text(encoding="utf-8")
        whole = content[: content.rfind("\n") + 1]
        if whole != content:
            path.write_text(whole, encoding="utf-8")
        rows = [parse_json(line) for line in whole.splitlines()]
        records = [RunRecord.from_json(row, f"line {i}") for i, row in enumerate(rows, 1)]
        return [replace(record, settings=config_of(record.settings).to_json()) for record in records]
    except (KeyError, TypeError, ValueError) as error:
        said = str(error).partition("; restore")[0]
        raise DiffesError(f"{path} is damaged ({said}); restore it, or move it away to run its cells again") from error
