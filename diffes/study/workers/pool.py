"""Who does what: workers that are given tasks, replaced where they die, and ended with the pool."""

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
from diffes.errors import DiffesError
from diffes.measure.evaluator import RoutedEvaluator
from diffes.pruning.bank import WeightBank
from diffes.runtime.apply import pick_device
from diffes.search.schedule import Schedule, Stages
from diffes.search.strategy import Measured, Rows
from diffes.study.config import RunConfig, WorkerOptions
from diffes.study.workers.cluster import check_asynchronous, check_room, connect, the_ray
from diffes.study.workers.packing import packed
from diffes.study.workers.spread import Spread
from diffes.study.workers.worker import NAMED, CausedError, Worker

log = logging.getLogger(__name__)
LIVES = 3  # workers that may die of one evaluation before it is given up
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 600.0  # until some worker has begun something


@dataclass
class _Task:
    """Something for a worker to do.

    Args:
        what: a schedule to measure, a stage to calibrate, a cell to run.
        name: how a message names it.
        asked: when it was asked for.
        begun: when a worker took it.
        deaths: workers that died of it.
    """

    what: Any
    name: str
    asked: float
    begun: float = 0.0
    deaths: int = 0


@dataclass(frozen=True)
class _Dead:
    """A worker that died.

    Args:
        why: as Ray has it.
    """

    why: str


