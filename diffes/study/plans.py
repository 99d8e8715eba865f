"""Plans on a calibrated model: their space in dense calls, the table they start from, the search, held-out scores."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from diffes.adapters import Split
from diffes.errors import DiffesError, at_least
from diffes.measure.currencies import CURRENCIES, Table, costs_of
from diffes.measure.error_table import MeasuredTable, measure_table
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.progress import Progress, RichProgress
from diffes.runtime.solver import SPACINGS, solver_named, spaced
from diffes.search import carried, foretold
from diffes.search.frontier import in_turn, variants
from diffes.search.ledger import OnEvaluation, SearchResult
from diffes.search.loop import run_search
from diffes.search.plan import PlanSpace, trailing
from diffes.search.schedule import Plan, Schedule, Stages
from diffes.search.space import SearchSpace, first_computes
from diffes.search.store import EvaluationStore
from diffes.search.strategy import STRATEGIES
from diffes.study.heldout import HELDOUT_SEED
from diffes.study.settings import check_visited, operators_of
from diffes.study.workbench import Workbench, shown

Genes = Literal["levels", "steps", "joint"]
REFERENCE_STEPS = 200
POWERS = (1.0, 0.5)  # errors of a plan add up as squares or as roots: which is nearer to the truth differs
VARIANTS = 4  # plans of the table from each, and with latents carried along


def call_costs(bench: Workbench, progress: Progress, timed_at: int | None = None) -> Table:
    """(S, H + 1) cost of a call in each stage at each level: the workbench's, where time is counted with the change of
    weights before the call, measured on as many images a call as a search has probes where nothing else is said."""
    if not CURRENCIES.get(bench.config.cost).timed:
        return bench.costs
    probes = bench.adapter.make_probes(timed_at or bench.config.probes, HELDOUT_SEED, "heldout")
    return costs_of(bench.config.cost, bench.router, bench.space, probes, progress, changing=True)


@dataclass(frozen=True)
class Plans:
    """Which timesteps to call and how thin, on a workbench.

    Args:
        bench: the calibrated model; levels, costs and probes are its own, costs in its currency, which must be
            one of a call: macs or latency.
        solver: a name of `diffes.runtime.solver.SOLVERS`.
        nodes: candidate timesteps, at least 2.
        reference_steps: of the dense model that all plans are compared with, by the same solver.
        known_costs: `call_costs` of an earlier process; measured when left out.
        timed_at: images a call that is timed, where time is the cost; as many as a search has probes when left out.
    """

    bench: Workbench
    solver: str = "dpmsolver++"
    nodes: int = 64
    reference_steps: int = field(default_factory=lambda: REFERENCE_STEPS)
    known_costs: Table | None = None
    timed_at: int | None = None

    def __post_init__(self) -> None:
        at_least("nodes", self.nodes, 2)
        solver_named(self.solver)
        if self.bench.config.cost == "level":
            raise DiffesError(
                "plans need what a call costs, and a level is no cost of a call: set cost to macs or latency"
            )
        check_visited(self.bench.space, self.bench.config)

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

    def evaluator(self, n_probes: int, seed: int, split: Split = "search") -> PlanEvaluator:
        """What measures plans, on probes of its own, against the dense model at many steps of the solver."""
        config = self.bench.config
        return PlanEvaluator(
            self.bench.router, self.bench.space.stages, self.solver,
            self.bench.adapter.make_probes(n_probes, seed, split), guidance=config.guidance, metric=self.bench.metric,
            reference_steps=self.reference_steps,
        )  # fmt: skip

    @cached_property
    def searched(self) -> PlanEvaluator:
        """On the probes of a search."""
        return self.evaluator(self.bench.config.probes, self.bench.config.seed)

    @cached_property
    def heldout(self) -> PlanEvaluator:
        """On probes that no search sees."""
        return self.evaluator(self.bench.config.heldout, HELDOUT_SEED, "heldout")

    def table(self, progress: Progress | None = None) -> MeasuredTable:
        """What every jump at every level adds to the error, on the search's probes: one table for all budgets."""
        space, pool = self.space(None), self.bench.pool
        runs = None if pool is None else functools.partial(pool.evaluator(self.searched).runs, space)
        with (progress or RichProgress()).task("errors of jumps", self.nodes) as advance:
            return measure_table(self.searched, space, advance, runs)

    def starts(
        self, table: MeasuredTable, calls: float, genes: Genes = "joint", known: Sequence[Sequence[int]] = ()
    ) -> list[tuple[int, ...]]:
        """Plans for a budget, distinct: the feasible ones of those that are known, those that evolutions on the table's
        forecasts find, then those of the programmes, in turn of each way to foretell an error: with latents carried
        along, by adding errors up as squares and as roots.

        Where some levels reuse and others are thin, plans that do without the one or the other are found apart, each in
        its turn: forecasts are not as good for both, and the search is to see the best of each.
        """
        space = self.space(calls, genes)
        alphabets = [space.allowed, tuple(space.first_levels), (space.allowed[0], *space.reusing)]
        if not space.reusing or len(space.first_levels) == 1:
            alphabets = alphabets[:1]
        ways = [carried.variants(table.run, calls, VARIANTS, allowed=allowed) for allowed in alphabets]
        ways += [variants(table.table, calls, VARIANTS, power=p, allowed=space.first_levels) for p in POWERS]
        first = [tuple(levels) for levels in known if space.is_feasible(levels)]
        solved = [levels for forecast in in_turn(ways) if space.is_feasible(levels := forecast.levels)]
        distinct, found = dict.fromkeys([*first, *solved]), []
        for allowed in alphabets:
            part = replace(space, allowed=allowed, reusing=tuple(k for k in space.reusing if k in allowed))
            starts = tuple(filter(part.is_feasible, distinct))
            found.append(foretold.evolved(table.run, replace(part, starts=starts)))
        return list(dict.fromkeys([*first, *in_turn(found), *solved]))

    def dense(self, calls: float) -> tuple[Schedule, float]:
        """As many dense calls as a budget pays, evenly spaced: of diffusers' spacings the best on the search's probes.

        Returns:
            The plan and its fitness.
        """
        adapter, n = self.bench.adapter, max(int(calls + 1e-9), 1)
        spacings = (spaced(adapter.pipe.scheduler, n, name) for name in SPACINGS)
        space = self.bench.space
        called = [tuple((timestep, 0) for timestep in timesteps) for timesteps in spacings]
        plans = [self.genome(Plan(space.stages, calls, space.max_level, self.solver)) for calls in called]
        fitness = [float(self.searched.scores(plan).mean()) for plan in plans]
        best = max(range(len(plans)), key=fitness.__getitem__)
        return plans[best], fitness[best]

    def genome(self, plan: Plan) -> Schedule:
        """Any plan as a genome, of one node a timestep."""
        n, skip = self.bench.adapter.n_timesteps, plan.max_level + 1
        called = dict(plan.calls)
        return Schedule(Stages.equal(n, n), tuple(called.get(timestep, skip) for timestep in range(n)), skip)

    def nearest(self, genome: Schedule) -> tuple[int, ...]:
        """The plan (N,) whose calls are at the nodes nearest to those of another, each node called once."""
        space = self.space(None)
        nodes = np.array([hi - 1 for _, hi in space.stages.ranges])
        levels = [space.skip] * self.nodes
        for timestep, level in self.searched.plan(genome).calls:
            levels[int(np.abs(nodes - timestep).argmin())] = level
        return tuple(levels)

    @cached_property
    def fixed(self) -> PlanEvaluator:
        """What measures schedules as the paper's: a level for each stage, here at as many evenly spaced timesteps as
        the workbench has steps, by the solver of the plans, on the probes of a search."""
        return self.searched.at(trailing(self.bench.config.steps, self.bench.adapter.n_timesteps))

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
        starts: Sequence[Sequence[int]] = (),
        strategy: str | None = None,
        max_evals: int | None = None,
        max_calls: int | None = None,
        table: MeasuredTable | None = None,
        store: EvaluationStore | None = None,
        progress: Progress | None = None,
        on_evaluation: OnEvaluation | None = None,
    ) -> SearchResult:
        """A search for the best plan within a budget.

        Args:
            calls: the budget, in dense calls.
            genes: "steps", "joint" or "levels"; of the latter the results are schedules, measured by `fixed`.
            starts: plans that it begins with: the table's, and for "joint" the best of "steps". Not of "levels".
            strategy: spec of a strategy; the workbench's own, with its operators, when left out.
            max_evals: plans to evaluate; as the workbench's settings say when left out.
            max_calls: denoiser calls to spend, in rows; likewise.
            table: its forecasts choose which children of measured plans are measured. Not of "levels".
            store: keeps the evaluations; what it has is not paid for again.
            progress: told of every evaluation; bars when left out.
            on_evaluation: called with each evaluation.

        Raises:
            DiffesError: the budget is below the cheapest call, or the strategy does not work on plans.
        """
        config = self.bench.config
        evaluator = self.fixed if genes == "levels" else self.searched
        space = self.level_space(calls) if genes == "levels" else self.space(calls, genes, starts)
        if table is not None and isinstance(space, PlanSpace):
            space = replace(space, forecasts=functools.partial(table.run.errors, caution=foretold.CAUTION[0]))
        spec, evals = strategy or config.strategy, max_evals or config.max_evals
        made = STRATEGIES.make(spec, space, seed=config.seed, **({} if strategy else operators_of(config)))
        with (progress or RichProgress()).task(f"searching {genes}, {calls:g} calls", evals) as advance:
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

    def cost(self, genome: Schedule) -> float:
        """Cost of a plan in dense calls, exactly."""
        stages, costs = self.bench.space.stages, self.call_costs
        calls = self.searched.plan(genome).calls
        return sum(costs[stages.stage_of(timestep)][level] for timestep, level in calls) / self._unit
