"""Fitness of schedules: images of the routed pipeline on fixed probes, compared with the dense model's."""

from __future__ import annotations

import abc
import copy
import itertools
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffes.adapters import ModelAdapter, Probes, SamplingState, check_finite
from diffes.errors import DiffesError
from diffes.measure.metrics import Metric
from diffes.runtime.router import Router
from diffes.spaces.schedule import Plan, Schedule, Stages
from diffes.spaces.strategy import Evaluation, Rows

T = TypeVar("T")
Prefix = tuple[int | float | str, ...]
Candidate = Schedule | Plan
States = tuple[SamplingState, ...]  # states of one run, one per part of the probes
BATCH = 32
CACHE_BYTES = 1 << 28
REUSE_CACHE_BYTES = 1 << 30  # states are larger where they hold what later calls reuse


class RoutedEvaluator(abc.ABC):
    """Evaluator of what a router can run, on one set of probes; an `Evaluator` for `run_search`.

    Candidates that agree on the first calls share that part of the trajectory: states are cached, a batch is walked as
    a trie, and only what differs is run. Scores are bit-identical to running all of it, because every denoiser call is
    made on the same inputs in the same batch.

    Denoiser calls are counted in rows: a call on a batch of b counts b, both branches of guidance included. The count
    is what a single process pays that measures everything in the order of the trie. So a search that goes on over its
    store, or runs on many workers, counts as if it had never stopped and were alone.

    Args:
        router: the model with its bank; dense outside of an evaluation.
        probes: fixed noise and conditions.
        guidance: classifier-free guidance scale; 1 and less switch it off.
        metric: metric of the score.
        batch: probes per denoiser call (twice as many rows with guidance).
        cache_bytes: largest memory that the cached states may take.

    Attributes:
        stages: stages in which levels were calibrated.
        final_reference: latents (n, C, h, w) that everything is compared with.
        reference: the same (n, ...) in the metric's space.
        denoiser_calls: rows counted so far, the references excluded.
        paid_calls: rows that this process really ran.
    """

    stages: Stages

    def __init__(
        self, router: Router, probes: Probes, *, guidance: float, metric: Metric, batch: int, cache_bytes: int
    ) -> None:
        self.router = router
        self.adapter: ModelAdapter = router.adapter
        self.metric = metric
        self.guidance = guidance
        self.probes = probes
        self.batch = batch if router.adapter.batched else 1
        self.adapter.rows_per_image(guidance)  # some are counted, while the model is dense
        self._cache_bytes = max(cache_bytes, REUSE_CACHE_BYTES) if router.bank.reusing else cache_bytes
        self._cache, self._alone = (_StateCache(self._cache_bytes) for _ in range(2))
        self._due: dict[tuple[Candidate, float], int] = {}  # counted, not measured yet
        self.denoiser_calls = self.paid_calls = 0
        self._fixed_bytes, self._row_bytes = 0, 0.0
        self.final_reference = self._measured_reference()
        self.reference = self._in_metric_space(self.final_reference)
        check_finite(self.final_reference, "latents of the dense model")
        check_finite(self.reference, "images of the dense model")

    def detached(self) -> RoutedEvaluator:
        """Return a copy with the same probes and references, without model, metric and cache, for another process."""
        made = copy.copy(self)
        for name in ("router", "adapter", "metric", "_cache", "_alone", "_due"):
            delattr(made, name)
        return made

    def attached(self, router: Router, metric: Metric) -> RoutedEvaluator:
        """Return a copy of a detached evaluator with the same model and metric, in this process."""
        made, device = copy.copy(self), router.adapter.device
        made.router, made.adapter, made.metric, made._due = router, router.adapter, metric, {}
        made._cache, made._alone = (_StateCache(self._cache_bytes) for _ in range(2))
        made.final_reference, made.reference = self.final_reference.to(device), self.reference.to(device)
        return made

    @abc.abstractmethod
    def _reference_steps(self) -> int | Any:
        """Return the number of steps of the dense model that makes the reference, or its scheduler, ready to run."""

    @abc.abstractmethod
    def _routed(self, schedule: Candidate) -> Candidate:
        """Return the schedule or plan that the router is given for a genome."""

    @abc.abstractmethod
    def _path(self, schedule: Candidate) -> list[tuple[Prefix, int]]:
        """Return the parts of the trajectory, from the noisiest on.

        Each part has what decides the state after it, given the parts before, and its number of denoiser calls.
        """

    @abc.abstractmethod
    def _steps_of(self, schedule: Candidate) -> int | Any:
        """Return the number of steps of a genome, or its scheduler, ready to run."""

    def _resumed(self, states: States, schedule: Candidate) -> States:
        """Return cached states, maybe sampled for another genome, as the start of the rest of this one."""
        return states

    def _coefficients(self, states: States) -> Rows | None:
        """Return the coefficients that a finished run has fitted; None where nothing was fitted."""
        return None

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        """Evaluate a batch in the order of the trie, so that neighbours follow each other; yield each when done."""
        for schedule in in_trie_order(schedules):
            start, before = time.perf_counter(), self.denoiser_calls
            fitness, rows = self.measured(schedule, fidelity)
            calls, seconds = self.denoiser_calls - before, time.perf_counter() - start
            yield Evaluation(schedule, fitness, calls, seconds, fidelity, rows)

    def steady(self, more: Callable[[], Sequence[Schedule]]) -> Iterator[Evaluation]:
        """Evaluate what `more` gives until it gives nothing; see `Evaluator`."""
        while schedules := more():
            yield from self(schedules)

    def expect(
        self, schedules: Sequence[Schedule], fidelity: float = 1.0, paid: Mapping[Schedule, int] | None = None
    ) -> None:
        """Count the calls of a whole batch before any of it is measured.

        Args:
            schedules: the batch.
            fidelity: the fraction of the probes.
            paid: cost of those schedules in the batch that an earlier process measured. If they were a batch of their
                own, because a limit had cut it, they are counted before the others.
        """
        before = self._alone.snapshot() if paid else None
        self._count_all(in_trie_order(schedules), fidelity)
        if paid and any(self._due[schedule, fidelity] != calls for schedule, calls in paid.items()):
            assert before is not None
            self._alone.restore(before)
            self._count_all(
                in_trie_order(list(paid)) + in_trie_order([s for s in schedules if s not in paid]), fidelity
            )

    def _count_all(self, schedules: Sequence[Schedule], fidelity: float) -> None:
        self._due = {}
        self._due = {(schedule, fidelity): self.count(schedule, fidelity) for schedule in schedules}

    def count(self, schedule: Candidate, fidelity: float = 1.0) -> int:
        """Return the denoiser calls, in rows, that a schedule costs after all those that were counted before."""
        due = self._due.pop((schedule, fidelity), None)
        if due is not None:
            return due
        calls, n = 0, self._n_probes(fidelity)
        prefixes, path = self._prefixes(n, schedule), self._path(schedule)
        for i in range(self._alone.depth(prefixes), len(path)):
            self._alone.put(prefixes[i], None, self._state_bytes(n))
            calls += path[i][1] * self.rows(self.probes[:n])
        return calls

    def scores(self, schedule: Candidate, fidelity: float = 1.0) -> Tensor:
        """Return the score (n,) of each probe, or of the first `ceil(fidelity * n)`; higher is better."""
        return self.scored(self.latents(schedule, fidelity))

    def scored(self, latents: Tensor) -> Tensor:
        """Return the score (n,) of final latents (n, C, h, w) of the first n probes."""
        n = len(latents)
        return self.metric(self._in_metric_space(latents), self.reference[:n], self.probes.conditions[:n])

    def measured(self, schedule: Candidate, fidelity: float = 1.0) -> tuple[float, Rows | None]:
        """Return the mean score of a schedule, and the coefficients that were fitted for it, where its solver fits."""
        latents, rows = self.sampled(schedule, fidelity)
        return float(self.scored(latents).mean()), rows

    def latents(self, schedule: Candidate, fidelity: float = 1.0) -> Tensor:
        """Return the final latents (n, C, h, w) of the routed model."""
        return self.sampled(schedule, fidelity)[0]

    @torch.no_grad()
    def sampled(self, schedule: Candidate, fidelity: float = 1.0) -> tuple[Tensor, Rows | None]:
        """Return the final latents (n, C, h, w) of the routed model, and the fitted coefficients where the solver fits.

        All parts of the probes advance together, call by call, because a fit is over all of them.
        """
        self.denoiser_calls += self.count(schedule, fidelity)

        def run(n: int) -> tuple[Tensor, Rows | None]:
            with self.router.routed(self._routed(schedule), keep=True):
                states = self._run(self.parts(fidelity, n), schedule)
                finals = [self.adapter.finish(state) for state in states]
                return torch.cat(finals), self._coefficients(states)

        return self.within_room(run)

    def within_room(self, run: Callable[[int], T]) -> T:
        """Return the result of `run`, which is told how many probes may share a denoiser call.

        Where the device runs out of memory, cached states and layers that stay ready are freed first. Scores stay the
        same, up to the rounding of another batch size.
        """

        def free() -> None:
            self._cache = _StateCache(self._cache_bytes)
            self.router.resident.clear()

        return self.adapter.within_room(run, min(self.batch, len(self.probes)), free)

    @torch.no_grad()
    def dense_latents(self, steps: int | Any) -> Tensor:
        """Return the final latents (n, C, h, w) of the dense model, at any number of steps or by a ready scheduler."""
        parts = [self.probes[rows] for rows in self.parts()]
        return torch.cat([self.adapter.sample(part, steps, self.guidance) for part in parts])

    def dense_scores(self, steps: int | Any) -> Tensor:
        """Return the score of each probe (n,) of the dense model with fewer steps, against the reference."""
        return self.scored(self.dense_latents(steps))

    @torch.no_grad()
    def _measured_reference(self) -> Tensor:
        """Return the reference latents (n, C, h, w); measure on the way how large a state is, with all it holds."""
        return self.within_room(self._reference_in_parts)

    def _reference_in_parts(self, n: int) -> Tensor:
        finals, dense = [], Schedule(self.stages, (0,) * len(self.stages), self.router.max_level)
        for rows in self.parts(n=n):
            part = self.probes[rows]
            state = self.adapter.start(part, self._reference_steps(), self.guidance)
            self._fixed_bytes = max(self._fixed_bytes, size_of(state.scheduler))
            with self.router.routed(dense, keep=True):
                for timestep in state.scheduler.timesteps.tolist():
                    self.router.memory = state.memory
                    call = self.adapter.called(state, part, self.guidance)
                    self._pass_reference(call.latents[: len(part)], rows)
                    self._check_timestep(timestep)
                    state = replace(self.adapter.advance(state, call), memory=self.router.memory)
                    if rows.start == 0:  # other parts are like the first one
                        per_row = (size_of(replace(state, drive=None)) - self._fixed_bytes) / len(part)
                        self._row_bytes = max(self._row_bytes, per_row)
            finals.append(self.adapter.finish(state))
            self._pass_reference(finals[-1], rows)
        return torch.cat(finals)

    def _pass_reference(self, latents: Tensor, rows: slice) -> None:
        """Receive the latents of the reference, before every step and at the end. Nothing is done with them here."""
        return

    def _check_timestep(self, timestep: float) -> None:
        """Check that the adapter translates what its denoiser is called with to a training timestep."""
        found, expected = self.router.timestep, timestep - self.adapter.process.told_at(0)
        if not math.isnan(found) and self.stages.stage_of(found) != self.stages.stage_of(expected):
            raise DiffesError(
                f"{type(self.adapter).__name__}.timestep said {found:g} for a denoiser call at training timestep "
                f"{expected:g}: it has to give training timesteps, whatever its denoiser takes"
            )

    def parts(self, fidelity: float = 1.0, n: int | None = None) -> list[slice]:
        """Return the slices of probes that share a denoiser call: of `n` probes, or of a batch when left out."""
        last, n = self._n_probes(fidelity), n or self.batch
        return [slice(i, min(i + n, last)) for i in range(0, last, n)]

    def _n_probes(self, fidelity: float) -> int:
        return math.ceil(fidelity * len(self.probes))

    def rows(self, probes: Probes) -> int:
        """Return the number of rows that one denoiser call on these probes counts."""
        return len(probes) * self.adapter.rows_per_image(self.guidance)

    def _prefixes(self, n_probes: int, schedule: Candidate) -> list[Prefix]:
        """Return what decides the states after each part of the trajectory: number of probes, and all parts so far."""
        decided = [part for part, _ in self._path(schedule)]
        return [(n_probes, *itertools.chain(*decided[: i + 1])) for i in range(len(decided))]

    def _state_bytes(self, n_probes: int) -> int:
        """Return the most bytes that states of so many probes take, whichever process measures them."""
        return math.ceil(n_probes / self.batch) * self._fixed_bytes + math.ceil(self._row_bytes * n_probes)

    def _run(self, parts: Sequence[slice], schedule: Candidate) -> States:
        """Walk the trajectory from the noisiest part on, starting from the deepest cached states."""
        n_probes = parts[-1].stop
        prefixes = [(len(parts), *prefix) for prefix in self._prefixes(n_probes, schedule)]  # less room, more parts
        done, found = self._cache.deepest(prefixes)
        if found is None:
            steps = self._steps_of(schedule)
            states = tuple(self.adapter.start(self.probes[rows], steps, self.guidance) for rows in parts)
        else:
            states = self._resumed(found, schedule)
        for i, (_, n_calls) in enumerate(self._path(schedule)[done:], done):
            for _ in range(n_calls):
                states = self.stepped(states, parts)
                self.paid_calls += self.rows(self.probes[:n_probes])
            self._cache.put(prefixes[i], states, self._state_bytes(n_probes))
        return states

    def stepped(self, states: States, parts: Sequence[slice]) -> States:
        """Advance all parts by one step; what later calls may reuse goes with each state."""
        found = []
        for state, rows in zip(states, parts, strict=True):
            self.router.memory = state.memory
            after = self.adapter.step(state, self.probes[rows], self.guidance)
            found.append(replace(after, memory=self.router.memory))
        return tuple(found)

    def _in_metric_space(self, latents: Tensor) -> Tensor:
        if self.metric.space == "latent":
            return latents
        return torch.cat([self.adapter.decode(part) for part in latents.split(self.batch)])


