"""What a search measured and what it cost: every schedule is paid for once."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from deap import tools

from diffes.errors import DiffesError
from diffes.plugins import unexpected
from diffes.search.genome import Origin
from diffes.search.schedule import Schedule
from diffes.search.space import SearchSpace
from diffes.search.strategy import Evaluation, Evaluator, Key, Proposal, key_of

if TYPE_CHECKING:
    from diffes.search.store import EvaluationStore

log = logging.getLogger(__name__)
OnEvaluation = Callable[[Evaluation], None]
LOGGED = ("generation", "evaluations", "denoiser_calls", "best", "mean", "spread", "diversity")


@dataclass(frozen=True)
class SearchResult:
    """What a search found and what it cost.

    Args:
        best: of the evaluations on all probes within the budget the one of highest fitness; of equals the first.
        evaluations: all distinct evaluations in the order in which the strategy asked for them.
        eligible: for each, whether it is on all probes and within the budget.
        denoiser_calls: sum over the evaluations, those replayed from a store included, and `calls_before`.
        seconds: sum over the evaluations, likewise.
        logbook: DEAP's, a line a generation (a batch of the strategy's): its number, evaluations and denoiser calls so
            far, the best so far, mean and standard deviation of the generation's fitness (failures left out, None where
            all failed), and its diversity, the share of visited stages in which two of its schedules differ, on
            average.
        calls_before: denoiser calls that were spent for the search before it began.
    """

    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    eligible: tuple[bool, ...]
    denoiser_calls: int
    seconds: float
    logbook: tools.Logbook = field(default_factory=tools.Logbook)
    calls_before: int = 0

    def curve(self) -> list[float]:
        """Best eligible fitness so far after each evaluation, (len(evaluations),); -inf before the first."""
        pairs = zip(self.evaluations, self.eligible, strict=True)
        return list(itertools.accumulate((e.fitness if counts else -math.inf for e, counts in pairs), max))

    @property
    def paid_calls(self) -> int | None:
        """Denoiser calls that workers really ran, in rows; None where not all evaluations are theirs."""
        paid = [e.measured.paid_calls for e in self.evaluations if e.measured is not None]
        return sum(paid) if len(paid) == len(self.evaluations) else None

    def front(self, space: SearchSpace) -> list[Evaluation]:
        """What nothing else dominates in fitness and cost, on all probes, from the cheapest to the fittest."""
        front: list[Evaluation] = []
        full = [e for e in self.evaluations if e.fidelity == 1 and e.fitness > -math.inf]
        for evaluation in sorted(full, key=lambda e: (space.cost(e.schedule.levels), -e.fitness)):
            if not front or evaluation.fitness > front[-1].fitness:
                front.append(evaluation)
        return front

    def calls(self) -> list[int]:
        """Denoiser calls spent after each evaluation, (len(evaluations),)."""
        calls = (evaluation.denoiser_calls for evaluation in self.evaluations)
        return list(itertools.accumulate(calls, initial=self.calls_before))[1:]


class Ledger:
    """What was measured so far. A schedule is paid for once: what the memory or the store has costs nothing now.

    Args:
        space: the feasible schedules.
        evaluate: measures what is new.
        store: evaluations of earlier runs; takes those of this one as soon as they are measured.
        on_evaluation: called with each distinct evaluation, stored already, for instance to show progress.
        calls_before: denoiser calls that were spent for the search before it began.
    """

    def __init__(
        self,
        space: SearchSpace,
        evaluate: Evaluator,
        store: EvaluationStore | None = None,
        on_evaluation: OnEvaluation | None = None,
        calls_before: int = 0,
    ) -> None:
        self.space = space
        self._evaluate, self._before = evaluate, calls_before
        self._store = store
        self._on_evaluation = on_evaluation
        self._known: dict[Key, Evaluation] = {}
        self._calls, self._best = calls_before, -math.inf
        self._logbook = tools.Logbook()
        self._logbook.header = list(LOGGED)

    def __contains__(self, proposal: Proposal) -> bool:
        return key_of(proposal) in self._known

    def __getitem__(self, proposal: Proposal) -> Evaluation:
        return self._known[key_of(proposal)]

    def measure(self, proposals: Sequence[Proposal]) -> Iterator[Evaluation]:
        """Evaluations of distinct proposals that are not known yet, the store's first, each known once it is given."""
        for fidelity, part in itertools.groupby(proposals, key=lambda proposal: proposal.fidelity):
            for evaluation in self._measure(list(part), fidelity):
                self.note(evaluation)
                yield evaluation

    def measure_steadily(self, more: Callable[[], Sequence[Proposal]]) -> Iterator[tuple[Evaluation, bool]]:
        """Evaluations of what `more` gives, which is asked whenever another one could begin, as soon as each is there;
        and whether it was not known from another process meanwhile.

        Raises:
            DiffesError: the evaluator measures whole batches only, or something that it was not given.
        """
        steady = getattr(self._evaluate, "steady", None)
        if steady is None:
            raise DiffesError(
                f"{type(self._evaluate).__name__} measures whole batches: an asynchronous search needs workers"
            )
        origins: dict[Schedule, Origin | None] = {}

        def schedules() -> list[Schedule]:
            found = {proposal.schedule: proposal.origin for proposal in more()}
            origins.update(found)
            return list(found)

        for evaluation in steady(schedules):
            _check_given(evaluation, origins, 1.0)
            scored = _scored(evaluation)
            origin, is_new = origins.pop(scored.schedule), key_of(scored) not in self._known
            if is_new:
                self._keep(scored, origin)
                self.note(scored)
            yield scored, is_new

    def note(self, evaluation: Evaluation) -> None:
        """Takes what was measured, here or by an earlier process."""
        self._known[key_of(evaluation)] = evaluation
        self._calls += evaluation.denoiser_calls
        if self.space.counts(evaluation.schedule, evaluation.fidelity):
            self._best = max(self._best, evaluation.fitness)
        if self._on_evaluation is not None:
            self._on_evaluation(evaluation)

    def arrange(self, proposals: Sequence[Proposal]) -> None:
        """Puts the latest evaluations into the order of a batch: they were measured in another one."""
        latest = {key_of(p): self._known.pop(key_of(p)) for p in proposals if p in self}
        self._known.update(latest)

    def log(self, batch: Sequence[Proposal]) -> None:
        """Notes the statistics of a generation, in the logbook and in the store."""
        told = [self[proposal] for proposal in batch if proposal in self]
        finite = [evaluation.fitness for evaluation in told if evaluation.fitness > -math.inf]
        record = {
            "generation": len(self._logbook),
            "evaluations": len(self._known),
            "denoiser_calls": self._calls,
            "best": self._best if self._best > -math.inf else None,
            "mean": statistics.fmean(finite) if finite else None,
            "spread": statistics.pstdev(finite) if finite else None,
            "diversity": diversity([evaluation.schedule.levels for evaluation in told], self.space),
        }
        self._logbook.record(**record)
        if self._store is not None:
            self._store.log(record)

    def settle(self) -> None:
        """Measures the fittest on all probes where none was, so that a search which ends early has a result."""
        told = self._known.values()
        if not any(self.space.counts(each.schedule, each.fidelity) for each in told):
            some = [each for each in told if each.fitness > -math.inf and self.space.counts(each.schedule, 1.0)]
            if some:
                best = max(some, key=lambda each: (each.fidelity, each.fitness))
                list(self.measure([Proposal(best.schedule)]))

    def result(self) -> SearchResult:
        """What was found so far.

        Raises:
            DiffesError: nothing was measured within the budget, or everything failed.
        """
        evaluations = tuple(self._known.values())
        if not evaluations:
            raise DiffesError("the strategy asked for no schedule at all, so there is no result")
        eligible = tuple(self.space.counts(evaluation.schedule, evaluation.fidelity) for evaluation in evaluations)
        candidates = [evaluation for evaluation, counts in zip(evaluations, eligible, strict=True) if counts]
        if not candidates:
            raise DiffesError(
                f"none of {len(evaluations)} evaluations was on all probes and within the budget, so there is no "
                "result; raise the limit"
            )
        best = max(candidates, key=lambda evaluation: evaluation.fitness)
        if best.fitness == -math.inf:
            raise DiffesError(
                f"all {len(candidates)} evaluations failed (fitness NaN or infinite), so there is no result"
            )
        return SearchResult(
            best=best,
            evaluations=evaluations,
            eligible=eligible,
            denoiser_calls=self._calls,
            seconds=sum(evaluation.seconds for evaluation in evaluations),
            logbook=self._logbook,
            calls_before=self._before,
        )

    def _measure(self, proposals: list[Proposal], fidelity: float) -> Iterator[Evaluation]:
        schedules = [proposal.schedule for proposal in proposals]
        stored = self._store.known(schedules, fidelity) if self._store is not None else []
        self.expect(schedules, fidelity, {evaluation.schedule: evaluation.denoiser_calls for evaluation in stored})
        yield from stored
        found = {evaluation.schedule for evaluation in stored}
        missing = [schedule for schedule in schedules if schedule not in found]
        origins = {proposal.schedule: proposal.origin for proposal in proposals}
        for evaluation in _evaluated(missing, fidelity, self._evaluate) if missing else ():
            self._keep(evaluation, origins[evaluation.schedule])
            yield evaluation

    def expect(
        self, schedules: Sequence[Schedule], fidelity: float = 1.0, paid: Mapping[Schedule, int] | None = None
    ) -> None:
        """Tells the evaluator of a batch before it is measured, or of what others measured, if it wants to know."""
        expect = getattr(self._evaluate, "expect", None)
        if schedules and expect is not None:
            expect(schedules, fidelity, paid)

    def _keep(self, evaluation: Evaluation, origin: Origin | None) -> None:
        if self._store is not None:
            self._store.add(evaluation, origin)
        log.info(
            "fitness %.6g on %g of the probes, %d denoiser calls, %.2f s, levels %s",
            evaluation.fitness, evaluation.fidelity, evaluation.denoiser_calls, evaluation.seconds,
            " ".join(map(str, evaluation.schedule.levels)),
        )  # fmt: skip


