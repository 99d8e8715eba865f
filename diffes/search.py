"""The loop of every search: a strategy asks, an evaluator measures, a store remembers."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffes.errors import DiffesError
from diffes.schedule import Schedule
from diffes.space import SearchSpace
from diffes.strategy import Evaluation, Evaluator, Origin, Strategy

if TYPE_CHECKING:
    from diffes.store import EvaluationStore

MAX_IDLE_BATCHES = 50
ROUNDING = 1e-6  # tenths of evaluations do not add up exactly


@dataclass(frozen=True)
class SearchResult:
    """What a search found and what it cost.

    Args:
        best: of the evaluations on all probes within the budget the one of highest fitness; of equals the first.
        evaluations: all distinct evaluations in the order in which the strategy asked for them.
        eligible: for each, whether it is on all probes and within the budget.
        denoiser_calls: sum over the evaluations, those replayed from a store included.
        seconds: sum over the evaluations, likewise.
    """

    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    eligible: tuple[bool, ...]
    denoiser_calls: int
    seconds: float

    def curve(self) -> list[float]:
        """Best eligible fitness so far after each evaluation, (len(evaluations),); -inf before the first."""
        pairs = zip(self.evaluations, self.eligible, strict=True)
        return list(itertools.accumulate((e.fitness if counts else -math.inf for e, counts in pairs), max))

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
        return list(itertools.accumulate(evaluation.denoiser_calls for evaluation in self.evaluations))


def run_search(
    strategy: Strategy,
    evaluate: Evaluator,
    *,
    max_evals: int | None = None,
    max_denoiser_calls: int | None = None,
    max_seconds: float | None = None,
    store: EvaluationStore | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> SearchResult:
    """Runs a strategy until a limit is reached or it has nothing new to ask.

    A schedule is paid for once: asked again, the strategy is told what is known. An evaluation found in the store costs
    nothing now but counts towards the limits as it did when it was paid, so that a search run again over its store goes
    the same way and ends in the same place, and with higher limits goes on from there.

    Args:
        strategy: a fresh one; what it was told before does not count.
        evaluate: measures the new schedules of a batch in one call, and best yields each as soon as it is measured.
        max_evals: distinct evaluations, those on a fraction of the probes counted as that fraction; a batch that would
            exceed it is cut.
        max_denoiser_calls: the evaluation that reaches it is the last one.
        max_seconds: seconds of evaluation, likewise.
        store: evaluations of earlier runs; takes those of this one as soon as they are measured.
        on_evaluation: called with each distinct evaluation, stored already, for instance to show progress.

    Raises:
        DiffesError: no limit was given or one is not positive, the evaluator broke its contract, or nothing could be
            evaluated.
    """
    limits = {"max_evals": max_evals, "max_denoiser_calls": max_denoiser_calls, "max_seconds": max_seconds}
    _check_limits(limits)
    done: dict[tuple[Schedule, float], Evaluation] = {}
    spent: dict[str, float] = dict.fromkeys(limits, 0)
    idle = 0

    def goes_on() -> bool:
        return all(limit is None or spent[name] < limit - ROUNDING for name, limit in limits.items())

    while idle < MAX_IDLE_BATCHES and goes_on():
        batch = strategy.ask()
        if not batch:
            break
        fidelity = strategy.fidelity
        new = [schedule for schedule in batch if (schedule, fidelity) not in done]
        if max_evals is not None:
            new = new[: math.ceil((max_evals - spent["max_evals"]) / fidelity - ROUNDING)]
        measured: dict[Schedule, Evaluation] = {}
        for evaluation in _measure(new, fidelity, evaluate, store, strategy.origins):
            measured[evaluation.schedule] = evaluation
            spent["max_evals"] += fidelity
            spent["max_denoiser_calls"] += evaluation.denoiser_calls
            spent["max_seconds"] += evaluation.seconds
            if on_evaluation is not None:
                on_evaluation(evaluation)
            if not goes_on():
                break
        done.update(((schedule, fidelity), measured[schedule]) for schedule in new if schedule in measured)
        strategy.tell([done[schedule, fidelity] for schedule in batch if (schedule, fidelity) in done])
        idle = 0 if new else idle + 1
    return _result(tuple(done.values()), strategy.space)


def _check_limits(limits: dict[str, float | None]) -> None:
    if all(limit is None for limit in limits.values()):
        raise DiffesError(f"a search needs a limit: give at least one of {', '.join(limits)}")
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise DiffesError(f"{name} must be above 0, got {limit}")


def _measure(
    schedules: list[Schedule],
    fidelity: float,
    evaluate: Evaluator,
    store: EvaluationStore | None,
    origins: Mapping[tuple[int, ...], Origin],
) -> Iterator[Evaluation]:
    """Evaluations of distinct schedules: the store's first, then what one evaluator call yields, stored at once."""
    known = store.known(schedules, fidelity) if store is not None else []
    remember = getattr(evaluate, "remember", None)
    for evaluation in known:
        if remember is not None:
            remember(evaluation)
        yield evaluation
    found = {evaluation.schedule for evaluation in known}
    missing = [schedule for schedule in schedules if schedule not in found]
    for evaluation in _evaluate(missing, fidelity, evaluate) if missing else ():
        if store is not None:
            store.add(evaluation, origins.get(evaluation.schedule.levels))
        yield evaluation


