"""Search strategies, which ask for schedules and are told how good they are, and the evaluators that measure them."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from diffes.errors import DiffesError
from diffes.plugins import guarded, unexpected
from diffes.registry import Registry
from diffes.spaces.genome import Origin
from diffes.spaces.schedule import Schedule
from diffes.spaces.space import SearchSpace


@dataclass(frozen=True)
class Measured:
    """Record of the worker that measured a schedule, where there are several.

    Args:
        worker: its name.
        waited: seconds until a worker was free.
        paid_calls: denoiser calls, in rows, that it really ran; calls shared with other schedules may be another
            worker's.
    """

    worker: str
    waited: float
    paid_calls: int


Rows = tuple[tuple[float, ...], ...]  # coefficients of each call of a plan


@dataclass(frozen=True)
class Evaluation:
    """One measured schedule.

    Args:
        schedule: the measured schedule.
        fitness: higher is better; -inf is a run that failed; never NaN or inf.
        denoiser_calls: cost of the measurement, weighted by batch size: what a single process would have paid.
        seconds: wall time of the measurement.
        fidelity: fraction of the probes that it was measured on, above 0 and at most 1.
        coefficients: solver coefficients, where they were fitted on these probes.
        measured: the worker, where there were several.
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
    """Proposal of a strategy to measure a schedule; `Strategy.propose` makes it.

    Args:
        schedule: the schedule to measure.
        fidelity: fraction of the probes to measure it on, above 0 and at most 1.
        origin: how the strategy made it; the store keeps it beside the evaluation.
    """

    schedule: Schedule
    fidelity: float = 1.0
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fidelity <= 1:
            raise DiffesError(f"fidelity must be above 0 and at most 1, got {self.fidelity}")


@dataclass(frozen=True)
class StageProfile:
    """Facts about the dense model in each stage; a run gives them to a strategy that `needs` a "profile".

    Args:
        loss: (S,) mean squared error of the denoiser's prediction.
        log_snr: (S,) natural logarithm of the signal-to-noise ratio in the middle of the stage.
        calls: denoiser calls, in rows, spent on measuring it; they are part of the search's cost.
    """

    loss: tuple[float, ...]
    log_snr: tuple[float, ...]
    calls: int = 0


class Evaluator(Protocol):
    """Evaluator of schedules: it gives one `Evaluation` each, in any order. Those yielded early are stored early.

    `fidelity` is only passed when it is below 1. An evaluator that shares work between schedules may have a method
    `expect(schedules, fidelity, paid)`, which is called with each batch before it is measured. `paid` holds the cost of
    those schedules in the batch that an earlier run measured.

    An evaluator that measures many schedules at a time may have a method `steady(more)` for asynchronous searches. It
    yields each evaluation, on all probes, as soon as it is there. It calls `more` for schedules when a measurement
    could begin; after an empty answer it does not ask again until the next evaluation was taken. It ends when nothing
    is open and `more` gives nothing.
    """

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterable[Evaluation]: ...


