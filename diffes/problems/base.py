"""Problem: what a search works on, how it is measured, and what it becomes."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffes.adapters import ModelAdapter
from diffes.config import RunConfig
from diffes.measure.currencies import CURRENCIES
from diffes.measure.evaluator import RoutedEvaluator
from diffes.progress import Progress
from diffes.registry import Registry
from diffes.results.record import Candidate
from diffes.spaces.ledger import SearchResult
from diffes.spaces.schedule import Plan, Schedule
from diffes.spaces.space import SearchSpace, Table

if TYPE_CHECKING:
    from diffes.problems.workbench import Workbench

Routed = Schedule | Plan


@dataclass(frozen=True)
class Found:
    """Result of a search in the form that can be applied.

    Args:
        routed: the schedule, or the plan with its coefficients.
        fitness: its fitness, on the probes of the search or of a final fit.
        calls: denoiser calls, in rows, of a final fit.
    """

    routed: Routed
    fitness: float
    calls: int = 0


class Problem(abc.ABC):
    """Base class of problems. A problem knows the calibrated model and the settings, and nothing of strategies.

    To add one, write the abstract members and register the class, by `PROBLEMS.register("name")` or as an entry point
    in the group "diffes.problems". `--genes name` then searches it in every command.

    Args:
        bench: the calibrated model with the settings.

    Attributes:
        example: a small space of the kind that is searched, on which strategies and operators are tried early.
        fills_budget: whether a result that costs less than the budget falls short of what was asked; results are then
            compared at the budget itself, by interpolation.
        prunes: whether genomes have pruned or reusing calls. Else nothing is calibrated.
        calls_anywhere: whether genomes may call any timestep. Every stage is then calibrated, else those that the
            pipeline's own steps are in.
        rivals: names of what stands beside a result, in the order of tables.
    """

    example: ClassVar[SearchSpace]
    fills_budget: ClassVar[bool] = False
    prunes: ClassVar[bool] = True
    calls_anywhere: ClassVar[bool] = False
    rivals: ClassVar[tuple[str, ...]]

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench

    @classmethod
    def check(cls, config: RunConfig, adapter: ModelAdapter | None = None) -> None:
        """Check settings, and the model once it is loaded, before the long part.

        Raises:
            DiffesError: a setting does not fit this problem, or the model cannot be searched in this way.
        """
        CURRENCIES.get(config.cost)

    @classmethod
    @abc.abstractmethod
    def calls_of(cls, config: RunConfig) -> int:
        """Return the denoiser calls, in rows, of a nominal evaluation: probes x calls x branches of guidance."""

    @abc.abstractmethod
    def call_costs(self, progress: Progress) -> Table:
        """Measure the cost (S, H + 1) of a call in each stage at each level, in the currency of the budget."""

    @property
    @abc.abstractmethod
    def space(self) -> SearchSpace:
        """Space of the genomes within the budget, with what a search begins with."""

    @abc.abstractmethod
    def evaluator(self) -> RoutedEvaluator:
        """Return a new evaluator of genomes on the probes of a search, with an empty cache."""

    @abc.abstractmethod
    def finish(self, result: SearchResult) -> Found:
        """Turn the best genomes of a search into what can be applied; counted alike for every strategy."""

    @abc.abstractmethod
    def rivals_of(self, found: Found) -> dict[str, Candidate]:
        """Measure on held-out probes what else the cost of a result buys, by the names in `rivals`."""

    @abc.abstractmethod
    def measure(self, routed: Routed, search: float | None = None) -> Candidate:
        """Measure a schedule or plan on held-out probes.

        Args:
            routed: the schedule or plan.
            search: its fitness on the probes of a search.
        """


PROBLEMS: Registry[type[Problem]] = Registry("genes", "diffes.problems", Problem)
