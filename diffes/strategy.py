"""What a search strategy is: it asks for schedules and is told how good they were."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """

    schedule: Schedule
    fitness: float
    denoiser_calls: int = 0
    seconds: float = 0.0


class Evaluator(Protocol):
    """Measures schedules, one `Evaluation` each, in any order; those yielded early are safe early."""

    def __call__(self, schedules: Sequence[Schedule]) -> Iterable[Evaluation]: ...


class Strategy(abc.ABC):
    """Ask and tell. A subclass writes `_ask` and `_tell`; the books are kept here.

    A strategy is a deterministic function of its seed and of the scores it was told, whatever the order within a batch.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.

    Attributes:
        best: the best evaluation told so far, None before the first; of equals the first asked.
    """

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        self.space = space
        self.seed = seed
        self.best: Evaluation | None = None
        self._asked: list[Schedule] = []
        self._told: dict[Schedule, Evaluation] = {}

    def ask(self) -> list[Schedule]:
        """The next batch: feasible, distinct schedules; empty when the strategy has nothing left to ask.

        Raises:
            DiffesError: the batch before has not been told in full, or the subclass broke the contract.
        """
        if len(self._told) < len(self._asked):
            raise DiffesError(f"tell the {len(self._asked) - len(self._told)} open schedules before asking again")
        batch = [self.space.schedule(levels) for levels in self._ask()]
        if len(set(batch)) < len(batch):
            raise DiffesError(f"{type(self).__name__} asked for the same schedule twice in one batch")
        self._asked, self._told = batch, {}
        return list(batch)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Takes results of the current batch, in any order and in as many parts as is convenient.

        Raises:
            DiffesError: a fitness is NaN, or a schedule was not asked for or was told before; nothing is taken then.
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
            fresh[schedule] = evaluation
        self._told.update(fresh)
        if self._asked and len(self._told) == len(self._asked):
            batch = [self._told[schedule] for schedule in self._asked]
            for evaluation in batch:
                if self.best is None or evaluation.fitness > self.best.fitness:
                    self.best = evaluation
            self._tell(batch)

    @abc.abstractmethod
    def _ask(self) -> list[list[int]]:
        """The next batch of genomes (S,); empty when exhausted."""

    @abc.abstractmethod
    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learns from the whole batch, in the order asked."""


STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "diffes.strategies")