def diversity(genomes: Sequence[Sequence[int]], space: SearchSpace) -> float:
    """The share of visited stages in which two of the genomes (n, S) differ, on average over pairs: 0 to 1.

    Source: mean normalised Hamming distance.
    """
    pairs = len(genomes) * (len(genomes) - 1) / 2
    if not pairs:
        return 0.0
    differ = 0.0
    for stage in space.visited:
        counts = [n * (n - 1) / 2 for n in _counts([genome[stage] for genome in genomes])]
        differ += pairs - sum(counts)
    return differ / pairs / len(space.visited)


def _counts(values: Sequence[int]) -> list[int]:
    return [values.count(value) for value in set(values)]


def _evaluated(schedules: list[Schedule], fidelity: float, evaluate: Evaluator) -> Iterator[Evaluation]:
    """One evaluator call, checked: NaN and inf become a failure; what was not timed inside is timed from here."""
    waiting = set(schedules)
    start = time.perf_counter()
    for evaluation in evaluate(schedules) if fidelity == 1 else evaluate(schedules, fidelity):
        _check_given(evaluation, waiting, fidelity)
        waiting.remove(evaluation.schedule)
        taken = time.perf_counter() - start
        yield _scored(evaluation if evaluation.seconds else replace(evaluation, seconds=taken))
        start = time.perf_counter()
    if waiting:
        raise DiffesError(
            f"the evaluator must return one Evaluation per schedule: it got {len(schedules)} and left out "
            f"{len(waiting)}"
        )


def _check_given(evaluation: Any, waiting: Container[Schedule], fidelity: float) -> None:
    """Refuses what is no evaluation, or not of a schedule that the evaluator was given and has not returned."""
    if not isinstance(evaluation, Evaluation):
        raise unexpected("the evaluator", "return one Evaluation per schedule", evaluation)
    if evaluation.schedule not in waiting or evaluation.fidelity != fidelity:
        raise DiffesError(
            f"the evaluator returned levels {list(evaluation.schedule.levels)} at fidelity {evaluation.fidelity}, "
            f"which it was not given at {fidelity} or has returned before: it must return one Evaluation per "
            "schedule"
        )


def _scored(evaluation: Evaluation) -> Evaluation:
    """The evaluation, as a failure where its fitness is no score: inf would beat every number."""
    if evaluation.fitness < math.inf:
        return evaluation
    found = "NaN" if math.isnan(evaluation.fitness) else "infinite"
    warnings.warn(
        f"the fitness of levels {list(evaluation.schedule.levels)} is {found}: recorded as a failed evaluation (-inf)",
        RuntimeWarning,
        stacklevel=5,
    )
    return replace(evaluation, fitness=-math.inf)
