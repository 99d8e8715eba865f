"""Fitness of plans: images at timesteps of the plan's own, by a solver that may be fitted during the run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffes.adapters import Call, Probes
from diffes.errors import DiffesError
from diffes.measure.evaluator import BATCH, CACHE_BYTES, Candidate, Prefix, RoutedEvaluator, States
from diffes.measure.metrics import Metric
from diffes.measure.reference import SOLVER, Reference, inner_products
from diffes.runtime.router import Router
from diffes.solvers import NoiseProcess, Row, Solver, coefficients, fit_of
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.plan import calls_of, trailing
from diffes.spaces.schedule import Plan, Stages
from diffes.spaces.strategy import Rows

OLD_PREDICTIONS = 2  # predictions that the states of a fitted solver hold, in fp32


class PlanEvaluator(RoutedEvaluator):
    """Evaluator of plans, or of genomes of a `PlanSpace`: which nodes are called, each at which level.

    The reference is the dense model at many steps of DPM-Solver++ 2M, evenly spaced down from the last timestep
    ("trailing"), whatever the solver of the plans. A plan without coefficients whose solver fits is fitted while it is
    sampled, on the evaluator's own probes and without a further denoiser call: at each call, by least squares over all
    probes, to the latents that the reference has at the next timestep.

    Args:
        router: the model with its bank; dense outside of an evaluation.
        stages: stages in which the bank was calibrated.
        solver: solver of genomes: a name of `diffes.solvers.SOLVERS`, with options after a colon.
        probes: fixed noise and conditions.
        guidance: classifier-free guidance scale; 1 and less switch it off.
        metric: metric of the score.
        reference_steps: steps of the dense model.
        batch: probes per denoiser call (twice as many rows with guidance).
        cache_bytes: largest memory that the cached states may take.
        fits: whether the reference is recorded, so that solvers can be fitted to it.

    Attributes:
        timesteps: timesteps that every genome calls; a genome then is a schedule, with a level for each stage. None:
            genomes choose them.
        reference_calls: denoiser calls, in rows, of the reference.
        recorded: the reference at every step; None where nothing is fitted.
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
        fits: bool = True,
    ) -> None:
        self.stages = stages
        self.solver = solver
        self.reference_steps = reference_steps
        self.timesteps: tuple[int, ...] | None = None
        self.process = NoiseProcess.of(router.adapter.pipe.scheduler)
        self.reference_calls = 0
        self.recorded: Reference | None = None
        self._passed: dict[int, list[Tensor]] | None = {} if fits else None
        super().__init__(router, probes, guidance=guidance, metric=metric, batch=batch, cache_bytes=cache_bytes)
        self._row_bytes += OLD_PREDICTIONS * 4 * self.final_reference[0].numel() * self.rows(probes) / len(probes)

    def plan(self, genome: Candidate) -> Plan:
        """Return the plan that a genome runs; a plan is returned as it is."""
        if isinstance(genome, Plan):
            return genome
        if self.timesteps is None:
            return Plan(self.stages, calls_of(genome), genome.max_level - 1, self.solver)
        calls = tuple((timestep, genome.key(timestep)[1]) for timestep in self.timesteps)
        return Plan(self.stages, calls, genome.max_level, self.solver)

    def by(self, solver: str, timesteps: Sequence[int] | None = None) -> PlanEvaluator:
        """Return an evaluator of genomes by another solver, with the same probes, reference and cache.

        Args:
            solver: its name, with options after a colon.
            timesteps: timesteps that every genome calls, the noisiest first; a genome then is a schedule, with a level
                for each stage.
        """
        made = copy.copy(self)
        made.solver, made._due = solver, {}
        made.timesteps = None if timesteps is None else tuple(timesteps)
        return made

    def scheduler(self, plan: Plan) -> PlanScheduler:
        """Return the scheduler of a plan, ready to run; for a plan to be fitted, with what its fit begins with."""
        return PlanScheduler.of(self.adapter.pipe.scheduler, plan.timesteps, plan.rows, self.adapter.device)

    def fitted(self, plan: Plan) -> Plan:
        """Return the plan with coefficients that are fitted on the evaluator's probes, whatever it had before."""
        _, rows = self.sampled(replace(plan, coefficients=None))
        return replace(plan, coefficients=rows)

    def _reference_steps(self) -> PlanScheduler:
        steps = trailing(self.reference_steps, self.adapter.reach)
        return PlanScheduler.of(self.adapter.pipe.scheduler, steps, SOLVER, self.adapter.device)

    def _reference_in_parts(self, n: int) -> Tensor:
        if self._passed is not None:
            self._passed = {}
        finals = super()._reference_in_parts(n)
        if self._passed is not None:
            states = torch.cat([torch.stack(self._passed[start]) for start in sorted(self._passed)], dim=1)
            steps = trailing(self.reference_steps, self.adapter.reach)
            self.recorded = Reference(states, tuple(steps), self.process.along(steps))
            self._passed = None
        self.reference_calls = self.reference_steps * self.rows(self.probes)
        return finals

    def _pass_reference(self, latents: Tensor, rows: slice) -> None:
        if self._passed is not None:
            self._passed.setdefault(rows.start, []).append(latents.float().cpu())

    def _routed(self, schedule: Candidate) -> Plan:
        return self.plan(schedule)

    def _path(self, schedule: Candidate) -> list[tuple[Prefix, int]]:
        """Return one part per call.

        A step ends at the next call, so that timestep decides the state too, and so does the step's row, or what its
        fit begins with: some solvers lower their order before the end.
        """
        plan = self.plan(schedule)
        rows = plan.coefficients or coefficients(plan.solver, self.process.along(plan.timesteps))
        keeps = max(map(len, rows)) if plan.coefficients else -1
        ends = (*plan.timesteps[1:], -1)
        parts = [(*call, after, *row) for call, after, row in zip(plan.calls, ends, rows, strict=True)]
        return [((plan.solver, keeps, *parts[0]), 1), *((part, 1) for part in parts[1:])]

    def _steps_of(self, schedule: Candidate) -> PlanScheduler:
        return self.scheduler(self.plan(schedule))

    def _resumed(self, states: States, schedule: Candidate) -> States:
        ready = self._steps_of(schedule)
        return tuple(replace(state, scheduler=ready.resumed(state.scheduler)) for state in states)

    def _coefficients(self, states: States) -> Rows | None:
        return tuple(states[0].scheduler.coefficients) if states[0].scheduler.fits else None

    def stepped(self, states: States, parts: Sequence[slice]) -> States:
        solver = states[0].scheduler.fits
        if solver is None:
            return super().stepped(states, parts)
        calls, memories = list[Call](), list[Any]()
        for state, rows in zip(states, parts, strict=True):
            self.router.memory = state.memory
            calls.append(self.adapter.called(state, self.probes[rows], self.guidance))
            memories.append(self.router.memory)
        row = self._fit(solver, states, parts, calls)
        after = []
        for state, call, memory in zip(states, calls, memories, strict=True):
            state.scheduler.coefficients[state.index] = row
            after.append(replace(self.adapter.advance(state, call), memory=memory))
        return tuple(after)

    def _fit(self, solver: Solver, states: States, parts: Sequence[slice], calls: Sequence[Call]) -> Row:
        """Fit the coefficients of the present call, by least squares over all parts."""
        if self.recorded is None:
            raise DiffesError("this evaluator has not recorded its reference, so no solver can be fitted to it")
        scheduler = states[0].scheduler
        i, prior = scheduler.index, scheduler.coefficients[scheduler.index]
        after = scheduler.plan[i + 1] if i + 1 < len(scheduler.plan) else None
        target = self.recorded.at(after, self.process.along(scheduler.plan)[i + 1])
        products = torch.zeros(len(prior) + 1, len(prior) + 1, dtype=torch.float64)
        for state, rows, call in zip(states, parts, calls, strict=True):
            terms = [t[: state.images] for t in state.scheduler.terms(call.output, call.latents, len(prior))]
            products += inner_products(terms, target[rows])
        return fit_of(solver, prior, products.numpy())
