"""Calibration and evaluations on many workers: processes of Ray, each with the model and the bank. Strategy, store and
counting stay with the process that searches."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffes.adapters import adapter_for, load_pipeline
from diffes.errors import DiffesError
from diffes.measure.evaluator import RoutedEvaluator, in_trie_order
from diffes.measure.metrics import METRICS, Metric, make_metric
from diffes.pruning.bank import WeightBank
from diffes.runtime.apply import pick_device
from diffes.runtime.router import Router
from diffes.search.schedule import Schedule, Stages
from diffes.search.strategy import Evaluation, Measured
from diffes.study.calibration import bank_of
from diffes.study.config import RunConfig, WorkerOptions

log = logging.getLogger(__name__)
LIVES = 3  # workers that may die of one evaluation before it is given up
POLL_SECONDS = 1.0


class Worker:
    """What runs in a process of its own. It keeps nothing that it could not be given again, so that any other can take
    the place of one that died.

    Args:
        config: the settings; the model is loaded as they say.
        threads: of torch, the same in all.
    """

    def __init__(self, config: RunConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        pipe = load_pipeline(config.model, device=pick_device(config.device), dtype=getattr(torch, config.dtype))
        pipe.set_progress_bar_config(disable=True)
        self._adapter = adapter_for(pipe)
        self._config = config
        self._have: dict[str, Any] = {}  # what was sent, by the name that Ray gave it

    def ready(self) -> bool:
        """Returns once the model is loaded."""
        return True

    def calibrate(self, stages: Stages, stage: int) -> WeightBank:
        """The bank of one stage, which depends on no other. It is copied: what Ray maps goes when Ray does."""
        if self._config.prompts is not None:
            self._adapter.use_prompts(Path(self._config.prompts))
        return bank_of(self._config, self._adapter, stages, [stage])

    def measure(
        self, bank: list[Any], sent: list[Any], schedule: Schedule, fidelity: float
    ) -> tuple[float, int, float]:
        """Fitness of a schedule, the denoiser calls that were run for it, and the seconds that took.

        Args:
            bank: the bank, as a list of one reference, and
            sent: what evaluator.detached() gave with the recipe of its metric, likewise: both are fetched once.
            schedule: what to measure.
            fidelity: the fraction of the probes.
        """
        evaluator = self._attached(bank[0], sent[0])
        start, before = time.perf_counter(), evaluator.paid_calls
        while True:
            try:
                fitness = float(evaluator.scores(schedule, fidelity).mean())
                return fitness, evaluator.paid_calls - before, time.perf_counter() - start
            except torch.OutOfMemoryError:
                if not evaluator.take_less():
                    raise
                torch.cuda.empty_cache()

    def _attached(self, bank: Any, sent: Any) -> RoutedEvaluator:
        name = bank.hex() + sent.hex()
        if name not in self._have:
            detached, recipe = self._fetched(sent)
            router = Router(self._adapter, self._fetched(bank), resident=int(self._config.bank_memory * 1e9))
            self._have[name] = detached.attached(router, recipe(self._adapter.device))
        return self._have[name]  # type: ignore[no-any-return]

    def _fetched(self, reference: Any) -> Any:
        if reference.hex() not in self._have:
            self._have[reference.hex()] = _ray().get(reference)
        return self._have[reference.hex()]


@dataclass
class _Task:
    """Something for a worker to do.

    Args:
        what: a schedule to measure, or a stage to calibrate.
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