def _evaluate(schedules: list[Schedule], fidelity: float, evaluate: Evaluator) -> Iterator[Evaluation]:
    """One evaluator call, checked: NaN becomes a failure; what was not timed inside is timed from here."""
    waiting = set(schedules)
    start = time.perf_counter()
    for evaluation in evaluate(schedules) if fidelity == 1 else evaluate(schedules, fidelity):
        if evaluation.schedule not in waiting or evaluation.fidelity != fidelity:
            raise DiffesError(
                f"the evaluator returned levels {list(evaluation.schedule.levels)} at fidelity {evaluation.fidelity}, "
                f"which it was not given at {fidelity} or has returned before: it must return one Evaluation per "
                "schedule"
            )
        waiting.remove(evaluation.schedule)
        taken = time.perf_counter() - start
        yield _without_nan(evaluation if evaluation.seconds else replace(evaluation, seconds=taken))
        start = time.perf_counter()
    if waiting:
        raise DiffesError(
            f"the evaluator must return one Evaluation per schedule: it got {len(schedules)} and left out "
            f"{len(waiting)}"
        )


def _without_nan(evaluation: Evaluation) -> Evaluation:
    if not math.isnan(evaluation.fitness):
        return evaluation
    warnings.warn(
        f"the fitness of levels {list(evaluation.schedule.levels)} is NaN: recorded as a failed evaluation (-inf)",
        RuntimeWarning,
        stacklevel=5,
    )
    return replace(evaluation, fitness=-math.inf)


def _result(evaluations: tuple[Evaluation, ...], space: SearchSpace) -> SearchResult:
    if not evaluations:
        raise DiffesError("the strategy asked for no schedule at all, so there is no result")
    eligible = tuple(space.counts(evaluation.schedule, evaluation.fidelity) for evaluation in evaluations)
    candidates = [evaluation for evaluation, counts in zip(evaluations, eligible, strict=True) if counts]
    if not candidates:
        raise DiffesError(
            f"none of {len(evaluations)} evaluations was on all probes and within the budget, so there is no result; "
            "raise the limit"
        )
    best = max(candidates, key=lambda evaluation: evaluation.fitness)
    if best.fitness == -math.inf:
        raise DiffesError(f"all {len(candidates)} evaluations failed (fitness -inf or NaN), so there is no result")
    return SearchResult(
        best=best,
        evaluations=evaluations,
        eligible=eligible,
        denoiser_calls=sum(evaluation.denoiser_calls for evaluation in evaluations),
        seconds=sum(evaluation.seconds for evaluation in evaluations),
    )
