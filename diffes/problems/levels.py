"""Levels: the paper's problem, a pruning level for each stage of the pipeline's own sampling steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from diffes.adapters import ClassifierFreeGuidance, ModelAdapter
from diffes.config import HELDOUT_SEED, RunConfig, in_words
from diffes.errors import DiffesError
from diffes.measure.currencies import CURRENCIES, Currency, costs_of
from diffes.measure.evaluator import ScheduleEvaluator
from diffes.problems.base import Found, Problem, Routed
from diffes.problems.heldout import HeldOut
from diffes.progress import Progress
from diffes.pruning import make_method
from diffes.results.record import FEWER_STEPS, UNIFORM, Candidate
from diffes.spaces.ledger import SearchResult
from diffes.spaces.schedule import Plan, Stages
from diffes.spaces.space import SearchSpace, Table, first_computes

if TYPE_CHECKING:
    from diffes.problems.workbench import Workbench


class Levels(Problem):
    """Problem of the paper: a level for each stage, under a mean sparsity or a cost as a fraction of the dense model.

    The steps are those of the pipeline's own scheduler. Its rivals are the uniform schedule of the same budget, and the
    dense model at the number of steps that costs as many MACs as the schedule found.
    """

    example = SearchSpace.mean_sparsity(Stages.equal(4), 4, 0.5)
    fills_budget = True
    rivals = (UNIFORM, FEWER_STEPS)

    @classmethod
    def check(cls, config: RunConfig, adapter: ModelAdapter | None = None) -> None:
        super().check(config, adapter)
        if isinstance(config.guidance, tuple):
            raise DiffesError(
                f"guidance {in_words(config.guidance)} is a range, which plans are fitted over. With --genes "
                f"{config.genes}, give one scale"
            )
        if config.cost == "level" and make_method(config.method).reuses:
            raise DiffesError(
                f"levels of {config.method} that reuse remove nothing: set cost to macs or latency, not level"
            )

    @classmethod
    def calls_of(cls, config: RunConfig) -> int:
        return config.probes * config.steps * ClassifierFreeGuidance(config.scale).branches

    def call_costs(self, progress: Progress) -> Table:
        bench = self.bench
        probes = bench.adapter.make_probes(bench.config.probes, HELDOUT_SEED, "heldout")
        return costs_of(bench.config.cost, bench.router, bench.levels, probes, progress, changing=False)

    @cached_property
    def space(self) -> SearchSpace:
        bench, config = self.bench, self.bench.config
        counted = first_computes(bench.costs, bench.levels.steps, bench.router.bank.reusing)
        currency: Currency = CURRENCIES.make(config.cost)
        assert config.budget is not None
        return currency.space(bench.levels.stages, bench.levels.steps, counted, config.budget)

    def evaluator(self) -> ScheduleEvaluator:
        return self.bench.evaluator(self.bench.config.probes, self.bench.config.seed)

    def finish(self, result: SearchResult) -> Found:
        return Found(result.best.schedule, result.best.fitness)

    @cached_property
    def heldout(self) -> HeldOut:
        """Evaluator on held-out probes of schedules and of the dense model at a number of steps."""
        return heldout_of(self.bench)

    def measure(self, routed: Routed, search: float | None = None) -> Candidate:
        assert not isinstance(routed, Plan)
        return replace(self.heldout(routed, search), cost=self.bench.cost_fraction(routed))

    def rivals_of(self, found: Found) -> dict[str, Candidate]:
        assert not isinstance(found.routed, Plan)
        return {
            UNIFORM: self.measure(self.bench.uniform()),
            FEWER_STEPS: self.heldout(self.bench.fewer_steps(found.routed)),
        }


def heldout_of(bench: Workbench) -> HeldOut:
    """Return the evaluator of schedules on held-out probes, shared by all workbenches of a calibrated model."""
    config = bench.config
    key = (bench.metric.name, config.heldout, config.guidance, config.steps)
    found: HeldOut = bench.shared.get("heldout", key, lambda: HeldOut(bench))
    return found
