"""The table of local errors that plans are solved on: what a jump from one node to another adds, at every level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffes.adapters import Probes, SamplingState
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.runtime.memory import Memory
from diffes.search.carried import Trajectory
from diffes.search.frontier import ErrorTable, Floats
from diffes.search.plan import PlanSpace

CHECKPOINTS = 8  # nodes from which it is measured how a deviation grows
COARSE = 12  # calls of a run that shows it, from the noisiest node on
SMOOTHING = 20  # the reaction of predictions is averaged over about a node in so many, at least over neighbours
GAPS = (32, 12, 5)  # a level that reuses is measured with so many gaps in a run
MATCHED = np.linspace(0.5, 2, 151)  # factors on it that are tried
SPAN = 1e-12  # directions in which latents differ by less, relative to the first one, are left out


@dataclass(frozen=True)
class MeasuredTable:
    """An error table, the dense run that it is made of, and what it took.

    Args:
        table: nodes in the order of sampling.
        growth: (N + 1,) factor on the mean square of a deviation at each node, and at the end, until the end.
        run: the dense run, for plans whose latents are carried along.
        calls: denoiser calls, in rows.
    """

    table: ErrorTable
    growth: Floats
    run: Trajectory
    calls: int


Runs = Callable[[slice], Iterable[tuple[Sequence[int], "DenseRun"]]]


@torch.no_grad()
def measure_table(
    evaluator: PlanEvaluator,
    space: PlanSpace,
    advance: Callable[..., object] | None = None,
    runs: Runs | None = None,
) -> MeasuredTable:
    """Samples the dense model on all nodes and calls it there at every allowed level; jumps cost no call.

    A level that reuses is called once for each of a few gaps to an earlier node, of whose dense call it reuses; jumps
    at such levels are in the carried run only, as their errors depend on the plan before.

    The error of a jump is the mean squared distance of one solver step from the state that the dense run had at its
    end, times how such a deviation grows from there to the end. A solver of second order is given the dense prediction
    of the node that lies about as far behind as the jump reaches ahead.

    Args:
        evaluator: the model, solver, guidance and probes.
        space: nodes and levels; its costs become the table's, in dense calls.
        advance: told after each node, or how many are done.
        runs: makes `DenseRun.on` elsewhere, for some probes and all nodes, a part of the nodes at a time; what comes
            out is the same.

    Source: the table of GITS, with a level for each jump, weights, and the solver's second order.
    """
    return evaluator.within_room(lambda n: _measured(evaluator, space, evaluator.parts(n=n), advance, runs))


def _measured(
    evaluator: PlanEvaluator,
    space: PlanSpace,
    parts: Sequence[slice],
    advance: Callable[..., object] | None,
    runs: Runs | None,
) -> MeasuredTable:
    n, levels = space.n_stages, range(space.thinnest + 1)
    errors = np.full((n, n + 1, len(levels)), np.nan)
    sums, starts, ratios, reaction, calls = np.zeros_like(errors), np.zeros(n), np.zeros(n + 1), np.zeros(n), 0
    reusing = [level for level in levels if level in space.reusing]
    gaps = gaps_of(space)
    again = n * len(reusing) * len(gaps)
    products = np.zeros(2 * [n + 1 + n * len(levels) + again])
    for rows in parts:
        part = evaluator.probes[rows]
        run = DenseRun.on(evaluator, space, rows, range(n), advance) if runs is None else _joined(runs(rows), advance)
        grown, reacts, paid = run.growth(evaluator, part)
        for i in range(n):
            sums[i, i + 1 :] += len(part) * run.errors_from(i)
        starts += len(part) * run.start_errors()
        ratios += len(part) * grown
        reaction += len(part) * reacts
        products += len(part) * run.products()
        calls += paid + run.calls
    total = len(evaluator.probes)
    growth = ratios / total
    for i in range(n):
        errors[i, i + 1 :] = sums[i, i + 1 :] / total * growth[i + 1 :, None]
    unknown = [k for k in levels if k not in space.first_levels]
    errors[:, :, unknown] = np.nan
    unit = np.array(space.level_costs, dtype=float)[:, 0].mean()
    costs = np.array(space.level_costs, dtype=float)[::-1, : len(levels)] / unit
    places = _coordinates(products / total)
    states, data = places[: n + 1], places[n + 1 : len(places) - again].reshape(n, len(levels), -1)
    data[:, unknown] = np.nan
    reused = places[len(places) - again :].reshape(n, len(reusing), len(gaps), places.shape[1])
    kept = Trajectory(
        states, data, run.alphas.numpy(), run.sigmas.numpy(), reaction / total, costs, run.second,
        np.array(reusing, dtype=int), np.array(gaps, dtype=int), reused,
    )  # fmt: skip
    kept = replace(kept, reaction=_matched(kept, growth))
    return MeasuredTable(ErrorTable(errors, starts / total * growth[:-1], costs), growth, kept, calls)


def gaps_of(space: PlanSpace) -> list[int]:
    """Distances to an earlier node at which levels that reuse are measured; none where no level does."""
    n = space.n_stages
    return sorted({max(1, round(n / share)) for share in GAPS}) if space.reusing else []


def _joined(runs: Iterable[tuple[Sequence[int], DenseRun]], advance: Callable[..., object] | None) -> DenseRun:
    """One run of those that each have a part of the nodes."""
    found: dict[int, DenseRun] = {}
    for nodes, run in runs:
        found |= dict.fromkeys(nodes, run)
        if advance:
            advance(f"{len(nodes)} timesteps", len(nodes))
    whole = found[max(found)]  # it went on to the end
    data, reused = (torch.stack([getattr(found[i], name)[i] for i in sorted(found)]) for name in ("data", "reused"))
    calls = sum(run.calls for run in {id(run): run for run in found.values()}.values())
    return replace(whole, data=data, reused=reused, calls=calls)


def _matched(run: Trajectory, growth: Floats) -> Floats:
    """(N,) the reaction of a run times what makes deviations grow on the way through all nodes as was measured.

    A reaction is how far predictions move along a deviation; what they do across it adds to its growth too.
    """
    ratio = run.noises[1:] / run.noises[:-1]
    gain = run.signals[1:] - run.signals[:-1] * ratio
    factors = np.abs(ratio + gain * run.reaction * MATCHED[:, None])  # (scales, N)
    foretold = 2 * np.log(np.maximum(factors, 1e-12))[:, ::-1].cumsum(1)[:, ::-1]
    off = (foretold - np.log(np.maximum(growth[:-1], 1e-12))).mean(1)
    return np.asarray(run.reaction * MATCHED[np.abs(off).argmin()])


def _coordinates(products: Floats) -> Floats:
    """Points (n, R) that have these inner products (n, n), in as few coordinates as it takes; NaN for infinite ones."""
    finite = np.isfinite(products.diagonal())
    squares, directions = np.linalg.eigh(products[np.ix_(finite, finite)])
    spanned = squares > SPAN * squares[-1]
    points = np.full((len(products), spanned.sum()), np.nan)
    points[finite] = directions[:, spanned] * np.sqrt(squares[spanned])
    return points


@dataclass(frozen=True)
class DenseRun:
    """States and predictions of a dense run over all nodes, in the order of sampling; of one that has a part of the
    nodes, those up to the last of them, and only what was predicted at these.

    Args:
        states: (N + 1, n, ...) latents at each node, and final ones.
        data: (N, K, n, ...) predicted clean latents at each node, at each level; dense ones for levels that reuse.
        reused: (N, L, G, n, ...) by levels that reuse, with each gap to the node of which they do.
        alphas: (N + 1,) signal of each node, and of the end.
        sigmas: (N + 1,) noise, likewise.
        second: whether the solver is of second order.
        timesteps: (N,) of the nodes.
        calls: denoiser calls, in rows.
    """

    states: Tensor
    data: Tensor
    reused: Tensor
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
        rows: slice,
        nodes: Sequence[int],
        advance: Callable[[str], object] | None = None,
    ) -> DenseRun:
        """A dense run on some probes, with calls at every level at some nodes.

        Args:
            evaluator: the model, solver, guidance and probes.
            space: nodes and levels.
            rows: which of the probes.
            nodes: at which of them levels are called, the noisiest first; it ends with the last.
            advance: told after each node.
        """
        adapter, guidance, router = evaluator.adapter, evaluator.guidance, evaluator.router
        probes, levels, gaps = evaluator.probes[rows], range(space.thinnest + 1), gaps_of(space)
        plans = [evaluator.plan(space.any_schedule([level] * space.n_stages)) for level in levels]
        scheduler = evaluator.scheduler(plans[0].timesteps)
        state = adapter.start(probes, scheduler, guidance)
        states, data, reused, calls = [], [], [], 0
        memories: list[Memory | None] = []
        for i, timestep in enumerate(plans[0].timesteps[: nodes[-1] + 1]):
            states.append(adapter.finish(state, guidance).float().cpu())
            with router.routed(plans[0], keep=True):
                prediction, latents, clean = _predicted(evaluator, state, probes)
                memories.append(router.memory)
            dense = prediction, latents
            by_level, found = [clean], list[Tensor]()
            if i in nodes:
                calls += evaluator.rows(probes)
            for level, plan in zip(levels[1:], plans[1:], strict=True):
                if level not in space.first_levels or i not in nodes:
                    by_level.append(by_level[0])
                    continue
                with router.routed(plan, keep=True):
                    by_level.append(_predicted(evaluator, state, probes)[2])
                calls += evaluator.rows(probes)
            for level in (level for level in levels if level in space.reusing):
                for node in (max(i - gap, 0) for gap in gaps):
                    if not i or i not in nodes:  # nothing before it
                        found.append(by_level[0])
                        continue
                    called = ((plans[0].timesteps[node], 0), (timestep, level))
                    with router.routed(replace(plans[0], calls=called)):
                        router.memory = memories[node]
                        found.append(_predicted(evaluator, state, probes)[2])
                    calls += evaluator.rows(probes)
            state = adapter.advance(state, dense[0], state.scheduler.timesteps[i], dense[1])
            data.append(torch.stack(by_level))
            reused.append(torch.stack(found).unflatten(0, (-1, len(gaps))) if found else torch.empty(0))
            for old in range(max(i - max(gaps, default=0), 0)):
                memories[old] = None
            if advance:
                advance(f"timestep {timestep}")
        states.append(adapter.finish(state, guidance).float().cpu())
        noises = [scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in state.scheduler.sigmas]
        alphas, sigmas = (torch.stack([torch.as_tensor(each[part]) for each in noises]).double() for part in (0, 1))
        second = scheduler.config.solver_order == 2
        kept = torch.stack(states), torch.stack(data), torch.stack(reused)
        return cls(*kept, alphas, sigmas, second, plans[0].timesteps, calls)

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

    def products(self) -> Floats:
        """Inner products of the states (N + 1) and the predictions (N K, then N L G), a square matrix, as means over
        all entries.

        They are all that a linear combination of these can be measured by.
        """
        again = [self.reused.flatten(0, 2).flatten(1)] if self.reused.numel() else []
        points = torch.cat([self.states.flatten(1), self.data.flatten(0, 1).flatten(1), *again])
        pieces = (piece.double() for piece in points.split(1 << 14, dim=1))
        total = torch.stack([piece @ piece.T for piece in pieces]).sum(0)
        return (total / points.shape[1]).numpy()

    def growth(self, evaluator: PlanEvaluator, probes: Probes) -> tuple[Floats, Floats, int]:
        """(N + 1,) how the mean square of a deviation at each node changes until the end, (N,) what a prediction there
        adds to itself for each unit of one, and the calls it took.

        Measured on the deviation that a jump to the node leaves, by dense runs from it and from the state without it.
        """
        n = len(self.data)
        apart = max(1, n // CHECKPOINTS)  # nearer to the start hardly anything has happened that could deviate
        places = list(range(apart, n, apart))
        ratios, reactions, calls = [], [], 0
        for node in places:
            off = self._step(node - apart, node, self.data[node - apart, 0])
            called = range(node, n, max(1, round(n / COARSE)))
            kept, moved = (self._run(evaluator, probes, called, latents) for latents in (self.states[node], off))
            calls += 2 * len(called) * evaluator.rows(probes)
            changes = moved - kept  # (steps + 1, 2, n, ...)
            start = max(float(changes[0, 0].square().mean()), 1e-30)
            ratios.append(float(changes[-1, 0].square().mean()) / start)
            for i, (latents, clean) in zip(called, changes[:-1], strict=True):
                square = max(float(latents.square().mean()), 1e-30)
                reactions.append((i, float((latents * clean).mean()) / square))
        grown = np.interp(np.arange(n + 1), [*places, n], [*ratios, 1.0])
        return grown, _smooth(reactions, n), calls

    def _run(self, evaluator: PlanEvaluator, probes: Probes, called: Sequence[int], latents: Tensor) -> Tensor:
        """(steps + 1, 2, n, ...) of a dense run from given latents: those before each call and what it predicts, clean;
        final latents twice."""
        adapter, guidance = evaluator.adapter, evaluator.guidance
        state = adapter.start(probes, evaluator.scheduler([self.timesteps[i] for i in called]), guidance)
        doubled = torch.cat([latents] * (len(state.latents) // len(latents)))
        state = replace(state, latents=doubled.to(state.latents))
        found = []
        for timestep in state.scheduler.timesteps:
            prediction, given, clean = _predicted(evaluator, state, probes)
            found.append(torch.stack([adapter.finish(state, guidance).float().cpu(), clean]))
            state = adapter.advance(state, prediction, timestep, given)
        final = adapter.finish(state, guidance).float().cpu()
        return torch.stack([*found, torch.stack([final, final])])

    def _step(self, i: int, j: int, clean: Tensor) -> Tensor:
        """The solver's step from node i to node j, or to the end, with predicted clean latents."""
        rest = float(self.alphas[j] - self.alphas[i] * self.sigmas[j] / self.sigmas[i])
        return float(self.sigmas[j] / self.sigmas[i]) * self.states[i] + rest * clean


def _predicted(evaluator: PlanEvaluator, state: SamplingState, probes: Probes) -> tuple[Tensor, Tensor, Tensor]:
    """The next call: the prediction and latents that a scheduler's step takes, and clean latents (n, ...) predicted."""
    adapter, guidance = evaluator.adapter, evaluator.guidance
    prediction, latents = adapter.predict(state, probes, guidance)
    state.scheduler._step_index = state.index
    clean = state.scheduler.convert_model_output(prediction, sample=latents)
    return prediction, latents, adapter.finish(replace(state, latents=clean), guidance).float().cpu()


def _smooth(values: Sequence[tuple[int, float]], n: int) -> Floats:
    """(N,) averages of values at nodes, weighted by how near these are; 0 where there are none."""
    if not values:
        return np.zeros(n)
    nodes, found = np.array(values).T
    weights = np.exp(-0.5 * np.square((np.arange(n)[:, None] - nodes) / max(1.0, n / SMOOTHING)))
    return np.asarray((weights @ found) / weights.sum(1))
