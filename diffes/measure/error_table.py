"""The table of local errors that plans are solved on: what a jump from one node to another adds, at every level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffes.adapters import Probes
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.search.frontier import ErrorTable, Floats
from diffes.search.plan import PlanSpace

CHECKPOINTS = 8  # nodes from which it is measured how a deviation grows
COARSE = 12  # calls of a run that shows it, from the noisiest node on


@dataclass(frozen=True)
class MeasuredTable:
    """An error table and what it took.

    Args:
        table: nodes in the order of sampling.
        growth: (N + 1,) factor on the mean square of a deviation at each node, and at the end, until the end.
        calls: denoiser calls, in rows.
    """

    table: ErrorTable
    growth: Floats
    calls: int


@torch.no_grad()
def measure_table(
    evaluator: PlanEvaluator, space: PlanSpace, advance: Callable[[str], object] | None = None
) -> MeasuredTable:
    """Samples the dense model on all nodes and calls it there at every allowed level; jumps cost no call.

    The error of a jump is the mean squared distance of one solver step from the state that the dense run had at its
    end, times how such a deviation grows from there to the end. A solver of second order is given the dense prediction
    of the node that lies about as far behind as the jump reaches ahead.

    Args:
        evaluator: the model, solver, guidance and probes.
        space: nodes and levels; its costs become the table's, in dense calls.
        advance: told after each node.

    Source: the table of GITS, with a level for each jump, weights, and the solver's second order.
    """
    n, levels = space.n_stages, range(space.thinnest + 1)
    parts = [evaluator.probes[rows] for rows in evaluator.parts()]
    errors = np.full((n, n + 1, len(levels)), np.nan)
    sums, starts, ratios, calls = np.zeros_like(errors), np.zeros(n), np.zeros(n + 1), 0
    for part in parts:
        run = _DenseRun.on(evaluator, space, part, levels, advance)
        grown, paid = run.growth(evaluator, part)
        for i in range(n):
            sums[i, i + 1 :] += len(part) * run.errors_from(i)
        starts += len(part) * run.start_errors()
        ratios += len(part) * grown
        calls += paid + run.calls
    total = sum(len(part) for part in parts)
    growth = ratios / total
    for i in range(n):
        errors[i, i + 1 :] = sums[i, i + 1 :] / total * growth[i + 1 :, None]
    errors[:, :, [k for k in levels if k not in space.allowed]] = np.nan
    unit = np.array(space.level_costs, dtype=float)[:, 0].mean()
    costs = np.array(space.level_costs, dtype=float)[::-1, : len(levels)] / unit
    return MeasuredTable(ErrorTable(errors, starts / total * growth[:-1], costs), growth, calls)


@dataclass(frozen=True)
class _DenseRun:
    """States and predictions of a dense run over all nodes, in the order of sampling.

    Args:
        states: (N + 1, n, ...) latents at each node, and final ones.
        data: (N, K, n, ...) predicted clean latents at each node, at each level.
        alphas: (N + 1,) signal of each node, and of the end.
        sigmas: (N + 1,) noise, likewise.
        second: whether the solver is of second order.
        timesteps: (N,) of the nodes.
        calls: denoiser calls, in rows.
    """

    states: Tensor
    data: Tensor
    alphas: Tensor
    sigmas: Tensor
    second: bool
    timesteps: tuple[int, ...]
    calls: int

    @classmethod
    def on(
        cls,
        evaluator: PlanEvaluator,
        space: PlanSpace,
        probes: Probes,
        levels: Sequence[int],
        advance: Callable[[str], object] | None,
    ) -> _DenseRun:
        adapter, guidance, router = evaluator.adapter, evaluator.guidance, evaluator.router
        plans = [evaluator.plan(space.any_schedule([level] * space.n_stages)) for level in levels]
        scheduler = evaluator.scheduler(plans[0].timesteps)
        state = adapter.start(probes, scheduler, guidance)
        states, data, calls = [], [], 0
        for i, timestep in enumerate(plans[0].timesteps):
            states.append(adapter.finish(state, guidance).float().cpu())
            state.scheduler._step_index = i
            by_level: list[Tensor] = []
            for level, plan in zip(levels, plans, strict=True):
                if level not in space.allowed and level:
                    by_level.append(by_level[0])
                    continue
                with router.routed(plan):
                    prediction, latents = adapter.predict(state, probes, guidance)
                clean = state.scheduler.convert_model_output(prediction, sample=latents)
                by_level.append(adapter.finish(replace(state, latents=clean), guidance).float().cpu())
                calls += evaluator.rows(probes)
                if level == 0:
                    dense = prediction, latents
            state = adapter.advance(state, dense[0], state.scheduler.timesteps[i], dense[1])
            data.append(torch.stack(by_level))
            if advance:
                advance(f"timestep {timestep}")
        states.append(adapter.finish(state, guidance).float().cpu())
        noises = [scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in state.scheduler.sigmas]
        alphas, sigmas = (torch.stack([torch.as_tensor(each[part]) for each in noises]).double() for part in (0, 1))
        second = scheduler.config.solver_order == 2
        return cls(torch.stack(states), torch.stack(data), alphas, sigmas, second, plans[0].timesteps, calls)

    def errors_from(self, i: int) -> Floats:
        """(N - i, K) mean squared distance of a solver step from node i, to each later node and the end, from the
        dense run."""
        n = len(self.data)
        logs = self.alphas.log() - self.sigmas.log()
        found = np.empty((n - i, self.data.shape[1]))
        for j in range(i + 1, n + 1):
            clean = self.data[i]
            if j < n and i > 0 and self.second:
                reach = logs[j] - logs[i]
                back = int((logs[i] - logs[:i] - reach).abs().argmin())
                slope = (clean - self.data[back, 0]) / float(logs[i] - logs[back])
                clean = clean + 0.5 * float(reach) * slope
            found[j - i - 1] = (self._step(i, j, clean) - self.states[j]).square().flatten(1).mean(1).double().numpy()
        return found

    def start_errors(self) -> Floats:
        """(N,) mean squared distance of pure noise at each node from the state of the dense run there."""
        return (self.states[:-1] - self.states[0]).square().flatten(1).mean(1).double().numpy()

    def growth(self, evaluator: PlanEvaluator, probes: Probes) -> tuple[Floats, int]:
        """(N + 1,) how the mean square of a deviation at each node changes until the end, and the calls it took.

        Measured on the deviation that a jump to the node leaves, by dense runs from it and from the state without it.
        """
        adapter, guidance, n = evaluator.adapter, evaluator.guidance, len(self.data)
        apart = max(1, n // CHECKPOINTS)  # nearer to the start hardly anything has happened that could deviate
        places = list(range(apart, n, apart))
        ratios, calls = [], 0
        for node in places:
            off = self._step(node - apart, node, self.data[node - apart, 0])
            grid = self.timesteps[node :: max(1, round(n / COARSE))]
            ends = []
            for latents in (self.states[node], off):
                state = adapter.start(probes, evaluator.scheduler(grid), guidance)
                doubled = torch.cat([latents] * (len(state.latents) // len(latents)))
                state = replace(state, latents=doubled.to(state.latents))
                for _ in grid:
                    state = adapter.step(state, probes, guidance)
                    calls += evaluator.rows(probes)
                ends.append(adapter.finish(state, guidance).float().cpu())
            change = float((ends[1] - ends[0]).square().mean()) / max(
                float((off - self.states[node]).square().mean()), 1e-30
            )
            ratios.append(change)
        return np.interp(np.arange(n + 1), [*places, n], [*ratios, 1.0]), calls

    def _step(self, i: int, j: int, clean: Tensor) -> Tensor:
        """The solver's step from node i to node j, or to the end, with predicted clean latents."""
        rest = float(self.alphas[j] - self.alphas[i] * self.sigmas[j] / self.sigmas[i])
        return float(self.sigmas[j] / self.sigmas[i]) * self.states[i] + rest * clean
