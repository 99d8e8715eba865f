"""What a search strategy is: it asks for schedules and is told how good they were."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from diffes.errors import DiffesError
from diffes.plugins import guarded, unexpected
from diffes.registry import Registry
from diffes.search.genome import Origin
from diffes.search.schedule import Schedule
from diffes.search.space import SearchSpace


@dataclass(frozen=True)
class Measured:
    """Who measured a schedule, where several could.

    Args:
        worker: its name.
        waited: seconds until a worker was free.
        paid_calls: denoiser calls, in rows, that it really ran; what it shares with others another one may have.
    """

    worker: str
    waited: float
    paid_calls: int


Rows = tuple[tuple[float, ...], ...]  # coefficients of each call of a plan


@dataclass(frozen=True)
class Evaluation:
    """One measured schedule.

    Args:
        schedule: what was measured.
        fitness: higher is better; -inf is a run that failed; never NaN or inf.
        denoiser_calls: what the measurement cost, batch-size weighted; what one process alone would have paid.
        seconds: wall time of it.
        fidelity: the fraction of the probes that it was measured on, above 0 and at most 1.
        coefficients: of the solver, where they were fitted on these probes.
        measured: by whom, where there were several workers.
    """

    schedule: Schedule
    fitness: float
    denoiser_calls: int = 0
    seconds: float = 0.0
    fidelity: float = 1.0
    coefficients: Rows | None = field(default=None, compare=False)
    measured: Measured | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Proposal:
    """What a strategy asks for; `Strategy.propose` makes one.

    Args:
        schedule: what is to be measured.
        fidelity: the fraction of the probes to measure it on, above 0 and at most 1.
        origin: how the strategy came by it; the store keeps it beside the evaluation.
    """

    schedule: Schedule
    fidelity: float = 1.0
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fidelity <= 1:
            raise DiffesError(f"fidelity must be in (0, 1], got {self.fidelity}")


@dataclass(frozen=True)
class StageProfile:
    """What the dense model does in each stage; a strategy that `needs` a "profile" is given it by a run.

    Args:
        loss: (S,) mean squared error of the denoiser's prediction.
        log_snr: (S,) natural logarithm of the signal-to-noise ratio in the middle of the stage.
        calls: denoiser calls, in rows, that measuring it took; they are part of what the search costs.
    """

    loss: tuple[float, ...]
    log_snr: tuple[float, ...]
    calls: int = 0


class Evaluator(Protocol):
    """Measures schedules, one `Evaluation` each, in any order; those yielded early are safe early.

    `fidelity` is only passed when it is below 1. An evaluator that shares work between schedules may have a method
    `expect(schedules, fidelity, paid)`, which is called with each batch before it is measured; `paid` is what those
    schedules in it cost that an earlier run measured.

    One that measures many at a time may have a method `steady(more)` for asynchronous searches, which yields each
    evaluation, on all probes, as soon as it is there. It calls `more` for schedules where something could begin now; an
    empty answer is good until the next evaluation was taken. It ends when nothing is open and `more` has nothing.
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
        needs: facts about the model that its constructor takes as keyword arguments of these names and a run provides:
            "profile", a `StageProfile`.
        operators: those of "mutation" and "crossover" that its constructor takes, as specs.
        asynchronous: whether it goes on well where results come one by one, while others are `pending`; it asks for
            evaluations on all probes only.
        best: the best evaluation on all probes within the budget told so far, None before the first; of equals the
            first asked.
    """

    explores: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    operators: ClassVar[tuple[str, ...]] = ()
    asynchronous: ClassVar[bool] = False

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        self.space = space
        self.seed = seed
        self.best: Evaluation | None = None
        self._asked: list[Proposal] = []
        self._told: dict[Key, Evaluation] = {}

    def propose(self, levels: Sequence[int], *, fidelity: float = 1.0, origin: Origin | None = None) -> Proposal:
        """A genome (S,) as something to ask for.

        Raises:
            DiffesError: it does not meet the budget and the strategy does not explore, or the fidelity is not in
                (0, 1].
        """
        make = self.space.any_schedule if self.explores else self.space.schedule
        return Proposal(make(levels), fidelity, origin)

    def ask(self) -> list[Proposal]:
        """The next batch: distinct proposals; empty when nothing is left to ask.

        Raises:
            DiffesError: the batch before has not been told in full, or the subclass broke the contract.
        """
        name = f"strategy {type(self).__name__}"
        self._check_made(name)
        if self.pending:
            raise DiffesError(f"tell the {len(self.pending)} open schedules before asking again")
        self._asked, self._told = self._batch(name), {}
        return list(self._asked)

    def ask_more(self) -> list[Proposal]:
        """What to measure next, whatever is `pending`; it may be among it, or told before. Empty when nothing is left.

        Raises:
            DiffesError: the strategy is not `asynchronous`, or the subclass broke the contract.
        """
        name = f"strategy {type(self).__name__}"
        if not self.asynchronous:
            raise DiffesError(f"{name} wants whole batches told: it is not asynchronous")
        self._check_made(name)
        batch, asked = self._batch(name), {key_of(proposal) for proposal in self._asked}
        if any(proposal.fidelity != 1 for proposal in batch):
            raise DiffesError(f"{name} is asynchronous and has to ask for evaluations on all probes")
        self._asked += [proposal for proposal in batch if key_of(proposal) not in asked]
        return batch

    @property
    def pending(self) -> list[Proposal]:
        """What was asked for and is not told."""
        return [proposal for proposal in self._asked if key_of(proposal) not in self._told]

    def _check_made(self, name: str) -> None:
        if not hasattr(self, "_told"):
            raise DiffesError(f"{name} must call super().__init__(space, seed=seed) in its constructor")

    def _batch(self, name: str) -> list[Proposal]:
        """What the subclass asks for, checked."""
        wanted = "return a list of what self.propose(levels) gives"
        with guarded(self, name, f"{wanted} from _ask"):
            found = self._ask()
        if not isinstance(found, Sequence) or not all(isinstance(proposal, Proposal) for proposal in found):
            raise unexpected(name, f"{wanted} from _ask", found)
        batch = list(found)
        for schedule in (proposal.schedule for proposal in batch):
            if schedule.stages != self.space.stages or schedule.max_level != self.space.max_level:
                raise unexpected(name, "ask for schedules of the space's own stages and max_level", schedule.levels)
        if len({key_of(proposal) for proposal in batch}) < len(batch):
            raise DiffesError(f"{type(self).__name__} asked for the same schedule twice in one batch")
        return batch

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Takes results of the current batch, in any order and in as many parts as is convenient.

        Raises:
            DiffesError: a fitness is NaN or inf, or a schedule was not asked for at this fidelity, or was told before;
                nothing is taken then.
        """
        keys = {key_of(proposal) for proposal in self._asked}
        fresh: dict[Key, Evaluation] = {}
        for evaluation in evaluations:
            key = key_of(evaluation)
            _check_fitness(evaluation)
            if key not in keys or key in self._told or key in fresh:
                raise DiffesError(
                    f"levels {list(evaluation.schedule.levels)} at fidelity {evaluation.fidelity} are not open: told "
                    "before, or never asked for"
                )
            fresh[key] = evaluation
        self._told.update(fresh)
        if self._asked and len(self._told) == len(self._asked):
            batch = [self._told[key_of(proposal)] for proposal in self._asked]
            self._learn(batch)

    def tell_one(self, evaluation: Evaluation) -> None:
        """Takes a result as soon as it is there, of what `ask_more` gave or of what an earlier process measured.

        Raises:
            DiffesError: its fitness is NaN or inf.
        """
        _check_fitness(evaluation)
        self._asked = [proposal for proposal in self._asked if key_of(proposal) != key_of(evaluation)]
        self._learn([evaluation])

    def _learn(self, batch: Sequence[Evaluation]) -> None:
        for evaluation in batch:
            if self.space.counts(evaluation.schedule, evaluation.fidelity) and (
                self.best is None or evaluation.fitness > self.best.fitness
            ):
                self.best = evaluation
        with guarded(self, f"strategy {type(self).__name__}", "take a list of evaluations in _tell"):
            self._tell(batch)

    @abc.abstractmethod
    def _ask(self) -> Sequence[Proposal]:
        """The next batch, each made by `propose`; empty when exhausted."""

    @abc.abstractmethod
    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learns from the whole batch, in the order asked."""


def _check_fitness(evaluation: Evaluation) -> None:
    if not evaluation.fitness < math.inf:
        raise DiffesError(
            f"fitness must not be NaN or inf, got {evaluation.fitness} for levels {list(evaluation.schedule.levels)}: "
            "tell -inf for a run that failed"
        )


Key = tuple[Schedule, float]


def key_of(measured: Proposal | Evaluation) -> Key:
    """What a measurement is known by: the schedule, and the fraction of the probes."""
    return measured.schedule, measured.fidelity


STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "diffes.strategies", Strategy)


def strategy(name: str) -> Callable[[type[Strategy]], type[Strategy]]:
    """Decorator that registers a subclass of `Strategy` under a name; its constructor's parameters are its options."""
    return STRATEGIES.register(name)
