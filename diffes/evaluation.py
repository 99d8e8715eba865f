"""Fitness: images of the routed pipeline on fixed probes, compared with the dense model's, at few denoiser calls."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffes.adapters.base import ModelAdapter, Probes, SamplingState
from diffes.errors import DiffesError
from diffes.metrics import Metric
from diffes.routing import Router
from diffes.schedule import Schedule, StagePlan
from diffes.strategy import Evaluation


class ScheduleEvaluator:
    """Measures schedules on one set of probes; an `Evaluator` for `run_search`.

    Schedules that agree on the stages sampled first share that part of the trajectory: states at stage boundaries are
    cached, a batch is walked as a trie, and only what differs is run. Scores are bit-identical to running all of it,
    because every denoiser call is made on the same inputs in the same batch.

    Denoiser calls are counted in rows: a call on a batch of b counts b, both branches of guidance included.

    Args:
        router: the model with its bank; dense outside of an evaluation.
        plan: the stages.
        probes: fixed noise and conditions.
        n_steps: sampling steps.
        guidance: classifier-free guidance scale; 1 and less switch it off.
        metric: what is measured.
        batch: probes per denoiser call (twice as many rows with guidance).
        cache_bytes: how much memory the cached states may take.

    Attributes:
        steps: (S,) denoiser calls per stage.
        reference: dense outputs (n, ...) in the metric's space.
        denoiser_calls: rows run so far, the dense references excluded.
    """

    def __init__(
        self,
        router: Router,
        plan: StagePlan,
        probes: Probes,
        *,
        n_steps: int,
        guidance: float,
        metric: Metric,
        batch: int = 32,
        cache_bytes: int = 1 << 28,
    ) -> None:
        self.router = router
        self.adapter: ModelAdapter = router.adapter
        self.plan = plan
        self.metric = metric
        self.n_steps = n_steps
        self.guidance = guidance
        self._parts = [probes[i : i + batch] for i in range(0, len(probes), batch)]
        stages = [plan.stage_of(t) for t in self.adapter.timesteps(n_steps)]
        if stages != sorted(stages, reverse=True):
            raise DiffesError("this scheduler's timesteps do not fall; schedules need a sampler that walks downwards")
        self.steps = tuple(stages.count(s) for s in range(len(plan)))
        self._cache = _StateCache(cache_bytes)
        self.denoiser_calls = 0
        self.reference = self._in_metric_space(self.dense_latents(n_steps))

    def __call__(self, schedules: Sequence[Schedule]) -> Iterator[Evaluation]:
        """Evaluates a batch in the order of the trie, so that neighbours follow each other; yields each when done."""
        for schedule in sorted(schedules, key=lambda schedule: schedule.levels[::-1]):
            start, before = time.perf_counter(), self.denoiser_calls
            fitness = float(self.scores(schedule).mean())
            yield Evaluation(schedule, fitness, self.denoiser_calls - before, time.perf_counter() - start)

    def scores(self, schedule: Schedule) -> Tensor:
        """Score of each probe (n,), higher is better."""
        return self.metric(self._in_metric_space(self.latents(schedule)), self.reference)

    @torch.no_grad()
    def latents(self, schedule: Schedule) -> Tensor:
        """Final latents (n, C, h, w) of the routed model."""
        with self.router.routed(schedule):
            return torch.cat([self._run(i, part, schedule) for i, part in enumerate(self._parts)])

    @torch.no_grad()
    def dense_latents(self, n_steps: int) -> Tensor:
        """Final latents (n, C, h, w) of the dense model at any number of steps: the reference, the cheapest rival."""
        return torch.cat([self.adapter.sample(part, n_steps, self.guidance) for part in self._parts])

    def dense_scores(self, n_steps: int) -> Tensor:
        """Score of each probe (n,) of the dense model with fewer steps, against its own full run."""
        return self.metric(self._in_metric_space(self.dense_latents(n_steps)), self.reference)

    def _run(self, part_index: int, part: Probes, schedule: Schedule) -> Tensor:
        """Walks the stages from the noisiest, from the deepest cached state on."""
        visited = [s for s in reversed(range(len(self.plan))) if self.steps[s]]
        prefixes = [(part_index, *(schedule.levels[s] for s in visited[: i + 1])) for i in range(len(visited))]
        done, state = 0, None
        for i in reversed(range(len(visited))):
            state = self._cache.get(prefixes[i])
            if state is not None:
                done = i + 1
                break
        if state is None:
            state = self.adapter.start(part, self.n_steps, self.guidance)
        for i in range(done, len(visited)):
            for _ in range(self.steps[visited[i]]):
                state = self.adapter.step(state, part, self.guidance)
                self.denoiser_calls += len(part) * (2 if self.guidance > 1 else 1)
            self._cache.put(prefixes[i], state)
        return self.adapter.finish(state, self.guidance)

    def _in_metric_space(self, latents: Tensor) -> Tensor:
        if self.metric.space == "latent":
            return latents
        return torch.cat([self.adapter.decode(part) for part in latents.split(len(self._parts[0]))])


class _StateCache:
    """The most recently used sampling states, within a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._states: OrderedDict[tuple[int, ...], SamplingState] = OrderedDict()

    def get(self, key: tuple[int, ...]) -> SamplingState | None:
        state = self._states.get(key)
        if state is None:
            return None
        self._states.move_to_end(key)
        return replace(state, scheduler=copy.deepcopy(state.scheduler))

    def put(self, key: tuple[int, ...], state: SamplingState) -> None:
        if key in self._states:
            return
        self._states[key] = replace(state, scheduler=copy.deepcopy(state.scheduler))
        self._bytes += state.latents.nbytes
        while self._bytes > self._max_bytes and len(self._states) > 1:
            _, oldest = self._states.popitem(last=False)
            self._bytes -= oldest.latents.nbytes
