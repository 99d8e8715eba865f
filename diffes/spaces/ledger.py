"""Ledger of a search: what was measured and what it cost. Every schedule is paid for once."""

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
from diffes.spaces.genome import Origin
from diffes.spaces.schedule import Schedule
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Evaluator, Key, Proposal, measurement_key

if TYPE_CHECKING:
    from diffes.spaces.store import EvaluationStore

log = logging.getLogger(__name__)
OnEvaluation = Callable[[Evaluation], None]
LOGGED = ("generation", "evaluations", "denoiser_calls", "best", "mean", "spread", "diversity")


@dataclass(frozen=True)
class SearchResult:
    """Result of a search, and its cost.

    Args:
        best: the fittest of the evaluations on all probes within the budget; of equals the first.
        evaluations: all distinct evaluations in the order in which the strategy asked for them.
        eligible: for each evaluation, whether it is on all probes and within the budget.
        denoiser_calls: sum over the evaluations, those replayed from a store included, plus `calls_before`.
        seconds: sum over the evaluations, those replayed from a store included.
        logbook: DEAP's logbook with one line per generation (a batch of the strategy): its number; evaluations,
            denoiser calls and best fitness so far; mean and standard deviation of its fitness (without failures; None
            where all failed); and its diversity, the share of visited stages in which two of its schedules differ,
            averaged over pairs.
        calls_before: denoiser calls spent for the search before it began.
    """

    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    eligible: tuple[bool, ...]
    denoiser_calls: int
    seconds: float
    logbook: tools.Logbook = field(default_factory=tools.Logbook)
    calls_before: int = 0

    def curve(self) -> list[float]:
        """Return the best eligible fitness so far after each evaluation, (len(evaluations),); -inf before the first."""
        pairs = zip(self.evaluations, self.eligible, strict=True)
        return list(itertools.accumulate((e.fitness if counts else -math.inf for e, counts in pairs), max))

    @property
    def paid_calls(self) -> int | None:
        """Denoiser calls, in rows, that workers really ran; None where not all evaluations were made by workers."""
        paid = [e.measured.paid_calls for e in self.evaluations if e.measured is not None]
        return sum(paid) if len(paid) == len(self.evaluations) else None

    def front(self, space: SearchSpace) -> list[Evaluation]:
        """Return the evaluations on all probes that no other dominates in fitness and cost, the cheapest first."""
        front: list[Evaluation] = []
        full = [e for e in self.evaluations if e.fidelity == 1 and e.fitness > -math.inf]
        for evaluation in sorted(full, key=lambda e: (space.cost(e.schedule.levels), -e.fitness)):
            if not front or evaluation.fitness > front[-1].fitness:
                front.append(evaluation)
        return front

    def calls(self) -> list[int]:
        """Return the denoiser calls spent after each evaluation, (len(evaluations),)."""
        calls = (evaluation.denoiser_calls for evaluation in self.evaluations)
        return list(itertools.accumulate(calls, initial=self.calls_before))[1:]