class Pool:
    """Workers of one model, and what they were sent. They start with the first thing that they are given to do.

    Args:
        config: the settings of the run.
        options: how many workers, and where.

    Raises:
        DiffesError: Ray is not installed.
    """

    def __init__(self, config: RunConfig, options: WorkerOptions) -> None:
        self.config, self.options = config, options
        self._ray = _ray()
        self._ours = False
        self._threads = config.threads or torch.get_num_threads()
        self._workers: list[Any] = []
        self._waking: dict[Any, int] = {}  # by what tells that it is ready
        self._failed = [0] * options.workers  # times in a row that it did not become ready
        self._sent: dict[int, tuple[Any, Any]] = {}  # by id: the thing, so that its id stays its own, and a reference

    def close(self) -> None:
        """Ends all workers, and Ray, where it was started for them."""
        for worker in self._workers:
            self._ray.kill(worker)
        if self._ours:
            self._ray.shutdown()

    def evaluator(self, local: RoutedEvaluator) -> Spread:
        """What measures as an evaluator of this process does, on the workers."""
        return Spread(self, local)

    def send(self, thing: object) -> Any:
        """A reference to a thing in the object store, from where all workers of a machine map its tensors."""
        self._start()
        if id(thing) not in self._sent:
            self._ray.util.register_serializer(Tensor, serializer=_flat, deserializer=_tensor)
            try:
                self._sent[id(thing)] = thing, self._ray.put(thing)
            finally:
                self._ray.util.deregister_serializer(Tensor)
        return self._sent[id(thing)][1]

    def banks(self, stages: Stages, only: Sequence[int]) -> Iterator[WeightBank]:
        """Banks of single stages, as soon as each is done."""
        now = time.perf_counter()
        tasks = [_Task(stage, f"the calibration of stage {stage}", now) for stage in only]
        for _, _, bank in self._done(tasks, lambda worker, stage: worker.calibrate.remote(stages, stage), math.inf):
            yield bank

    def measured(
        self, bank: Any, sent: Any, schedules: Sequence[Schedule], fidelity: float
    ) -> Iterator[tuple[Schedule, float, float, Measured]]:
        """Each schedule with its fitness, seconds, and who measured it, as soon as it is done."""
        now = time.perf_counter()
        tasks = [_Task(each, f"the evaluation of levels {list(each.levels)}", now) for each in schedules]
        limit = self.options.evaluation_timeout or math.inf

        def begin(worker: Any, schedule: Schedule) -> Any:
            return worker.measure.remote([bank], [sent], schedule, fidelity)

        for task, i, (fitness, paid, seconds) in self._done(tasks, begin, limit):
            yield task.what, fitness, seconds, Measured(f"worker {i}", round(task.begun - task.asked, 3), paid)

    def _done(
        self, tasks: Sequence[_Task], begin: Callable[[Any, Any], Any], limit: float
    ) -> Iterator[tuple[_Task, int, Any]]:
        """Tasks, who did them and what came out, as soon as each is done.

        Neighbours go to one worker, which has what they share; one that has nothing left takes from the end of the
        longest row of another.

        Args:
            tasks: in an order in which neighbours share most.
            begin: gives a worker a task; returns the reference of what comes out.
            limit: seconds that it may take.

        Raises:
            Exception: what the task raised.
        """
        self._start()
        n = len(self._workers)
        rows = [list(tasks[i * len(tasks) // n : (i + 1) * len(tasks) // n]) for i in range(n)]
        running: dict[Any, tuple[int, _Task]] = {}
        while running or any(rows):
            busy = {*self._waking.values(), *(i for i, _ in running.values())}
            for i in sorted(set(range(n)) - busy):
                row = rows[i] or max(rows, key=len)
                if row:
                    task = row.pop(0 if row is rows[i] else -1)
                    task.begun = time.perf_counter()
                    running[begin(self._workers[i], task.what)] = i, task
            done, _ = self._ray.wait([*running, *self._waking], timeout=POLL_SECONDS)
            for reference in done:
                if reference in self._waking:
                    self._awake(reference)
                    continue
                i, task = running.pop(reference)
                try:
                    found = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # what was raised there is raised here
                except self._ray.exceptions.RayError as error:
                    rows[i].insert(0, self._died(i, task, " ".join(str(error).split())[:200]))
                else:
                    yield task, i, found
            late = [each for each, (_, task) in running.items() if time.perf_counter() - task.begun > limit]
            for reference in late:
                i, task = running.pop(reference)
                rows[i].insert(0, self._died(i, task, f"it took longer than evaluation_timeout, {limit:g} s"))

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
                "workers or probes; what is finished is kept"
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
            _connect(self._ray, options)
            self._ours = True
        gpus = options.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if pick_device(self.config.device).startswith("cuda") else 0.0
        cpus = 0 if options.ray_address is None else 1  # here as many as were asked for, there as many as have room
        _check_room(self._ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}, options.workers)
        variables = {"OMP_NUM_THREADS": str(self._threads)}
        self._made = self._ray.remote(Worker).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": variables}
        )
        for i in range(options.workers):
            self._wake(i)

    def _wake(self, i: int) -> None:
        """Starts a worker in a place; whoever is there is ended."""
        for old in self._workers[i : i + 1]:
            self._ray.kill(old)
        self._workers[i : i + 1] = [self._made.remote(self.config, self._threads)]
        self._waking[self._workers[i].ready.remote()] = i

    def _awake(self, reference: Any) -> None:
        """Takes a worker that is ready, or starts another.

        Raises:
            DiffesError: none becomes ready there.
        """
        i = self._waking.pop(reference)
        try:
            self._ray.get(reference)
            self._failed[i] = 0
        except self._ray.exceptions.RayError as error:
            self._failed[i] += 1
            if self._failed[i] >= LIVES:
                raise DiffesError(
                    f"worker {i} does not start ({' '.join(str(error).split())[-300:]}); what is finished is kept: run "
                    "the same command again, with fewer workers where memory is short"
                ) from error
            self._wake(i)


class Spread:
    """An `Evaluator` on the workers of a pool; counts denoiser calls as the evaluator of this process would.

    Args:
        pool: the workers.
        local: the evaluator; it counts, and measures nothing.
    """

    def __init__(self, pool: Pool, local: RoutedEvaluator) -> None:
        self._pool, self._local = pool, local
        name = local.metric.name
        recipe: Callable[[torch.device], Metric] = partial(make_metric, name)
        if name in METRICS.names():  # maybe of a notebook, of which workers know nothing
            recipe = partial(_metric, name, local.metric.function)
        self._sent = local.detached(), recipe

    def expect(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> None:
        """As of the evaluator of this process."""
        self._local.expect(schedules, fidelity)

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        """Evaluates a batch; yields each when it is done, in whatever order."""
        ordered = in_trie_order(schedules)
        calls = {schedule: self._local.count(schedule, fidelity) for schedule in ordered}
        bank, sent = self._pool.send(self._local.router.bank), self._pool.send(self._sent)
        for schedule, fitness, seconds, measured in self._pool.measured(bank, sent, ordered, fidelity):
            yield Evaluation(schedule, fitness, calls[schedule], seconds, fidelity, measured)


@contextmanager
def pool_of(config: RunConfig, options: WorkerOptions) -> Iterator[Pool | None]:
    """Workers for a while; None where this process is to measure alone."""
    if options.workers == 1:
        yield None
        return
    pool = Pool(config, options)
    try:
        yield pool
    finally:
        pool.close()


def _metric(name: str, function: Any, _device: torch.device) -> Metric:
    return Metric(name, "latent", True, function)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise DiffesError('several workers need Ray, which does not import: pip install "diffes[ray]"') from error
    return ray


def _connect(ray: Any, options: WorkerOptions) -> None:
    """Joins the cluster that is named, or starts one on this machine."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}.items():  # it would report home
        os.environ.setdefault(name, value)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    try:
        if options.ray_address is None:
            ray.init(**quiet)
        else:
            ray.init(address=options.ray_address, **{k: v for k, v in quiet.items() if k != "include_dashboard"})
    except Exception as error:
        where = "on this machine" if options.ray_address is None else f"at {options.ray_address}"
        reason = " ".join(str(error).split())[:200]
        raise DiffesError(f"there is no Ray cluster {where} ({type(error).__name__}: {reason})") from error


def _check_room(there: Mapping[str, float], each: Mapping[str, float], workers: int) -> None:
    """Refuses more workers than a cluster will ever have room for."""
    for name, wanted in each.items():
        if wanted * workers > there.get(name, 0.0):
            raise DiffesError(
                f"{workers} workers of {wanted:g} {name} each want more than the Ray cluster's {there.get(name, 0):g}: "
                f"take fewer{', or lower gpus_per_worker' if name == 'GPU' else ''}"
            )


def _flat(tensor: Tensor) -> tuple[Any, torch.dtype, tuple[int, ...]]:
    """Bytes that the object store maps, type and shape."""
    whole = tensor.detach().cpu().contiguous()
    return whole.reshape(-1).view(torch.uint8).numpy(), whole.dtype, tuple(whole.shape)


def _tensor(flat: tuple[Any, torch.dtype, tuple[int, ...]]) -> Tensor:
    data, dtype, shape = flat
    return torch.from_numpy(data).view(dtype).reshape(shape)