class ScheduleEvaluator(RoutedEvaluator):
    """Evaluator of schedules: a level for each stage, at a fixed number of the scheduler's own steps.

    The reference is the dense model with the same number of steps; see `RoutedEvaluator` for the rest.

    Args:
        router: the model with its bank; dense outside of an evaluation.
        stages: their ranges of timesteps.
        probes: fixed noise and conditions.
        n_steps: sampling steps.
        guidance: classifier-free guidance scale; 1 and less switch it off.
        metric: metric of the score.
        batch: probes per denoiser call (twice as many rows with guidance).
        cache_bytes: largest memory that the cached states may take.

    Attributes:
        steps: (S,) denoiser calls per stage.
    """

    def __init__(
        self,
        router: Router,
        stages: Stages,
        probes: Probes,
        *,
        n_steps: int,
        guidance: float,
        metric: Metric,
        batch: int = BATCH,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.stages = stages
        self.n_steps = n_steps
        router.adapter.check_sampler()
        walked = [stages.stage_of(t) for t in router.adapter.timesteps(n_steps)]
        if walked != sorted(walked, reverse=True):
            raise DiffesError("this scheduler's timesteps do not fall; schedules need a sampler that walks downwards")
        self.steps = tuple(walked.count(s) for s in range(len(stages)))
        self._visited = [s for s in reversed(range(len(stages))) if self.steps[s]]
        super().__init__(router, probes, guidance=guidance, metric=metric, batch=batch, cache_bytes=cache_bytes)

    def _reference_steps(self) -> int:
        return self.n_steps

    def _routed(self, schedule: Candidate) -> Candidate:
        return schedule

    def _path(self, schedule: Candidate) -> list[tuple[Prefix, int]]:
        return [((schedule.levels[s],), self.steps[s]) for s in self._visited]

    def _steps_of(self, schedule: Candidate) -> int:
        return self.n_steps


def in_trie_order(schedules: Sequence[Schedule]) -> list[Schedule]:
    """Sort schedules so that those that share the first calls, at the noisiest timesteps, follow each other."""
    return sorted(schedules, key=lambda schedule: schedule.levels[::-1])


def size_of(thing: Any) -> int:
    """Return the bytes that an object takes in memory: tensors, arrays, containers and attributes, shared ones once."""
    seen: set[int] = set()

    def count(each: Any) -> int:
        if id(each) in seen or isinstance(each, type):
            return 0
        seen.add(id(each))
        size = sys.getsizeof(each)
        if isinstance(each, Tensor):
            storage = each.untyped_storage()
            fresh = storage.data_ptr() not in seen
            seen.add(storage.data_ptr())
            return size + (storage.nbytes() if fresh else 0)
        if isinstance(each, dict):
            return size + sum(count(key) + count(value) for key, value in each.items())
        if isinstance(each, list | tuple | set | frozenset):
            return size + sum(map(count, each))
        return size + (count(vars(each)) if hasattr(each, "__dict__") else 0)

    return count(thing)


class _StateCache:
    """Cache of the most recently used sampling states, within a number of bytes.

    Put without states, it records what a cache would keep.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._states: OrderedDict[Prefix, tuple[int, States | None]] = OrderedDict()

    def snapshot(self) -> tuple[OrderedDict[Prefix, tuple[int, States | None]], int]:
        """Return what `restore` brings back."""
        return self._states.copy(), self._bytes

    def restore(self, before: tuple[OrderedDict[Prefix, tuple[int, States | None]], int]) -> None:
        """Bring back the cache as it was when the snapshot was taken."""
        self._states, self._bytes = before

    def depth(self, prefixes: Sequence[Prefix]) -> int:
        """Return the number of parts of the longest known prefix, which counts as used now; 0 when none is known."""
        for i in reversed(range(len(prefixes))):
            if prefixes[i] in self._states:
                self._states.move_to_end(prefixes[i])
                return i + 1
        return 0

    def deepest(self, prefixes: Sequence[Prefix]) -> tuple[int, States | None]:
        """Return the number of parts of the longest known prefix, and copies of its states; (0, None) without one."""
        depth = self.depth(prefixes)
        states = self._states[prefixes[depth - 1]][1] if depth else None
        return depth, _copied(states)

    def put(self, prefix: Prefix, states: States | None, n_bytes: int) -> None:
        """Add a prefix that is not known yet; drop the least recently used ones that do not fit."""
        self._states[prefix] = n_bytes, _copied(states)
        self._bytes += n_bytes
        while self._bytes > self._max_bytes and len(self._states) > 1:
            _, (size, _) = self._states.popitem(last=False)
            self._bytes -= size


def _copied(states: States | None) -> States | None:
    """Copy states so that later steps leave the originals as they are.

    Configuration, tables of the noise process, and the scheduler that a plan's scheduler replaces are shared: no step
    writes to them, and they are larger than most latents.
    """
    if states is None:
        return None
    return tuple(replace(state, scheduler=_copied_scheduler(state.scheduler), drive=None) for state in states)


def _copied_scheduler(scheduler: Any) -> Any:
    n_timesteps = scheduler.config.num_train_timesteps
    shared = [scheduler.config, getattr(scheduler, "replaces", None), getattr(scheduler, "noises", None)]
    shared += [each for each in vars(scheduler).values() if isinstance(each, Tensor) and each.shape == (n_timesteps,)]
    return copy.deepcopy(scheduler, {id(each): each for each in shared if each is not None})
