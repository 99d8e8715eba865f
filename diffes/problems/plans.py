"""Plans on a calibrated model: their space in dense calls, their search, and the final fit of the plans found."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np

from diffes.adapters import ClassifierFreeGuidance, ModelAdapter, Split
from diffes.config import DEFAULTS, HELDOUT_SEED, RunConfig
from diffes.errors import DiffesError, DiffesWarning, at_least
from diffes.measure.currencies import CURRENCIES, costs_of
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.measure.polish import polished
from diffes.measure.quality import finite
from diffes.measure.reference import SOLVER
from diffes.problems.base import Found, Problem, Routed
from diffes.problems.checks import check_visited
from diffes.problems.workbench import Workbench, run_strategy
from diffes.progress import Progress, RichProgress
from diffes.results.record import Candidate
from diffes.solvers import SOLVERS, NoiseProcess, own_of
from diffes.solvers.offtheshelf import spaced, spacings_of
from diffes.spaces.ledger import OnEvaluation, SearchResult
from diffes.spaces.plan import PlanSpace, power_spaced, trailing
from diffes.spaces.schedule import Plan, Stages
from diffes.spaces.space import SearchSpace, Table, first_computes
from diffes.spaces.store import EvaluationStore

Genes = Literal["levels", "steps", "joint"]
REFERENCE_STEPS = 200
FIT_SEED = 2_000_000_011  # seed of these probes, before the run's own seed is added
FINALISTS = 4  # plans of each search that take part in the final fit
EVEN_FINALISTS = 2  # evenly spaced plans that take part
POWERS, SHIFTS = (1.0, 1.25, 1.5, 2.0), (0.0, 0.25, 0.5, 0.75)  # spacings that searches begin with
CLIPS = ("clip_sample", "thresholding")  # settings of schedulers that plans do not have
OFF_THE_SHELF = (SOLVER, "dpmsolver++3m", "unipc:order=2", "unipc:order=3")


def whole_calls(calls: float) -> int:
    """Return the number of dense calls that a budget pays for, at least 1.

    Example:
        >>> whole_calls(4.9), whole_calls(0.5)
        (4, 1)
    """
    return max(int(calls + 1e-9), 1)


def call_costs(bench: Workbench, progress: Progress, timed_at: int | None = None) -> Table:
    """Return the cost (S, H + 1) of a call in each stage at each level.

    Measured time includes the change of weights before a call.

    Args:
        bench: the workbench.
        progress: progress display.
        timed_at: images per timed call; as many as a search has probes when left out.
    """
    if timed_at is not None and bench.costs and not CURRENCIES.get(bench.config.cost).timed:
        return bench.costs
    probes = bench.adapter.make_probes(timed_at or bench.config.probes, HELDOUT_SEED, "heldout")
    return costs_of(bench.config.cost, bench.router, bench.levels, probes, progress, changing=True)


@dataclass(frozen=True)
class Finalist:
    """Plan that was fitted and measured on the probes of the final fit.

    Args:
        plan: the plan, with its coefficients if its solver fits.
        fitness: mean fitness on these probes.
    """

    plan: Plan
    fitness: float


@dataclass(frozen=True)
class Plans:
    """Plans on a workbench: which timesteps call the denoiser, at which levels, with which solver.

    Args:
        bench: the calibrated model, which gives levels, costs and probes. Its currency must be a cost of single calls:
            macs or latency.
        solver: solver of the plans: a name of `diffes.solvers.SOLVERS`, with options after a colon; as in the
            settings when left out, like all that follows.
        nodes: number of candidate timesteps, at least 2.
        reference_steps: steps of the dense model that all plans are compared with, by DPM-Solver++ 2M; where the model
            has fewer training timesteps, all of these.
        timed_at: images per timed call, if time is the cost; the workbench's own times when left out.
        fit_probes: number of probes of the final fit.
    """

    bench: Workbench
    solver: str = ""
    nodes: int = 0
    reference_steps: int = 0
    timed_at: int | None = None
    fit_probes: int = 0

    def __post_init__(self) -> None:
        settings = self.bench.config.resolved()  # of schedules, they hold none of these
        for name in ("solver", "nodes", "fit_probes"):
            given = getattr(self, name) or getattr(settings, name)
            object.__setattr__(self, name, DEFAULTS[name] if given is None else given)
        if not self.reference_steps:
            object.__setattr__(self, "reference_steps", settings.reference_steps or REFERENCE_STEPS)
        at_least("nodes", self.nodes, 2)
        at_least("fit_probes", self.fit_probes, 1)
        at_least("reference_steps", self.reference_steps, 1)
        scheduler, most = self.bench.adapter.pipe.scheduler, self.bench.adapter.reach
        object.__setattr__(self, "reference_steps", min(self.reference_steps, most))
        if clips := [name for name in CLIPS if own_of(scheduler).config.get(name)]:
            warnings.warn(
                f"the pipeline's scheduler has {clips[0]}, which no step of a plan or of its reference does: both run "
                "without it",
                DiffesWarning,
                stacklevel=2,
            )
        SOLVERS.make(self.solver)
        if self.bench.config.cost == "level":
            raise DiffesError(
                "plans need what a call costs, and a level is no cost of a call: set cost to macs or latency"
            )
        if len(self.bench.router.bank):
            check_visited(self.bench.levels, self.bench.config)

    @property
    def fits(self) -> bool:
        """True if the solver's coefficients are fitted."""
        return SOLVERS.parse(self.solver)[0].fits

    @cached_property
    def call_costs(self) -> Table:
        """Cost (S, H + 1) of a call in each stage at each level."""
        return self.bench.costs if self.timed_at is None else call_costs(self.bench, RichProgress(), self.timed_at)

    @cached_property
    def costs(self) -> list[list[float]]:
        """Cost (nodes, H + 1) of a call at each node, the cleanest first, at each level."""
        stages, table = self.bench.levels.stages, self.call_costs
        grid = Stages.equal(self.nodes, self.bench.adapter.reach)
        return [list(table[stages.stage_of(hi - 1)]) for _, hi in grid.ranges]

    def space(self, calls: float | None, genes: Genes = "joint", starts: Sequence[Sequence[int]] = ()) -> PlanSpace:
        """Return the space of plans that cost at most so many dense calls.

        Args:
            calls: the budget in dense calls; None allows all.
            genes: "steps" (every call is dense) or "joint".
            starts: plans that a search begins with.

        Raises:
            DiffesError: the budget is below the cheapest call.
        """
        allowed = (0,) if genes == "steps" else None
        return PlanSpace.dense_calls(
            self.costs, calls, allowed=allowed, starts=starts, n_timesteps=self.bench.adapter.reach,
            reusing=self.bench.router.bank.reusing,
        )  # fmt: skip

    def evaluator(
        self, n_probes: int, seed: int, split: Split = "search", fits: bool = True, guidance: float | None = None
    ) -> PlanEvaluator:
        """Build an evaluator of plans, with its own probes, against the dense model at many steps.

        Args:
            n_probes: number of probes.
            seed: seed of their noise.
            split: split of the prompts.
            fits: whether the evaluator can also fit solvers.
            guidance: guidance scale of all probes; as in the settings when left out, which may be a range.
        """
        bench, config = self.bench, self.bench.config

        def make() -> PlanEvaluator:
            probes = bench.adapter.make_probes(n_probes, seed, split)
            if guidance is None and isinstance(config.guidance, tuple):
                probes = probes.over(*config.guidance)
            return PlanEvaluator(
                bench.router, bench.levels.stages, self.solver, probes,
                guidance=config.scale if guidance is None else guidance, metric=bench.metric,
                reference_steps=self.reference_steps, fits=fits,
            )  # fmt: skip

        scale = config.guidance if guidance is None else guidance
        key = (n_probes, seed, split, fits, scale, bench.metric.name, self.reference_steps)
        made: PlanEvaluator = bench.shared.get("plans", key, make)
        return made.detached().attached(bench.router, bench.metric).by(self.solver)  # type: ignore[attr-defined,no-any-return]

    @cached_property
    def searched(self) -> PlanEvaluator:
        """Evaluator on the probes of a search."""
        return self.evaluator(self.bench.config.probes, self.bench.config.seed)

    @cached_property
    def refitted(self) -> PlanEvaluator:
        """Evaluator on the probes of the final fit, which no search sees."""
        return self.evaluator(self.fit_probes, FIT_SEED + self.bench.config.seed)

    @cached_property
    def heldout(self) -> PlanEvaluator:
        """Evaluator on held-out probes, which neither search nor fit sees."""
        return self.evaluator(self.bench.config.heldout, HELDOUT_SEED, "heldout", fits=False)

    @cached_property
    def ends(self) -> dict[float, PlanEvaluator]:
        """Evaluators on the held-out probes at both ends of a range of guidance; empty if there is no range."""
        guidance, n = self.bench.config.guidance, self.bench.config.heldout
        ends = guidance if isinstance(guidance, tuple) else ()
        return {end: self.evaluator(n, HELDOUT_SEED, "heldout", fits=False, guidance=end) for end in ends}

    @property
    def reference_calls(self) -> int:
        """Denoiser calls, in rows, of the references of the search and of the final fit."""
        return self.searched.reference_calls + self.refitted.reference_calls

    @property
    def denoiser_calls(self) -> int:
        """Denoiser calls, in rows, of measurements outside the searches."""
        return self.searched.denoiser_calls + self.refitted.denoiser_calls

    def spaced(self, calls: float) -> list[list[int]]:
        """Return the timesteps of as many dense calls as a budget pays for, in each even spacing."""
        adapter, n = self.bench.adapter, whole_calls(calls)
        scheduler, share = adapter.pipe.scheduler, adapter.reach / adapter.n_timesteps
        found = [spaced(scheduler, n, name) for name in spacings_of(scheduler)]
        if share == 1:
            return found
        return [sorted({max(round((t + 1) * share) - 1, 0) for t in each}, reverse=True) for each in found]

    def of_dense(self, timesteps: Sequence[int], solver: str) -> Plan:
        """Return the plan of dense calls at some timesteps, the noisiest first."""
        space = self.bench.levels
        return Plan(space.stages, tuple((t, 0) for t in timesteps), space.max_level, solver)

    def even(self, calls: float, solvers: Sequence[str]) -> Finalist:
        """Return the best plan of evenly spaced dense calls by some solvers.

        All spacings are compared on the probes of the search, and the best few on those of the final fit.
        """
        plans = [self.of_dense(timesteps, solver) for solver in solvers for timesteps in self.spaced(calls)]
        distinct = list(dict.fromkeys(plans))
        distinct.sort(key=lambda plan: -self.searched.measured(plan)[0])
        return self.best(distinct[:EVEN_FINALISTS])

    def best(self, plans: Sequence[Plan]) -> Finalist:
        """Return the best of some plans on the probes of the final fit. Plans whose solver fits are fitted there."""
        found = [self.finalist(plan) for plan in plans]
        return max(found, key=lambda finalist: finalist.fitness)

    def finalist(self, plan: Plan) -> Finalist:
        """Measure a plan on the probes of the final fit. Fit it there if its solver fits."""
        fitness, rows = self.refitted.measured(plan)
        return Finalist(plan if rows is None else replace(plan, coefficients=rows), fitness)

    def polished(self, final: Finalist) -> Finalist:
        """Improve the fitted coefficients of a finalist by Gauss-Newton on the probes of the final fit.

        Return it unchanged if it has no coefficients or does not get better.
        """
        if final.plan.coefficients is None:
            return final
        plan = polished(self.refitted, final.plan)
        return max(final, Finalist(plan, self.refitted.measured(plan)[0]), key=lambda each: each.fitness)

    def finalists(self, found: SearchResult, evaluator: PlanEvaluator) -> list[Plan]:
        """Return the best few plans of a search, without coefficients, the best first."""
        pairs = zip(found.evaluations, found.eligible, strict=True)
        fittest = sorted((e for e, counts in pairs if counts), key=lambda e: -e.fitness)
        return [evaluator.plan(e.schedule) for e in fittest[:FINALISTS]]

    def starts(
        self, calls: float, genes: Genes = "joint", known: Sequence[Sequence[int]] = ()
    ) -> list[tuple[int, ...]]:
        """Return the plans (N,) that a search begins with, feasible and distinct.

        Known plans come first. Then evenly spaced dense calls alternate with evenly spaced calls at one level, or at
        levels that fall along the run. If every call is dense, spacings by powers of time are added; a search of levels
        takes them from the known plans.

        Args:
            calls: the budget in dense calls.
            genes: "steps" (every call is dense) or "joint".
            known: plans that were found before.
        """
        space, n, size = self.space(calls, genes), whole_calls(calls), self.bench.adapter.reach
        powers = itertools.product(POWERS, SHIFTS) if genes == "steps" else ()
        spacings = [*self.spaced(calls), *(power_spaced(n, size, power, shift) for power, shift in powers)]
        dense = [self.nearest(self.of_dense(timesteps, self.solver)) for timesteps in spacings]
        levels = [made for level in space.allowed for made in (space.evenly_spaced(level), space.ramp(level))]
        pairs = itertools.zip_longest(dense, levels)
        found = [*map(tuple, known), *(tuple(plan) for pair in pairs for plan in pair if plan is not None)]
        return [plan for plan in dict.fromkeys(found) if space.is_feasible(plan)]

    def nearest(self, plan: Plan) -> tuple[int, ...]:
        """Return the genome (N,) whose calls are at the nodes nearest to those of a plan, each node called once."""
        space = self.space(None)
        nodes = np.array([hi - 1 for _, hi in space.stages.ranges])
        levels = [space.skip] * self.nodes
        for timestep, level in plan.calls:
            levels[int(np.abs(nodes - timestep).argmin())] = level
        return tuple(levels)

    @cached_property
    def fixed(self) -> PlanEvaluator:
        """Evaluator of the paper's schedules, a level for each stage, on the probes of a search.

        They call as many evenly spaced timesteps as the workbench has steps, by DPM-Solver++ 2M.
        """
        return self.searched.by(SOLVER, trailing(self.bench.config.steps, self.bench.adapter.reach))

    def level_space(self, calls: float) -> SearchSpace:
        """Return the space of schedules at the timesteps of `fixed` that cost at most so many dense calls.

        Raises:
            DiffesError: the highest level in all stages costs more.
        """
        stages = self.bench.levels.stages
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
        """Search the best plan within a budget.

        Args:
            calls: the budget, in dense calls.
            genes: "steps", "joint" or "levels"; results of "levels" are schedules, measured by `fixed`.
            solver: solver of "steps" and "joint"; the plans' own when left out.
            starts: plans that the search begins with; `self.starts` when left out. Not used by "levels".
            strategy: spec of a strategy; the workbench's own, with its operators, when left out.
            max_evals: plans to evaluate; as in the workbench's settings when left out.
            max_calls: denoiser calls to spend, in rows; as in the workbench's settings when left out.
            store: keeps the evaluations; stored ones are not paid for again.
            progress: progress display; bars when left out.
            on_evaluation: called with each evaluation.

        Raises:
            DiffesError: the budget is below the cheapest call, or the strategy does not work on plans.
        """
        kind = f"{genes}, {solver or self.solver}" if genes != "levels" else genes
        evaluator = self.fixed if genes == "levels" else self.searched.by(solver or self.solver)
        space: SearchSpace = (
            self.level_space(calls)
            if genes == "levels"
            else self.space(calls, genes, self.starts(calls, genes) if starts is None else starts)
        )
        changes: dict[str, Any] = {"strategy": strategy, "mutation": None, "crossover": None} if strategy else {}
        limits = {"max_evals": max_evals, "max_calls": max_calls}
        changes |= {name: value for name, value in limits.items() if value}
        bench = replace(self.bench, config=replace(self.bench.config, **changes))
        return run_strategy(
            bench, space, bench.measuring(evaluator), progress or RichProgress(), f"searching {kind}, {calls:g} calls",
            store=store, on_evaluation=on_evaluation,
        )  # fmt: skip

    @property
    def _unit(self) -> float:
        """Cost of a dense call, in the unit of `costs`, averaged over nodes."""
        return float(np.mean([row[0] for row in self.costs]))

    def cost(self, plan: Plan) -> float:
        """Return the exact cost of a plan in dense calls."""
        stages, costs = self.bench.levels.stages, self.call_costs
        return sum(costs[stages.stage_of(timestep)][level] for timestep, level in plan.calls) / self._unit


