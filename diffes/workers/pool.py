"""Pool of workers: it gives them tasks, replaces those that die, and ends all when it closes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffes.adapters import shipped_models
from diffes.config import RunConfig, WorkerOptions
from diffes.errors import DiffesError
from diffes.measure.evaluator import RoutedEvaluator
from diffes.pruning.bank import WeightBank
from diffes.runtime.apply import pick_device
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.strategy import Measured, Rows
from diffes.workers.cluster import check_asynchronous, check_room, connect, the_ray
from diffes.workers.packing import packed
from diffes.workers.spread import Spread
from diffes.workers.worker import NAMED, CausedError, Worker

log = logging.getLogger(__name__)
LIVES = 3  # workers that may die of one task before it is given up
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 600.0  # wait until any worker runs a task


@dataclass
class _Task:
    """Task of a worker.

    Args:
        what: a schedule to measure, a stage to calibrate, or a cell to run.
        name: name of the task in messages.
        asked: time when the task was made.
        begun: time when a worker took it.
        deaths: number of workers that died of it.
    """

    what: Any
    name: str
    asked: float
    begun: float = 0.0
    deaths: int = 0


@dataclass(frozen=True)
class _Dead:
    """Outcome of a worker that died.

    Args:
        why: the reason, from Ray.
    """

    why: str


class Pool:
    """Pool of workers of one model, with the objects that were sent to them. The workers start with the first task.

    Args:
        config: the settings of the run.
        options: worker settings.
        kind: class of the workers.

    Raises:
        DiffesError: Ray is not installed.
    """

    def __init__(self, config: RunConfig, options: WorkerOptions, kind: type[Worker] = Worker) -> None:
        named = {name: getattr(config, name) for name in NAMED}
        found: dict[str, Any] = {
            name: str(Path(path).resolve())
            for name, path in named.items() if path and path not in shipped_models() and Path(path).exists()
        }  # fmt: skip
        self.config, self.options = replace(config, **found), options  # workers have a working directory of their own
        self._kind = kind
        self._ray = the_ray()
        self._ours = False
        self._threads = config.threads or torch.get_num_threads()
        self._workers: list[Any] = []
        # workers that start, or attach (True: their errors are raised), or finish a task that is no longer wanted
        self._busy: dict[Any, tuple[int, bool]] = {}
        self._failed = [0] * options.workers  # failed starts in a row
        self._attached: list[Any] = [None] * options.workers  # bank and evaluator of each worker
        self._bank: tuple[WeightBank | None, Any] = None, None
        self.waiting = 0  # tasks that no worker has begun
        self._paid, self._since = 0, time.perf_counter()  # denoiser calls of the evaluations, and when the first began

    def __str__(self) -> str:
        """Return the state of the workers, for a progress display."""
        rate = self._paid / max(time.perf_counter() - self._since, 1e-9)
        return f"{len(self._workers)} workers, {rate:.3g} calls/s, {self.waiting} waiting"

    def close(self) -> None:
        """End all workers, and Ray if it was started for them."""
        try:
            for worker in self._workers:
                self._ray.kill(worker)
        finally:
            self._workers, self._busy, self._bank = [], {}, (None, None)
            if self._ours:
                self._ray.shutdown()

    def evaluator(self, local: RoutedEvaluator) -> Spread:
        """Return an evaluator on the workers that measures as the given one."""
        return Spread(self, local)

    def send(self, thing: object) -> Any:
        """Put an object into the object store. Return a reference, which keeps it there as long as it lives."""
        self._start()
        return self._ray.put(thing)

    def send_bank(self, bank: WeightBank) -> Any:
        """Return a reference to a bank, whose tensors the workers of a machine map. The last bank sent is kept."""
        if self._bank[0] is not bank:
            self._bank = bank, self.send(packed(bank))
        return self._bank[1]

    def banks(self, stages: Stages, only: Sequence[int]) -> Iterator[WeightBank]:
        """Calibrate stages on the workers, and yield the bank of each as soon as it is done."""
        now = time.perf_counter()
        tasks = [_Task(stage, f"the calibration of stage {stage}", now) for stage in only]
        for _, _, bank in self._done(tasks, lambda worker, stage: worker.calibrate.remote(stages, stage)):
            yield bank
        self._rest()

    def cells(self, bank: WeightBank, jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Run whole cells, and yield each job with its record, or with the error that it raised, as soon as it is done.

        Args:
            bank: bank of their model.
            jobs: arguments of the workers' `cell`, in an order in which neighbours share most.
        """
        now = time.perf_counter()
        tasks = [_Task(job, f"the cell of seed {job.config.seed} with {job.config.strategy}", now) for job in jobs]
        attached = (self.send_bank(bank),)
        for task, _, found in self._done(tasks, lambda worker, job: worker.cell.remote(job), attached, tolerant=True):
            yield task.what, found
        self._rest()

    def measured(
        self,
        bank: Any,
        sent: Any,
        schedules: Sequence[Schedule],
        fidelity: float = 1.0,
        more: Callable[[], Sequence[Schedule]] | None = None,
    ) -> Iterator[tuple[Schedule, float, float, Rows | None, Measured]]:
        """Measure schedules, and yield each as soon as it is done: schedule, fitness, seconds, coefficients, worker.

        Args:
            bank: reference to the bank.
            sent: reference to the evaluator.
            schedules: the schedules, in an order in which neighbours share most.
            fidelity: the fraction of the probes.
            more: returns more schedules whenever a worker has nothing to do.
        """

        def tasks(schedules: Sequence[Schedule]) -> list[_Task]:
            now = time.perf_counter()
            return [_Task(each, f"the evaluation of levels {list(each.levels)}", now) for each in schedules]

        limit = self.options.evaluation_timeout or math.inf
        for task, i, (fitness, paid, seconds, rows) in self._done(
            tasks(schedules), lambda worker, schedule: worker.measure.remote(schedule, fidelity), (bank, sent), limit,
            None if more is None else lambda: tasks(more()),
        ):  # fmt: skip
            if not self._paid:
                self._since = task.begun
            self._paid += paid
            yield task.what, fitness, seconds, rows, Measured(f"worker {i}", round(task.begun - task.asked, 3), paid)

    def _done(
        self,
        tasks: Sequence[_Task],
        begin: Callable[[Any, Any], Any],
        attached: tuple[Any, ...] | None = None,
        limit: float = math.inf,
        more: Callable[[], Sequence[_Task]] | None = None,
        tolerant: bool = False,
    ) -> Iterator[tuple[_Task, int, Any]]:
        """Run tasks, and yield each with the number of its worker and its outcome, as soon as it is done.

        Neighbouring tasks go to one worker, which caches what they share. A worker without tasks takes the last task of
        the longest remaining row.

        Args:
            tasks: the tasks, in an order in which neighbours share most.
            begin: gives a worker a task, and returns the reference to its outcome.
            attached: the bank, and the evaluator, that a worker needs first.
            limit: seconds that a task may take.
            more: returns more tasks. It is called when a worker has none; after an empty answer, only once another task
                is done.
            tolerant: an error of a task is yielded as its outcome, and the others go on.

        Raises:
            Exception: the error of a task, unless `tolerant`.
        """
        self._start()
        n = len(self._workers)
        rows = [list(tasks[i * len(tasks) // n : (i + 1) * len(tasks) // n]) for i in range(n)]
        running: dict[Any, tuple[int, _Task]] = {}
        waits, dry = time.perf_counter(), more is None
        try:
            while running or any(rows) or not dry:
                taken = {*(i for i, _ in self._busy.values()), *(i for i, _ in running.values())}
                for i in sorted(set(range(n)) - taken):
                    if attached is not None and self._attached[i] != attached:
                        self._attached[i] = attached
                        self._busy[self._workers[i].attach.remote(*([each] for each in attached))] = i, True
                        continue
                    if more is not None and not dry and not any(rows):
                        rows[i] = list(more())
                        dry = not rows[i]
                    if row := rows[i] or max(rows, key=len):
                        task = row.pop(0 if row is rows[i] else -1)
                        task.begun = time.perf_counter()
                        running[begin(self._workers[i], task.what)] = i, task
                self.waiting = sum(map(len, rows))
                if not running and not self._busy:
                    continue
                done, _ = self._ray.wait([*running, *self._busy], timeout=POLL_SECONDS)
                self._settle([reference for reference in done if reference in self._busy])
                for reference in done:
                    if reference not in running:
                        continue
                    i, task = running.pop(reference)
                    try:
                        found = self._outcome(reference, task.name)
                        if isinstance(found, _Dead):
                            rows[i].insert(0, self._died(i, task, found.why))
                            continue
                    except Exception as error:
                        if not tolerant:
                            raise
                        if not isinstance(error, DiffesError):
                            self._wake(i)  # the state of this worker is unknown
                        found = error
                    yield task, i, found
                    dry = more is None
                if running:
                    unready = self._ray.wait(list(running), num_returns=len(running), timeout=0)[1]
                    for reference in unready:
                        if time.perf_counter() - running[reference][1].begun > limit:
                            i, task = running.pop(reference)
                            why = f"it took longer than evaluation_timeout, {limit:g} s"
                            rows[i].insert(0, self._died(i, task, why))
                waits = time.perf_counter() if running else waits
                self._check_waiting(time.perf_counter() - waits)
        finally:
            self._busy |= {reference: (i, False) for reference, (i, _) in running.items()}

    def _outcome(self, reference: Any, name: str) -> Any:
        """Return the outcome of a task; `_Dead` if its worker died.

        Raises:
            Exception: the task raised it.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except (errors.RayTaskError, errors.UnserializableException, errors.RaySystemError) as error:
            cause = getattr(error, "cause", None)
            log.error("%s failed in a worker: %s", name, error)
            if isinstance(cause, CausedError):
                raise cause.args[0] from cause.args[1]
            if isinstance(cause, DiffesError):
                raise cause from None
            if isinstance(cause, Exception) and not isinstance(cause, errors.RayError):
                raise cause from error
            raise DiffesError(f"{name} failed in a worker: {' '.join(str(error).split())[-300:]}") from error
        except errors.RayError as error:
            return _Dead(" ".join(str(error).split())[:200])

    def _rest(self) -> None:
        """Wait until no worker is busy, because work would disturb what is timed next on the same machine."""
        while self._busy:
            self._settle(self._ray.wait(list(self._busy), timeout=POLL_SECONDS)[0])

    def _settle(self, done: Sequence[Any]) -> None:
        """Free workers that are ready, and replace those that died.

        Raises:
            DiffesError: several workers in a row died in the same place.
            Exception: a worker raised it as it started or was given an evaluator.
        """
        for reference in done:
            i, told = self._busy.pop(reference)
            try:
                found = self._outcome(reference, f"worker {i}")
            except Exception:
                if told:
                    raise
                continue  # from a task that is no longer wanted
            if not isinstance(found, _Dead):
                self._failed[i] = 0
                continue
            self._failed[i] += 1
            if self._failed[i] >= LIVES:
                raise DiffesError(
                    f"worker {i} does not start ({found.why}). Finished evaluations are kept: run the same command "
                    "again, with fewer workers if memory is short."
                )
            self._wake(i)

    def _check_waiting(self, seconds: float) -> None:
        """Raise if no worker has run a task for long, because Ray has no room for the workers.

        Raises:
            DiffesError: `seconds` without a running task are too many.
        """
        if seconds > PATIENCE_SECONDS:
            raise DiffesError(
                f"no worker is ready after {seconds:.0f} s. The Ray cluster has {self._ray.available_resources()} to "
                "spare. Use fewer workers, or lower gpus_per_worker. Finished evaluations are kept."
            )

    def _died(self, i: int, task: _Task, why: str) -> _Task:
        """Replace a dead worker, and return its task.

        Raises:
            DiffesError: several workers died of the same task.
        """
        task.deaths += 1
        log.warning("worker %d ended (%s); %s is repeated", i, why, task.name)
        self._wake(i)
        if task.deaths >= LIVES:
            raise DiffesError(
                f"{LIVES} workers ended during {task.name}, the last one because {why}. If memory is short, use fewer "
                "workers. Finished evaluations are kept."
            )
        return task

    def _start(self) -> None:
        """Start Ray and the workers, unless they run already.

        Raises:
            DiffesError: the cluster cannot be reached, or has no room for so many workers.
        """
        if self._workers:
            return
        options = self.options
        if not self._ray.is_initialized():
            connect(self._ray, options)
            self._ours = True
        elif options.ray_address is not None:
            raise DiffesError(
                f"this process has already joined a Ray cluster. Leave out ray_address {options.ray_address!r}, or "
                "call ray.shutdown() first."
            )
        gpus = options.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if pick_device(self.config.device).startswith("cuda") else 0.0
        cpus = 0 if options.ray_address is None else 1  # on this machine any number; on a cluster one CPU each
        check_room(self._ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}, options.workers)
        variables = {"OMP_NUM_THREADS": str(self._threads)}
        self._made = self._ray.remote(self._kind).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": variables}
        )
        for i in range(options.workers):
            self._wake(i)

    def _wake(self, i: int) -> None:
        """Start a worker in place i. End the worker that is there."""
        for old in self._workers[i : i + 1]:
            self._ray.kill(old)
        self._workers[i : i + 1] = [self._made.remote(self.config, self._threads)]
        self._attached[i] = None
        self._busy[self._workers[i].ready.remote()] = i, True


@contextmanager
def pool_of(config: RunConfig, options: WorkerOptions, kind: type[Worker] = Worker) -> Iterator[Pool | None]:
    """Yield a pool of workers, and close it when the block ends. Yield None if this process measures alone."""
    check_asynchronous(config, options)
    if options.workers == 1:
        yield None
        return
    pool = Pool(config, options, kind)
    try:
        yield pool
    finally:
        pool.close()