class Pool:
    """Workers of one model, and what they were sent. They start with the first thing that they are given to do.

    Args:
        config: the settings of the run.
        options: how many workers, and where.
        kind: their class.

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
        self._busy: dict[Any, tuple[int, bool]] = {}  # who gets ready, or ends what nobody waits for; is it to be told?
        self._failed = [0] * options.workers  # times in a row that it did not become ready
        self._attached: list[Any] = [None] * options.workers  # to which evaluator
        self._bank: tuple[WeightBank | None, Any] = None, None
        self.waiting = 0  # tasks that no worker has begun
        self._paid, self._since = 0, time.perf_counter()  # denoiser calls of the evaluations, from the first one on

    def __str__(self) -> str:
        """What they do, for a line of progress."""
        rate = self._paid / max(time.perf_counter() - self._since, 1e-9)
        return f"{len(self._workers)} workers, {rate:.3g} calls/s, {self.waiting} waiting"

    def close(self) -> None:
        """Ends all workers, and Ray, where it was started for them."""
        try:
            for worker in self._workers:
                self._ray.kill(worker)
        finally:
            self._workers, self._busy, self._bank = [], {}, (None, None)
            if self._ours:
                self._ray.shutdown()

    def evaluator(self, local: RoutedEvaluator) -> Spread:
        """What measures as an evaluator of this process does, on the workers."""
        return Spread(self, local)

    def send(self, thing: object) -> Any:
        """A reference to a thing in the object store; it is there for as long as the reference."""
        self._start()
        return self._ray.put(thing)

    def send_bank(self, bank: WeightBank) -> Any:
        """A reference to a bank, whose tensors the workers of a machine map; the last one is kept."""
        if self._bank[0] is not bank:
            self._bank = bank, self.send(packed(bank))
        return self._bank[1]

    def banks(self, stages: Stages, only: Sequence[int]) -> Iterator[WeightBank]:
        """Banks of single stages, as soon as each is done."""
        now = time.perf_counter()
        tasks = [_Task(stage, f"the calibration of stage {stage}", now) for stage in only]
        for _, _, bank in self._done(tasks, lambda worker, stage: worker.calibrate.remote(stages, stage)):
            yield bank
        self._rest()

    def cells(self, bank: WeightBank, jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Whole cells, each with its record, or what was raised in it, as soon as it is done.

        Args:
            bank: of their model.
            jobs: what `cell` of the workers is given, in an order in which neighbours share most.
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
        """Each schedule with its fitness, seconds, coefficients and who measured it, as soon as it is done.

        Args:
            bank: reference of the bank.
            sent: of the evaluator.
            schedules: in an order in which neighbours share most.
            fidelity: the fraction of the probes.
            more: gives more of them whenever a worker has nothing to do.
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
        """Tasks, who did them and what came out, as soon as each is done.

        Neighbours go to one worker, which has what they share; one that has nothing left takes from the end of the
        longest row of another.

        Args:
            tasks: in an order in which neighbours share most.
            begin: gives a worker a task; returns the reference of what comes out.
            attached: the bank, and the evaluator, that a worker needs first.
            limit: seconds that a task may take.
            more: gives more tasks; asked where a worker has none, and after an empty answer not before one is done.
            tolerant: what a task raised is what came out of it, and the others go on.

        Raises:
            Exception: what the task raised.
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
                            self._wake(i)  # whatever state it is in
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
        """What came out of a task of that name; `_Dead` where the worker died of it.

        Raises:
            Exception: what the task raised.
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
        """Waits until no worker has anything to do: what is timed next would share the machine with it."""
        while self._busy:
            self._settle(self._ray.wait(list(self._busy), timeout=POLL_SECONDS)[0])

    def _settle(self, done: Sequence[Any]) -> None:
        """Takes workers that are ready; starts others where they are not.

        Raises:
            DiffesError: none becomes ready in a place.
            Exception: what a worker raised when it was told of an evaluator.
        """
        for reference in done:
            i, told = self._busy.pop(reference)
            try:
                found = self._outcome(reference, f"worker {i}")
            except Exception:
                if told:
                    raise
                continue  # of an evaluation that nobody waits for any more
            if not isinstance(found, _Dead):
                self._failed[i] = 0
                continue
            self._failed[i] += 1
            if self._failed[i] >= LIVES:
                raise DiffesError(
                    f"worker {i} does not start ({found.why}); what is finished is kept: run the same command again, "
                    "with fewer workers where memory is short"
                )
            self._wake(i)

    def _check_waiting(self, seconds: float) -> None:
        """Gives up where no worker has begun anything for long: Ray has no room for them.

        Raises:
            DiffesError: that is so.
        """
        if seconds > PATIENCE_SECONDS:
            raise DiffesError(
                f"no worker is ready after {seconds:.0f} s; the Ray cluster has {self._ray.available_resources()} to "
                "spare. Take fewer workers, or lower gpus_per_worker; what is finished is kept"
            )

    def _died(self, i: int, task: _Task, why: str) -> _Task:
        """Puts another worker in the place of one, and gives what it had begun back.

        Raises:
            DiffesError: several died of the same task.
        """
        task.deaths += 1
        log.warning("worker %d ended (%s); %s is repeated", i, why, task.name)
        self._wake(i)
        if task.deaths >= LIVES:
            raise DiffesError(
                f"{LIVES} workers ended at {task.name}, the last one because {why}; where memory is short take fewer "
                "workers; what is finished is kept"
            )
        return task

    def _start(self) -> None:
        """Starts Ray, where nobody did, and the workers, where they are not there yet.

        Raises:
            DiffesError: the cluster cannot be reached, or has no room for so many.
        """
        if self._workers:
            return
        options = self.options
        if not self._ray.is_initialized():
            connect(self._ray, options)
            self._ours = True
        elif options.ray_address is not None:
            raise DiffesError(
                f"this process has joined a Ray cluster already: leave ray_address {options.ray_address!r} out, or "
                "call ray.shutdown() first"
            )
        gpus = options.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if pick_device(self.config.device).startswith("cuda") else 0.0
        cpus = 0 if options.ray_address is None else 1  # here as many as were asked for, there as many as have room
        check_room(self._ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}, options.workers)
        variables = {"OMP_NUM_THREADS": str(self._threads)}
        self._made = self._ray.remote(self._kind).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": variables}
        )
        for i in range(options.workers):
            self._wake(i)

    def _wake(self, i: int) -> None:
        """Starts a worker in a place; whoever is there is ended."""
        for old in self._workers[i : i + 1]:
            self._ray.kill(old)
        self._workers[i : i + 1] = [self._made.remote(self.config, self._threads)]
        self._attached[i] = None
        self._busy[self._workers[i].ready.remote()] = i, True


@contextmanager
def pool_of(config: RunConfig, options: WorkerOptions, kind: type[Worker] = Worker) -> Iterator[Pool | None]:
    """Workers for a while; None where this process is to measure alone."""
    check_asynchronous(config, options)
    if options.workers == 1:
        yield None
        return
    pool = Pool(config, options, kind)
    try:
        yield pool
    finally:
        pool.close()
