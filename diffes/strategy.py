"""What a search strategy is: it asks for schedules and is told how good they were."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from diffes.errors import DiffesError
from diffes.registry import Registry
from diffes.schedule import Schedule
from diffes.space import SearchSpace


@dataclass(frozen=True)
class Evaluation:
    """One measured schedule.

    Args:
        schedule: what was measured.
        fitness: higher is better; -inf is a run that failed; never NaN.
        denoiser_calls: what the measurement cost, batch-size weighted.
        seconds: wall time of it.
        fidelity: the fraction of the probes that it was measured on, above 0 and at most 1.
    """

    schedule: Schedule
    fitness: float
    denoiser_calls: int = 0
    seconds: float = 0.0
    fidelity: float = 1.0


@dataclass(frozen=True)
class Origin:
    """How a strategy came by a schedule; the store keeps it beside the evaluation.

    Args:
        operator: name of what made it: a mutation, a crossover, a sampler.
        parents: levels (S,) of the schedules that it was made from.
    """

    operator: str
    parents: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class StageProfile:
    """What the dense model does in each stage; a strategy with a parameter `profile` is given it by a run.

    Args:
        loss: (S,) mean squared error of the denoiser's prediction.
        log_snr: (S,) natural logarithm of the signal-to-noise ratio in the middle of the stage.
    """

    loss: tuple[float, ...]
    log_snr: tuple[float, ...]


class Evaluator(Protocol):
    """Measures schedules, one `Evaluation` each, in any order; those yielded early are safe early.

    `fidelity` is only passed when it is below 1. An evaluator that shares work between schedules may have a method
    `remember(evaluation)`, which is called with each one that an earlier run paid for, in the order paid.
    """

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterable[Evaluation]: ...


class Strategy(abc.ABC):
    """Ask and tell. A subclass writes `_ask` and `_tell`; the books are kept here.

    A strategy is a deterministic function of its seed and of the scores it was told, whatever the order within a batch.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.

    Attributes:
        explores: whether it also asks for schedules that do not meet the budget exactly, to learn from them. They never
            become the best if they cost more than the budget.
        fidelity: of the open batch: the fraction of the probes to measure it on. `_ask` sets it; 1 otherwise.
        origins: by levels, how a schedule was made. `_ask` may fill it.
        best: the best evaluation on all probes within the budget told so far, None before the first; of equals the
            first asked.
    """

    explores: ClassVar[bool] = False

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        self.space = space
        self.seed = seed
        self.fidelity = 1.0
        self.origins: dict[tuple[int, ...], Origin] = {}
        self.best: Evaluation | None = None
        self._asked: list[Schedule] = []
        self._told: dict[Schedule, Evaluation] = {}

    def ask(self) -> list[Schedule]:
        """The next batch: distinct schedules, feasible ones unless it `explores`; empty when nothing is left to ask.

        Raises:
            DiffesError: the batch before has not been told in full, or the subclass broke the contract.
        """
        if len(self._told) < len(self._asked):
            raise DiffesError(f"tell the {len(self._asked) - len(self._told)} open schedules before asking again")
        self.fidelity = 1.0
        make = self.space.any_schedule if self.explores else self.space.schedule
        batch = [make(levels) for levels in self._ask()]
        if len(set(batch)) < len(batch):
            raise DiffesError(f"{type(self).__name__} asked for the same schedule twice in one batch")
        self._asked, self._told = batch, {}
        return list(batch)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Takes results of the current batch, in any order and in as many parts as is convenient.

        Raises:
            DiffesError: a fitness is NaN, or a schedule was not asked for at this fidelity, or was told before; nothing
                is taken then.
        """
        fresh: dict[Schedule, Evaluation] = {}
        for evaluation in evaluations:
            if math.isnan(evaluation.fitness):
                raise DiffesError(
                    f"fitness must not be NaN, got NaN for levels {list(evaluation.schedule.levels)}: "
                    "tell -inf for a run that failed"
                )
            schedule = evaluation.schedule
            if schedule not in self._asked or schedule in self._told or schedule in fresh:
                raise DiffesError(f"levels {list(schedule.levels)} are not open: told before, or never asked for")
            if evaluation.fidelity != self.fidelity:
                raise DiffesError(f"the open batch has fidelity {self.fidelity}, got {evaluation.fidelity}")
            fresh[schedule] = evaluation
        self._told.update(fresh)
        if self._asked and len(self._told) == len(self._asked):
            batch = [self._told[schedule] for schedule in self._asked]
            for evaluation in batch:
                if self.space.counts(evaluation.schedule, evaluation.fidelity) and (
                    self.best is None or evaluation.fitness > self.best.fitness
                ):
                    self.best = evaluation
            self._tell(batch)

    @abc.abstractmethod
    def _ask(self) -> list[list[int]]:
        """The next batch of genomes (S,); empty when exhausted. May set `fidelity` and add to `origins`."""

    @abc.abstractmethod
    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learns from the whole batch, in the order asked."""


Operator = Callable[..., tuple[Any, ...]]
STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "diffes.strategies")
MUTATIONS: Registry[Operator] = Registry("mutation", "diffes.mutations")
CROSSOVERS: Registry[Operator] = Registry("crossover", "diffes.crossovers")


def strategy(name: str) -> Callable[[type[Strategy]], type[Strategy]]:
    """Decorator that registers a subclass of `Strategy` under a name; its constructor's parameters are its options."""
    return STRATEGIES.register(name)


def mutation(name: str) -> Callable[[Operator], Operator]:
    """Decorator that registers `function(genome, *, space, rng, **params) -> (genome,)` under a name.

    The function is DEAP's convention with its generator as an argument: `genome` is a list of S levels that it may
    change in place, `space` a `SearchSpace`, `rng` a `numpy.random.Generator` and its only source of randomness. It
    maps feasible genomes to feasible ones; `space.is_feasible` and `space.repair(genome, rng)` help with that. Further
    parameters are options: `--mutation name:param=value`. `diffes.testing.MutationConformance` checks all of it.
    """
    return MUTATIONS.register(name)


def crossover(name: str) -> Callable[[Operator], Operator]:
    """Decorator that registers `function(one, other, *, space, rng, **params) -> (one, other)` under a name.

    It maps two feasible genomes to two feasible ones, under the same conditions as a mutation.
    """
    return CROSSOVERS.register(name)