class Ledger:
    """Record of what was measured so far. A schedule is paid for once: what memory or store holds costs nothing now.

    Args:
        space: the feasible schedules.
        evaluate: measures new schedules.
        store: evaluations of earlier runs; receives those of this run as soon as they are measured.
        on_evaluation: called with each distinct evaluation after it is stored, for instance to show progress.
        calls_before: denoiser calls spent for the search before it began.
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
        return measurement_key(proposal) in self._known

    def __getitem__(self, proposal: Proposal) -> Evaluation:
        return self._known[measurement_key(proposal)]

    def measure(self, proposals: Sequence[Proposal]) -> Iterator[Evaluation]:
        """Measure distinct proposals that are not known yet; yield those found in the store first.

        Each evaluation is known to the ledger before it is yielded.
        """
        for fidelity, part in itertools.groupby(proposals, key=lambda proposal: proposal.fidelity):
            for evaluation in self._measure(list(part), fidelity):
                self.note(evaluation)
                yield evaluation

    def measure_steadily(self, more: Callable[[], Sequence[Proposal]]) -> Iterator[tuple[Evaluation, bool]]:
        """Measure what `more` gives; yield each evaluation as soon as it is there, and whether it is new.

        An evaluation is not new if another process has measured it meanwhile.

        Args:
            more: gives proposals; called whenever another measurement could begin.

        Raises:
            DiffesError: the evaluator measures whole batches only, or returns something that it was not given.
        """
        steady = getattr(self._evaluate, "steady", None)
        if steady is None:
            raise DiffesError(
                f"{type(self._evaluate).__name__} measures whole batches, and an asynchronous search needs single "
                "results. Set workers to 2 or more, or asynchronous to False."
            )
        origins: dict[Schedule, Origin | None] = {}

        def schedules() -> list[Schedule]:
            found = {proposal.schedule: proposal.origin for proposal in more()}
            origins.update(found)
            return list(found)

        for evaluation in steady(schedules):
            _check_given(evaluation, origins, 1.0)
            scored = _scored(evaluation)
            origin, is_new = origins.pop(scored.schedule), measurement_key(scored) not in self._known
            if is_new:
                self._keep(scored, origin)
                self.note(scored)
            yield scored, is_new

    def note(self, evaluation: Evaluation) -> None:
        """Record an evaluation that was measured here or by an earlier process."""
        self._known[measurement_key(evaluation)] = evaluation
        self._calls += evaluation.denoiser_calls
        if self.space.counts(evaluation.schedule, evaluation.fidelity):
            self._best = max(self._best, evaluation.fitness)
        if self._on_evaluation is not None:
            self._on_evaluation(evaluation)

    def arrange(self, proposals: Sequence[Proposal]) -> None:
        """Put the latest evaluations into the order of a batch; they were measured in another order."""
        latest = {measurement_key(p): self._known.pop(measurement_key(p)) for p in proposals if p in self}
        self._known.update(latest)

    def log(self, batch: Sequence[Proposal]) -> None:
        """Record the statistics of a generation, in the logbook and in the store."""
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
        """Measure the fittest schedule on all probes if none was yet, so that a search that ends early has a result."""
        told = self._known.values()
        if not any(self.space.counts(each.schedule, each.fidelity) for each in told):
            some = [each for each in told if each.fitness > -math.inf and self.space.counts(each.schedule, 1.0)]
            if some:
                best = max(some, key=lambda each: (each.fidelity, each.fitness))
                list(self.measure([Proposal(best.schedule)]))

    def result(self) -> SearchResult:
        """Return what was found so far.

        Raises:
            DiffesError: nothing was measured on all probes within the budget, or everything failed.
        """
        evaluations = tuple(self._known.values())
        if not evaluations:
            raise DiffesError("the search has no result, because the strategy asked for no schedule")
        eligible = tuple(self.space.counts(evaluation.schedule, evaluation.fidelity) for evaluation in evaluations)
        candidates = [evaluation for evaluation, counts in zip(evaluations, eligible, strict=True) if counts]
        if all(evaluation.fitness == -math.inf for evaluation in evaluations):
            raise DiffesError(
                f"the search has no result: all {len(evaluations)} evaluations failed, with a fitness of NaN or "
                "infinity"
            )
        if not candidates:
            raise DiffesError(
                f"the search has no result: none of its {len(evaluations)} evaluations was on all probes and within "
                "the budget. Raise the limit, for instance max_evals."
            )
        best = max(candidates, key=lambda evaluation: evaluation.fitness)
        if best.fitness == -math.inf:
            raise DiffesError(
                f"the search has no result: all {len(candidates)} evaluations failed, with a fitness of NaN or infinity"
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
        """Announce a batch, before it is measured or after others measured it, to an evaluator that has `expect`."""
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
    """Return the share of visited stages in which two of the genomes (n, S) differ, averaged over pairs: 0 to 1.

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
    """Call the evaluator once and check what it yields.

    NaN and inf become failures. An evaluation without a time of its own gets the time measured here.
    """
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
            f"the evaluator must return one Evaluation per schedule. It got {len(schedules)} schedules and left out "
            f"{len(waiting)}."
        )


def _check_given(evaluation: Any, waiting: Container[Schedule], fidelity: float) -> None:
    """Raise an error for a result that is no evaluation, or of a schedule that is not waiting for one."""
    if not isinstance(evaluation, Evaluation):
        raise unexpected("the evaluator", "return one Evaluation per schedule", evaluation)
    if evaluation.schedule not in waiting or evaluation.fidelity != fidelity:
        raise DiffesError(
            f"the evaluator must return one Evaluation per schedule, at the fidelity {fidelity}. It returned levels "
            f"{list(evaluation.schedule.levels)} at the fidelity {evaluation.fidelity}, which it was not given or has "
            "returned before."
        )


def _scored(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation, as a failure where its fitness is NaN or inf: inf would beat every number."""
    if evaluation.fitness < math.inf:
        return evaluation
    found = "NaN" if math.isnan(evaluation.fitness) else "infinite"
    warnings.warn(
        f"the fitness of levels {list(evaluation.schedule.levels)} is {found}. It counts as a failed evaluation "
        "(-inf).",
        RuntimeWarning,
        stacklevel=5,
    )
    return replace(evaluation, fitness=-math.inf)
