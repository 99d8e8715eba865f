"""Fitness of plans: images by a solver at timesteps of the plan's own, compared with a converged dense run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffes.adapters import Probes, SamplingState
from diffes.measure.evaluator import BATCH, CACHE_BYTES, RoutedEvaluator
from diffes.measure.metrics import Metric
from diffes.runtime.router import Router
from diffes.runtime.solver import retimed, scheduler_for
from diffes.search.plan import calls_of, trailing
from diffes.search.schedule import Plan, Schedule, Stages


class PlanEvaluator(RoutedEvaluator):
    """Measures plans, as genomes of a `PlanSpace`: which nodes are called, each at which level.

    Its reference is the dense model at many steps of the solver, spaced evenly down to the last timestep.

    Args:
        router: the model with its bank; dense outside of an evaluation.
        stages: in which the bank was calibrated.
        solver: a name of `diffes.runtime.solver.SOLVERS`.
        probes: fixed noise and conditions.
        guidance: classifier-free guidance scale; 1 and less switch it off.
        metric: what is measured.
        reference_steps: of the dense model.
        batch: probes per denoiser call (twice as many rows with guidance).
        cache_bytes: how much memory the cached states may take.

    Attributes:
        timesteps: where every genome calls, which then is a schedule: a level for each stage. None: genomes choose.
    """

    def __init__(
        self,
        router: Router,
        stages: Stages,
        solver: str,
        probes: Probes,
        *,
        guidance: float,
        metric: Metric,
        reference_steps: int = 200,
        batch: int = BATCH,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.stages = stages
        self.solver = solver
        self.reference_steps = reference_steps
        self.timesteps: tuple[int, ...] | None = None
        super().__init__(router, probes, guidance=guidance, metric=metric, batch=batch, cache_bytes=cache_bytes)

    def plan(self, genome: Schedule) -> Plan:
        """What a genome runs."""
        if self.timesteps is None:
            return Plan(self.stages, calls_of(genome), genome.max_level - 1, self.solver)
        calls = tuple((timestep, genome.key(timestep)[1]) for timestep in self.timesteps)
        return Plan(self.stages, calls, genome.max_level, self.solver)

    def at(self, timesteps: Sequence[int]) -> PlanEvaluator:
        """What measures schedules at fixed timesteps, the noisiest first, by the same probes, reference and cache."""
        made = copy.copy(self)
        made.timesteps = tuple(timesteps)
        return made

    def scheduler(self, timesteps: Sequence[int]) -> Any:
        """The solver at timesteps of one's own, ready."""
        return scheduler_for(self.adapter.pipe.scheduler, self.solver, timesteps, self.adapter.device)

    def _reference_steps(self) -> Any:
        return self.scheduler(trailing(self.reference_steps, self.adapter.n_timesteps))

    def _routed(self, schedule: Schedule) -> Plan:
        return self.plan(schedule)

    def _path(self, schedule: Schedule) -> list[tuple[tuple[int, ...], int]]:
        """One call a part. A step ends at the next call, so what decides a state is that timestep too."""
        plan = self.plan(schedule)
        return [((*call, after), 1) for call, after in zip(plan.calls, (*plan.timesteps[1:], -1), strict=True)]

    def _steps_of(self, schedule: Schedule) -> Any:
        return self.scheduler(self.plan(schedule).timesteps)

    def _resumed(self, state: SamplingState, schedule: Schedule) -> SamplingState:
        return replace(state, scheduler=retimed(state.scheduler, self._steps_of(schedule)))
