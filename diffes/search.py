"""The loop of every search: a strategy asks, an evaluator measures, a store remembers."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffes.errors import DiffesError
from diffes.schedule import Schedule
from diffes.strategy import Evaluation, Evaluator, Strategy

if TYPE_CHECKING:
    from diffes.store import EvaluationStore

MAX_IDLE_BATCHES = 50


@dataclass(frozen=True)
class SearchResult:
    """What a search found and what it cost.

    Args:
        best: the evaluation of highest fitness; of equals the first.
        evaluations: all distinct evaluations in the order in which the strategy asked for them.
        denoiser_calls: sum over the evaluations, those replayed from a store included.
        seconds: sum over the evaluations, likewise.
    """

    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    denoiser_calls: int
    seconds: float

    def curve(self) -> list[float]:
        """Best fitness so far after each evaluation, (len(evaluations),)."""
        return list(itertools.accumulate((evaluation.fitness for evaluation in self.evaluations), max))


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
        max_evals: distinct evaluations; a batch that would exceed it is cut.
        max_denoiser_calls: looked at between batches, so the last batch may pass it.
        max_seconds: seconds of evaluation, looked at between batches.
        store: evaluations of earlier runs; takes those of this one as soon as they are measured.
        on_evaluation: called with each distinct evaluation, stored already, for instance to show progress.

    Raises:
        DiffesError: no limit was given or one is not positive, the evaluator broke its contract, or nothing could be
            evaluated.
    """
    limits = {"max_evals": max_evals, "max_denoiser_calls": max_denoiser_calls, "max_seconds": max_seconds}
    _check_limits(limits)
    done: dict[Schedule, Evaluation] = {}
    spent: dict[str, float] = dict.fromkeys(limits, 0)
    idle = 0
    while idle < MAX_IDLE_BATCHES and all(limit is None or spent[name] < limit for name, limit in limits.items()):
        batch = strategy.ask()
        if not batch:
            break
        new = [schedule for schedule in batch if schedule not in done]
        if max_evals is not None:
            new = new[: max_evals - len(done)]
        measured: dict[Schedule, Evaluation] = {}
        for evaluation in _measure(new, evaluate, store):
            measured[evaluation.schedule] = evaluation
            spent["max_evals"] += 1
            spent["max_denoiser_calls"] += evaluation.denoiser_calls
            spent["max_seconds"] += evaluation.seconds
            if on_evaluation is not None:
                on_evaluation(evaluation)
        done.update((schedule, measured[schedule]) for schedule in new)
        strategy.tell([done[schedule] for schedule in batch if schedule in done])
        idle = 0 if new else idle + 1
    return _result(tuple(done.values()))


def _check_limits(limits: dict[str, float | None]) -> None:
    if all(limit is None for limit in limits.values()):
        raise DiffesError(f"a search needs a limit: give at least one of {', '.join(limits)}")
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise DiffesError(f"{name} must be above 0, got {limit}")


def _measure(schedules: list[Schedule], evaluate: Evaluator, store: EvaluationStore | None) -> Iterator[Evaluation]:
    """Evaluations of distinct schedules: the store's first, then what one evaluator call yields, stored at once."""
    missing = []
    for schedule in schedules:
        known = store.get(schedule) if store is not None else None
        if known is None:
            missing.append(schedule)
        else:
            yield known
    if missing:
        for evaluation in _evaluate(missing, evaluate):
            if store is not None:
                store.add(evaluation)
            yield evaluation


def _evaluate(schedules: list[Schedule], evaluate: Evaluator) -> Iterator[Evaluation]:
    """One evaluator call, checked: NaN becomes a failure; what was not timed inside is timed from here."""
    waiting = set(schedules)
    start = time.perf_counter()
    for evaluation in evaluate(schedules):
        if evaluation.schedule not in waiting:
            raise DiffesError(
                f"the evaluator returned levels {list(evaluation.schedule.levels)}, which it was not given or has "
                "returned before: it must return one Evaluation per schedule"
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


def _result(evaluations: tuple[Evaluation, ...]) -> SearchResult:
    if not evaluations:
        raise DiffesError("the strategy asked for no schedule at all, so there is no result")
    best = max(evaluations, key=lambda evaluation: evaluation.fitness)
    if best.fitness == -math.inf:
        raise DiffesError(f"all {len(evaluations)} evaluations failed (fitness -inf or NaN), so there is no result")
    return SearchResult(
        best=best,
        evaluations=evaluations,
        denoiser_calls=sum(evaluation.denoiser_calls for evaluation in evaluations),
        seconds=sum(evaluation.seconds for evaluation in evaluations),
    )
