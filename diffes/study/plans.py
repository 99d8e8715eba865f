"""Plans on a calibrated model: their space in dense calls, the search, and the final fit of what it found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from diffes.adapters import Split
from diffes.errors import DiffesError, at_least
from diffes.measure.currencies import CURRENCIES, Table, costs_of
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.measure.polish import polished
from diffes.measure.reference import SOLVER
from diffes.progress import Progress, RichProgress
from diffes.search.ledger import OnEvaluation, SearchResult
from diffes.search.loop import run_search
from diffes.search.plan import PlanSpace, power_spaced, trailing
from diffes.search.schedule import Plan, Stages
from diffes.search.space import SearchSpace, first_computes
from diffes.search.store import EvaluationStore
from diffes.search.strategy import STRATEGIES
from diffes.solvers import SOLVERS
from diffes.solvers.offtheshelf import SPACINGS, spaced
from diffes.study.heldout import HELDOUT_SEED
from diffes.study.settings import check_visited, operators_of
from diffes.study.workbench import Workbench, shown

Genes = Literal["levels", "steps", "joint"]
REFERENCE_STEPS = 200
FIT_PROBES = 48  # further probes of the search's split, on which the best plans are fitted and compared again
FIT_SEED = 2_000_000_011  # of these, with the run's own seed added
FINALISTS = 4  # plans of each search that are
EVEN_FINALISTS = 2  # and evenly spaced ones
POWERS, SHIFTS = (1.0, 1.25, 1.5, 2.0), (0.0, 0.25, 0.5, 0.75)  # of spacings that searches begin with
OFF_THE_SHELF = (SOLVER, "dpmsolver++3m", "unipc:order=2", "unipc:order=3")


def call_costs(bench: Workbench, progress: Progress, timed_at: int | None = None) -> Table:
    """(S, H + 1) cost of a call in each stage at each level: the workbench's, where time is counted with the change of
    weights before the call, measured on as many images a call as a search has probes where nothing else is said."""
    if not CURRENCIES.get(bench.config.cost).timed:
        return bench.costs
    probes = bench.adapter.make_probes(timed_at or bench.config.probes, HELDOUT_SEED, "heldout")
    return costs_of(bench.config.cost, bench.router, bench.space, probes, progress, changing=True)


@dataclass(frozen=True)
class Finalist:
    """A plan that was fitted and measured on the probes of the final fit.

    Args:
        plan: with its coefficients, where they were fitted.
        fitness: mean on those probes.
    """

    plan: Plan
    fitness: float


@dataclass(frozen=True)
class Plans:
    """Which timesteps to call, at which levels, and how to step between them, on a workbench.

    Args:
        bench: the calibrated model; levels, costs and probes are its own, costs in its currency, which must be
            one of a call: macs or latency.
        solver: of the plans: a name of `diffes.solvers.SOLVERS`, with options after a colon.
        nodes: candidate timesteps, at least 2.
        reference_steps: of the dense model that all plans are compared with, by DPM-Solver++ 2M.
        known_costs: `call_costs` of an earlier process; measured when left out.
        timed_at: images a call that is timed, where time is the cost; as many as a search has probes when left out.
        fit_probes: of the final fit.
    """

    bench: Workbench
    solver: str = "fitted"
    nodes: int = 64
    reference_steps: int = field(default_factory=lambda: REFERENCE_STEPS)
    known_costs: Table | None = None
    timed_at: int | None = None
    fit_probes: int = field(default_factory=lambda: FIT_PROBES)

    def __post_init__(self) -> None:
        at_least("nodes", self.nodes, 2)
        at_least("fit_probes", self.fit_probes, 1)
        SOLVERS.make(self.solver)
        if self.bench.config.cost == "level":
            raise DiffesError(
                "plans need what a call costs, and a level is no cost of a call: set cost to macs or latency"
            )
        check_visited(self.bench.space, self.bench.config)

    @property
    def fits(self) -> bool:
        """Whether the solver's coefficients are fitted."""
        return SOLVERS.parse(self.solver)[0].fits

    @cached_property
    def call_costs(self) -> Table:
        """(S, H + 1) what `call_costs` says, or what was known."""
        return self.known_costs or call_costs(self.bench, RichProgress(), self.timed_at)

    @cached_property
    def costs(self) -> list[list[float]]:
        """(nodes, H + 1) cost of a call at each node, the cleanest first, at each level."""
        stages, table = self.bench.space.stages, self.call_costs
        grid = Stages.equal(self.nodes, self.bench.adapter.n_timesteps)
        return [list(table[stages.stage_of(hi - 1)]) for _, hi in grid.ranges]

    def space(self, calls: float | None, genes: Genes = "joint", starts: Sequence[Sequence[int]] = ()) -> PlanSpace:
        """Plans that cost at most so many dense calls.

        Args:
            calls: the budget; None allows all.
            genes: "steps", where every call is dense, or "joint".
            starts: plans that a search begins with.

        Raises:
            DiffesError: the budget is below the cheapest call.
        """
        allowed = (0,) if genes == "steps" else None
        return PlanSpace.dense_calls(
            self.costs, calls, allowed=allowed, starts=starts, n_timesteps=self.bench.adapter.n_timesteps,
            reusing=self.bench.router.bank.reusing,
        )  # fmt: skip

    def evaluator(
        self, n_probes: int, seed: int, split: Split = "search", fits: bool = True, guidance: float | None = None
    ) -> PlanEvaluator:
        """Return what measures plans, on probes of its own, against the dense model at many steps.

        Args:
            n_probes: drawn for it.
            seed: of their noise.
            split: of prompts.
            fits: whether it can also fit solvers.
            guidance: of all probes; as the settings say when left out, which may be a range.
        """
        config, probes = self.bench.config, self.bench.adapter.make_probes(n_probes, seed, split)
        if guidance is None and isinstance(config.guidance, tuple):
            probes = probes.over(*config.guidance)
        return PlanEvaluator(
            self.bench.router, self.bench.space.stages, self.solver, probes,
            guidance=config.scale if guidance is None else guidance, metric=self.bench.metric,
            reference_steps=self.reference_steps, fits=fits,
        )  # fmt: skip

    @cached_property
    def searched(self) -> PlanEvaluator:
        """On the probes of a search."""
        return self.evaluator(self.bench.config.probes, self.bench.config.seed)

    @cached_property
    def refitted(self) -> PlanEvaluator:
        """On the probes of the final fit, which a search does not see."""
        return self.evaluator(self.fit_probes, FIT_SEED + self.bench.config.seed)

    @cached_property
    def heldout(self) -> PlanEvaluator:
        """On probes that neither search nor fit sees."""
        return self.evaluator(self.bench.config.heldout, HELDOUT_SEED, "heldout", fits=False)

    @cached_property
    def ends(self) -> dict[float, PlanEvaluator]:
        """On the held-out probes at each end of a range of guidance; none where there is no range."""
        guidance, n = self.bench.config.guidance, self.bench.config.heldout
        ends = guidance if isinstance(guidance, tuple) else ()
        return {end: self.evaluator(n, HELDOUT_SEED, "heldout", fits=False, guidance=end) for end in ends}

    @property
    def reference_calls(self) -> int:
        """Denoiser calls, in rows, of the references that search and fit are made on."""
        return self.searched.reference_calls + self.refitted.reference_calls

    @property
    def denoiser_calls(self) -> int:
        """Denoiser calls, in rows, of what is measured beside the searches."""
        return self.searched.denoiser_calls + self.refitted.denoiser_calls

    def spaced(self, calls: float) -> list[list[int]]:
        """Timesteps of as many calls as a budget pays, evenly spaced in each of diffusers' ways."""
        n = max(int(calls + 1e-9), 1)
        return [spaced(self.bench.adapter.pipe.scheduler, n, name) for name in SPACINGS]

    def of_dense(self, timesteps: Sequence[int], solver: str) -> Plan:
        """The plan of dense calls at some timesteps, the noisiest first."""
        space = self.bench.space
        return Plan(space.stages, tuple((t, 0) for t in timesteps), space.max_level, solver)

    def even(self, calls: float, solvers: Sequence[str]) -> Finalist:
        """Of evenly spaced dense calls, by some solvers, the best: of all spacings on the probes of the search, and of
        the best few on those of the final fit."""
        plans = [self.of_dense(timesteps, solver) for solver in solvers for timesteps in self.spaced(calls)]
        distinct = list(dict.fromkeys(plans))
        distinct.sort(key=lambda plan: -self.searched.measured(plan)[0])
        return self.best(distinct[:EVEN_FINALISTS])

    def best(self, plans: Sequence[Plan]) -> Finalist:
        """The best of some plans on the probes of the final fit; those whose solver fits are fitted there."""
        found = [self.finalist(plan) for plan in plans]
        return max(found, key=lambda finalist: finalist.fitness)

    def finalist(self, plan: Plan) -> Finalist:
        """A plan, fitted on the probes of the final fit where its solver fits, and measured on them."""
        fitness, rows = self.refitted.measured(plan)
        return Finalist(plan if rows is None else replace(plan, coefficients=rows), fitness)

    def polished(self, final: Finalist) -> Finalist:
        """A finalist whose coefficients were fitted, after Gauss-Newton on the probes of the final fit."""
        if final.plan.coefficients is None:
            return final
        plan = polished(self.refitted, final.plan)
        return max(final, Finalist(plan, self.refitted.measured(plan)[0]), key=lambda each: each.fitness)

    def finalists(self, found: SearchResult, evaluator: PlanEvaluator) -> list[Plan]:
        """The best few plans of a search, without coefficients, the best first."""
        pairs = zip(found.evaluations, found.eligible, strict=True)
        fittest = sorted((e for e, counts in pairs if counts), key=lambda e: -e.fitness)
        return [evaluator.plan(e.schedule) for e in fittest[:FINALISTS]]

    def starts(
        self, calls: float, genes: Genes = "joint", known: Sequence[Sequence[int]] = ()
    ) -> list[tuple[int, ...]]:
        """Plans (N,) that a search begins with, feasible and distinct: known ones, then in turn evenly spaced dense
        calls and evenly spaced calls at one level, or at levels that fall on the way. Of dense calls alone also those
        spaced by powers of time; where levels are searched too, the known plans stand for them."""
        space, n, size = self.space(calls, genes), max(int(calls + 1e-9), 1), self.bench.adapter.n_timesteps
        powers = itertools.product(POWERS, SHIFTS) if genes == "steps" else ()
        spacings = [*self.spaced(calls), *(power_spaced(n, size, power, shift) for power, shift in powers)]
        dense = [self.nearest(self.of_dense(timesteps, self.solver)) for timesteps in spacings]
        levels = [made for level in space.allowed for made in (space.even(level), space.ramp(level))]
        pairs = itertools.zip_longest(dense, levels)
        found = [*map(tuple, known), *(tuple(plan) for pair in pairs for plan in pair if plan is not None)]
        return [plan for plan in dict.fromkeys(found) if space.is_feasible(plan)]

    def nearest(self, plan: Plan) -> tuple[int, ...]:
        """The genome (N,) whose calls are at the nodes nearest to those of a plan, each node called once."""
        space = self.space(None)
        nodes = np.array([hi - 1 for _, hi in space.stages.ranges])
        levels = [space.skip] * self.nodes
        for timestep, level in plan.calls:
            levels[int(np.abs(nodes - timestep).argmin())] = level
        return tuple(levels)

    @cached_property
    def fixed(self) -> PlanEvaluator:
        """What measures schedules as the paper's: a level for each stage, here at as many evenly spaced timesteps as
        the workbench has steps, by DPM-Solver++ 2M, on the probes of a search."""
        return self.searched.by(SOLVER, trailing(self.bench.config.steps, self.bench.adapter.n_timesteps))

    def level_space(self, calls: float) -> SearchSpace:
        """Schedules, a level for each stage at the timesteps of `fixed`, that cost at most so many dense calls.

        Raises:
            DiffesError: the highest level in all stages costs more.
        """
        stages = self.bench.space.stages
        steps = stages.count_steps(self.fixed.timesteps or ())
        costs = first_computes(self.call_costs, steps, self.bench.router.bank.reusing)
        least, dense = (sum(n * row[k] for n, row in zip(steps, costs, strict=True)) for k in (-1, 0))
        if calls * self._unit < least:
            raise DiffesError(
                f"schedules of {sum(steps)} steps cost at least {least / self._unit:.4f} dense calls, got {calls}; "
                "raise it, or take fewer steps"
            )
        share = min(calls * self._unit / dense, 1.0)
        return SearchSpace.dense_fraction(stages, steps, costs, share)

    def search(
        self,
        calls: float,
        genes: Genes = "joint",
        *,
        solver: str | None = None,
        starts: Sequence[Sequence[int]] | None = None,
        strategy: str | None = None,
        max_evals: int | None = None,
        max_calls: int | None = None,
        store: EvaluationStore | None = None,
        progress: Progress | None = None,
        on_evaluation: OnEvaluation | None = None,
    ) -> SearchResult:
        """A search for the best plan within a budget.

        Args:
            calls: the budget, in dense calls.
            genes: "steps", "joint" or "levels"; of the latter the results are schedules, measured by `fixed`.
            solver: of "steps" and "joint"; the plans' own when left out.
            starts: plans that it begins with; `self.starts` when left out. Not of "levels".
            strategy: spec of a strategy; the workbench's own, with its operators, when left out.
            max_evals: plans to evaluate; as the workbench's settings say when left out.
            max_calls: denoiser calls to spend, in rows; likewise.
            store: keeps the evaluations; what it has is not paid for again.
            progress: told of every evaluation; bars when left out.
            on_evaluation: called with each evaluation.

        Raises:
            DiffesError: the budget is below the cheapest call, or the strategy does not work on plans.
        """
        config, kind = self.bench.config, f"{genes}, {solver or self.solver}" if genes != "levels" else genes
        evaluator = self.fixed if genes == "levels" else self.searched.by(solver or self.solver)
        space: SearchSpace = (
            self.level_space(calls)
            if genes == "levels"
            else self.space(calls, genes, self.starts(calls, genes) if starts is None else starts)
        )
        spec, evals = strategy or config.strategy, max_evals or config.max_evals
        made = STRATEGIES.make(spec, space, seed=config.seed, **({} if strategy else operators_of(config)))
        with (progress or RichProgress()).task(f"searching {kind}, {calls:g} calls", evals) as advance:
            return run_search(
                made, self.bench.measuring(evaluator), max_evals=evals,
                max_denoiser_calls=max_calls or config.max_calls, max_seconds=config.time_limit, store=store,
                on_evaluation=shown(space, config.metric, advance, on_evaluation, self.bench.pool),
                asynchronous=config.asynchronous,
            )  # fmt: skip

    @property
    def _unit(self) -> float:
        """Cost of a dense call, in the unit of `costs`: the mean where it differs by node."""
        return float(np.mean([row[0] for row in self.costs]))

    def cost(self, plan: Plan) -> float:
        """Cost of a plan in dense calls, exactly."""
        stages, costs = self.bench.space.stages, self.call_costs
        return sum(costs[stages.stage_of(timestep)][level] for timestep, level in plan.calls) / self._unit