class Strategy(abc.ABC):
    """Base class of search strategies: ask and tell. A subclass writes `_ask` and `_tell`; this class keeps records.

    A strategy is a deterministic function of its seed and of the scores it was told, whatever the order within a batch.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.

    Attributes:
        explores: whether it also asks for schedules that do not meet the budget exactly, to learn from them. They never
            become the best if they cost more than the budget.
        needs: names of facts about the model that its constructor takes as keyword arguments and a run provides:
            "profile", a `StageProfile`.
        operators: which of "mutation" and "crossover" its constructor takes, as specs.
        asynchronous: whether it works with results that come one by one, while other proposals are `pending`; it then
            asks for evaluations on all probes only.
        best: best evaluation on all probes within the budget told so far, None before the first; of equals the first
            asked.
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
        """Make a proposal of a genome (S,).

        Raises:
            DiffesError: it does not meet the budget and the strategy does not explore, or the fidelity is not above 0
                and at most 1.
        """
        make = self.space.any_schedule if self.explores else self.space.schedule
        return Proposal(make(levels), fidelity, origin)

    def ask(self) -> list[Proposal]:
        """Return the next batch of distinct proposals; empty when nothing is left to ask.

        Raises:
            DiffesError: the previous batch has not been told in full, or the subclass broke the contract.
        """
        name = f"strategy {type(self).__name__}"
        self._check_made(name)
        if self.pending:
            raise DiffesError(
                f"{len(self.pending)} schedules of the last batch have no result yet. Tell them before you ask again."
            )
        self._asked, self._told = self._batch(name), {}
        return list(self._asked)

    def ask_more(self) -> list[Proposal]:
        """Return what to measure next, whatever is `pending`; empty when nothing is left.

        It may contain proposals that are pending or were told before.

        Raises:
            DiffesError: the strategy is not `asynchronous`, or the subclass broke the contract.
        """
        name = f"strategy {type(self).__name__}"
        if not self.asynchronous:
            raise DiffesError(f"{name} is not asynchronous. Use ask and tell, with whole batches.")
        self._check_made(name)
        batch, asked = self._batch(name), {measurement_key(proposal) for proposal in self._asked}
        if any(proposal.fidelity != 1 for proposal in batch):
            raise DiffesError(f"{name} is asynchronous, so it must ask for evaluations on all probes (fidelity 1)")
        self._asked += [proposal for proposal in batch if measurement_key(proposal) not in asked]
        return batch

    @property
    def pending(self) -> list[Proposal]:
        """Proposals that were asked for and not told yet."""
        return [proposal for proposal in self._asked if measurement_key(proposal) not in self._told]

    def _check_made(self, name: str) -> None:
        if not hasattr(self, "_told"):
            raise DiffesError(f"{name} must call super().__init__(space, seed=seed) in its constructor")

    def _batch(self, name: str) -> list[Proposal]:
        """Return the proposals that the subclass asks for, checked."""
        wanted = "return a list of what self.propose(levels) gives"
        with guarded(self, name, f"{wanted} from _ask"):
            found = self._ask()
        if not isinstance(found, Sequence) or not all(isinstance(proposal, Proposal) for proposal in found):
            raise unexpected(name, f"{wanted} from _ask", found)
        batch = list(found)
        for schedule in (proposal.schedule for proposal in batch):
            if schedule.stages != self.space.stages or schedule.max_level != self.space.max_level:
                raise unexpected(name, "ask for schedules of the space's own stages and max_level", schedule.levels)
        if len({measurement_key(proposal) for proposal in batch}) < len(batch):
            raise DiffesError(f"{name} must ask for distinct schedules, and asked for one twice in a batch")
        return batch

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Take results of the current batch, in any order and in any number of parts.

        Raises:
            DiffesError: a fitness is NaN or inf, or a schedule was not asked for at this fidelity, or was told before;
                nothing is taken then.
        """
        keys = {measurement_key(proposal) for proposal in self._asked}
        fresh: dict[Key, Evaluation] = {}
        for evaluation in evaluations:
            key = measurement_key(evaluation)
            _check_fitness(evaluation)
            if key not in keys or key in self._told or key in fresh:
                raise DiffesError(
                    f"levels {list(evaluation.schedule.levels)} at the fidelity {evaluation.fidelity} were told "
                    "before, or never asked for. Tell each proposal of the last batch once."
                )
            fresh[key] = evaluation
        self._told.update(fresh)
        if self._asked and len(self._told) == len(self._asked):
            batch = [self._told[measurement_key(proposal)] for proposal in self._asked]
            self._learn(batch)

    def tell_one(self, evaluation: Evaluation) -> None:
        """Take one result as soon as it is there: of a proposal from `ask_more`, or from an earlier process.

        Raises:
            DiffesError: its fitness is NaN or inf.
        """
        _check_fitness(evaluation)
        self._asked = [proposal for proposal in self._asked if measurement_key(proposal) != measurement_key(evaluation)]
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
        """Return the next batch, each made by `propose`; empty when exhausted."""

    @abc.abstractmethod
    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn from the whole batch, in the order asked."""


def _check_fitness(evaluation: Evaluation) -> None:
    if not evaluation.fitness < math.inf:
        raise DiffesError(
            f"fitness must not be NaN or inf, got {evaluation.fitness} for levels {list(evaluation.schedule.levels)}. "
            "Tell -inf for a run that failed."
        )


Key = tuple[Schedule, float]


def measurement_key(measured: Proposal | Evaluation) -> Key:
    """Return the key of a measurement: the schedule and the fraction of the probes."""
    return measured.schedule, measured.fidelity


STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "diffes.strategies", Strategy)


def strategy(name: str) -> Callable[[type[Strategy]], type[Strategy]]:
    """Register a subclass of `Strategy` under a name, as a decorator; its constructor's parameters are its options."""
    return STRATEGIES.register(name)