class PlanProblem(Problem):
    """Problem of plans: which timesteps call the denoiser, at which level each, under a cost in dense calls.

    Its rivals are evenly spaced dense calls at the same budget: of DPM-Solver++ 2M, and of the best of diffusers'
    multistep solvers, each at the best of four spacings.
    """

    example = PlanSpace.dense_calls([[1.0, 0.5]] * 6, 2.0)
    rivals = ("dense", "off-the-shelf")
    calls_anywhere = True
    genes: ClassVar[Genes]

    @classmethod
    def check(cls, config: RunConfig, adapter: ModelAdapter | None = None) -> None:
        config = config.resolved()
        super().check(config, adapter)
        SOLVERS.make(config.solver or "")
        if adapter is not None:
            NoiseProcess.of(adapter.pipe.scheduler)  # refuses processes that plans do not know

    @classmethod
    def calls_of(cls, config: RunConfig) -> int:
        return (
            config.probes * whole_calls(config.resolved().calls or 1.0) * ClassifierFreeGuidance(config.scale).branches
        )

    def call_costs(self, progress: Progress) -> Table:
        return call_costs(self.bench, progress)

    @cached_property
    def plans(self) -> Plans:
        """Space, searches and final fits of plans on the workbench."""
        return Plans(self.bench)

    @property
    def calls(self) -> float:
        """Budget in dense calls."""
        return self.bench.config.calls or DEFAULTS["calls"]

    @cached_property
    def space(self) -> PlanSpace:
        return self.plans.space(self.calls, self.genes, self.plans.starts(self.calls, self.genes))

    def evaluator(self) -> PlanEvaluator:
        return self.plans.evaluator(self.bench.config.probes, self.bench.config.seed)

    def finish(self, result: SearchResult) -> Found:
        plans = self.plans
        before = plans.refitted.denoiser_calls
        best = plans.polished(plans.best(plans.finalists(result, plans.searched)))
        return Found(best.plan, best.fitness, plans.refitted.denoiser_calls - before)

    def measure(self, routed: Routed, search: float | None = None) -> Candidate:
        assert isinstance(routed, Plan)
        scores = self.plans.heldout.scores(routed)
        mean, deviation = (finite(float(value)) for value in (scores.mean(), scores.std()))
        sparsity = float(np.mean(routed.levels)) / routed.max_level
        return Candidate(
            len(routed.calls), routed.levels, mean, deviation, sparsity, self.bench.macs_fraction(routed),
            None if search is None else finite(search), cost=self.plans.cost(routed),
        )  # fmt: skip

    def rivals_of(self, found: Found) -> dict[str, Candidate]:
        config, solvers = self.bench.config, ((SOLVER,), OFF_THE_SHELF)
        depends = (self.calls, config.seed, config.probes, self.plans.fit_probes, config.heldout, config.guidance)

        def best(names: Sequence[str]) -> Candidate:
            final = self.plans.even(self.calls, names)
            return self.measure(final.plan, final.fitness)

        return {
            name: self.bench.shared.get("evenly spaced", (name, config.metric, *depends), partial(best, names))
            for name, names in zip(self.rivals, solvers, strict=True)
        }


class Joint(PlanProblem):
    """Problem of plans in which calls may be dense, pruned or reusing."""

    genes = "joint"


class Steps(PlanProblem):
    """Problem of plans in which every call is dense: only the timesteps are searched. It suits every pipeline."""

    genes = "steps"
    prunes = False

    def call_costs(self, progress: Progress) -> Table:
        return [[1.0] * (self.bench.levels.max_level + 1)] * len(self.bench.levels.stages)
