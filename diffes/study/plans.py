"""Plans on a calibrated model: their space in dense calls, the table they start from, the search, held-out scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from diffes.adapters import Split
from diffes.errors import DiffesError, at_least
from diffes.measure.error_table import MeasuredTable, measure_table
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.progress import Progress, RichProgress
from diffes.runtime.solver import solver_named
from diffes.search import carried
from diffes.search.frontier import variants
from diffes.search.ledger import SearchResult
from diffes.search.loop import run_search
from diffes.search.plan import PlanSpace
from diffes.search.schedule import Schedule, Stages
from diffes.search.store import EvaluationStore
from diffes.search.strategy import STRATEGIES, Evaluation
from diffes.study.heldout import HELDOUT_SEED
from diffes.study.workbench import Workbench

Genes = Literal["steps", "joint"]
POWERS = (1.0, 0.5)  # errors of a plan add up as squares or as roots: which is nearer to the truth differs
VARIANTS = 4  # plans of the table from each, and with latents carried along


@dataclass(frozen=True)
class Plans:
    """Which timesteps to call and how thin, on a workbench.

    Args:
        bench: the calibrated model; levels, costs and probes are its own, costs in its currency, which must be
            one of a call: macs or latency.
        solver: a name of `diffes.runtime.solver.SOLVERS`.
        nodes: candidate timesteps, at least 2.
        reference_steps: of the dense model that all plans are compared with, by the same solver.
    """

    bench: Workbench
    solver: str = "dpmsolver++"
    nodes: int = 64
    reference_steps: int = 200

    def __post_init__(self) -> None:
        at_least("nodes", self.nodes, 2)
        solver_named(self.solver)
        if self.bench.config.cost == "level":
            raise DiffesError(
                "plans need what a call costs, and a level is no cost of a call: set cost to macs or latency"
            )
        if missing := [s for s in range(self.bench.space.n_stages) if s not in self.bench.space.visited]:
            raise DiffesError(
                f"plans may call any timestep, and stages {missing} were not calibrated because no step of the "
                f"workbench is in them: raise steps above {self.bench.config.steps} or lower stages"
            )

    @cached_property
    def costs(self) -> list[list[float]]:
        """(nodes, H + 1) cost of a call at each node, the cleanest first, at each level."""
        stages, table = self.bench.space.stages, self.bench.costs
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
            self.costs, calls, allowed=allowed, starts=starts, n_timesteps=self.bench.adapter.n_timesteps
        )

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
        with (progress or RichProgress()).task("errors of jumps", self.nodes) as advance:
            return measure_table(self.searched, self.space(None), advance)

    def starts(self, table: MeasuredTable, calls: float, genes: Genes = "joint") -> list[tuple[int, ...]]:
        """The table's plans for a budget, in turn of each way to foretell an error: with latents carried along, which
        is the most promising, then by adding errors up as squares and as roots."""
        space = self.space(calls, genes)
        ways = [carried.variants(table.run, calls, VARIANTS, allowed=space.allowed)]
        ways += [variants(table.table, calls, VARIANTS, power=p, allowed=space.allowed) for p in POWERS]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*ways))
        found = dict.fromkeys(forecast.levels for forecast in turns if forecast is not None)
        return [levels for levels in found if space.is_feasible(levels)]

    def search(
        self,
        calls: float,
        genes: Genes = "joint",
        *,
        starts: Sequence[Sequence[int]] = (),
        strategy: str | None = None,
        max_evals: int | None = None,
        store: EvaluationStore | None = None,
        progress: Progress | None = None,
    ) -> SearchResult:
        """A search for the best plan within a budget.

        Args:
            calls: the budget, in dense calls.
            genes: "steps" or "joint".
            starts: plans that it begins with: the table's, and for "joint" the best of "steps".
            strategy: spec of a strategy; the workbench's own when left out.
            max_evals: plans to evaluate, likewise.
            store: keeps the evaluations; what it has is not paid for again.
            progress: told of every evaluation; bars when left out.

        Raises:
            DiffesError: the budget is below the cheapest call, or the strategy does not work on plans.
        """
        config = self.bench.config
        space, spec = self.space(calls, genes, starts), strategy or config.strategy
        evals = max_evals or config.max_evals
        title = f"searching {genes}, {calls:g} calls"
        with (progress or RichProgress()).task(title, evals) as advance:

            def on_evaluation(evaluation: Evaluation) -> None:
                advance(f"{config.metric} {evaluation.fitness:.5g}", evaluation.fidelity)

            made = STRATEGIES.make(spec, space, seed=config.seed)
            return run_search(made, self.searched, max_evals=evals, store=store, on_evaluation=on_evaluation)

    def cost(self, genome: Schedule) -> float:
        """Cost of a plan in dense calls, exactly."""
        unit = float(np.mean([row[0] for row in self.costs]))
        calls = zip(self.costs, genome.levels, strict=True)
        return sum(row[level] for row, level in calls if level < len(row)) / unit
