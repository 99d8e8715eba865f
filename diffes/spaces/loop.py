"""Loop of every search: a strategy asks, an evaluator measures, a store remembers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffes.errors import DiffesError
from diffes.spaces.ledger import Ledger, OnEvaluation, SearchResult
from diffes.spaces.strategy import Evaluation, Evaluator, Proposal, Strategy, measurement_key

if TYPE_CHECKING:
    from diffes.spaces.store import EvaluationStore

MAX_IDLE_BATCHES = 50
LINE = 16  # evaluations per line of the logbook, where there are no generations
ROUNDING = 1e-6  # fractions of evaluations do not add up exactly


def run_search(
    strategy: Strategy,
    evaluate: Evaluator,
    *,
    max_evals: int | None = None,
    max_denoiser_calls: int | None = None,
    max_seconds: float | None = None,
    calls_before: int = 0,
    store: EvaluationStore | None = None,
    on_evaluation: OnEvaluation | None = None,
    asynchronous: bool = False,
) -> SearchResult:
    """Run a strategy until a limit is reached or it has nothing new to ask.

    A schedule is paid for once: when the strategy asks for it again, it is told the known evaluation. An evaluation
    found in the store costs nothing now but counts towards the limits as it did when it was paid. So a search that runs
    again over its store goes the same way and ends in the same place, and with higher limits goes on from there.

    Where a limit in calls or seconds may end within a batch, its schedules are measured one by one in the order asked,
    whatever order suits the evaluator: what the strategy wanted first is measured first.

    If a limit is reached before anything was measured on all probes, the fittest schedule is measured on all of them,
    beyond the limit.

    An asynchronous search asks as soon as a worker is free and tells the strategy each result when it comes. No worker
    waits for the others of a generation, and what is found depends on which worker is faster. Run again over its store,
    the search tells the strategy all that is there, in the order in which it came, and goes on; schedules that were
    open are lost. Over a shared store it also tells, before each schedule, what other processes have measured since.
    Schedules that are open when a limit is reached are measured to the end.

    Args:
        strategy: a fresh strategy; what it was told before does not count.
        evaluate: measures the new schedules of a batch in one call; it should yield each as soon as it is measured.
        max_evals: limit on distinct evaluations; one on a fraction of the probes counts as that fraction. A batch that
            would exceed the limit is cut.
        max_denoiser_calls: limit on denoiser calls; the evaluation that reaches it is the last one.
        max_seconds: limit on seconds of evaluation, likewise.
        calls_before: denoiser calls spent for this search before it began; they count in its cost, not in its limit.
        store: evaluations of earlier runs; receives those of this run as soon as they are measured.
        on_evaluation: called with each distinct evaluation after it is stored, for instance to show progress.
        asynchronous: run in steady state instead of in generations.

    Raises:
        DiffesError: no limit was given or one is not positive, the evaluator broke its contract, nothing could be
            evaluated, or the search is asynchronous and the strategy or the evaluator needs whole batches.
    """
    limits = _Limits({"max_evals": max_evals, "max_denoiser_calls": max_denoiser_calls, "max_seconds": max_seconds})
    ledger = Ledger(strategy.space, evaluate, store, on_evaluation, calls_before)
    if asynchronous:
        _search_steadily(strategy, ledger, limits, store)
    else:
        _search_in_batches(strategy, ledger, limits)
    ledger.settle()
    return ledger.result()


def _search_in_batches(strategy: Strategy, ledger: Ledger, limits: _Limits) -> None:
    """Ask for a generation, measure it, tell all of it."""
    idle = 0
    while idle < MAX_IDLE_BATCHES and not limits.reached:
        batch = strategy.ask()
        if not batch:
            break
        new = limits.cut([proposal for proposal in batch if proposal not in ledger])
        idle = 0 if new else idle + 1
        left = new
        while left and not limits.reached:
            n = limits.safe(left)
            part, left = left[:n], left[n:]
            for evaluation in ledger.measure(part):
                limits.spend(evaluation)
                if limits.reached:
                    break
        ledger.arrange(new)
        ledger.log(batch)
        strategy.tell([ledger[proposal] for proposal in batch if proposal in ledger])


def _search_steadily(strategy: Strategy, ledger: Ledger, limits: _Limits, store: EvaluationStore | None) -> None:
    """Ask whenever a worker is free, tell each result when it comes."""
    lines: list[Proposal] = []

    def learn(evaluation: Evaluation) -> None:
        limits.spend(evaluation)
        strategy.tell_one(evaluation)
        lines.append(Proposal(evaluation.schedule, evaluation.fidelity))
        if len(lines) == LINE:
            ledger.log(lines)
            lines.clear()

    shared = store if store is not None and store.shared else None
    n_open = n_told = 0

    def recall(known: Sequence[Evaluation]) -> None:
        """Count what another process measured as if this one had measured it."""
        nonlocal n_told
        ledger.expect([evaluation.schedule for evaluation in known])
        for evaluation in known:
            n_told += 1
            ledger.note(evaluation)
            learn(evaluation)

    order = np.random.default_rng(strategy.seed)  # processes that begin together should begin differently
    queue: list[Proposal] = []
    recall(store.evaluations() if store is not None else [])

    def fresh() -> list[Proposal]:
        for _ in range(MAX_IDLE_BATCHES):
            if limits.reached or (n_open and not n_told):
                break
            open_before = {measurement_key(proposal) for proposal in strategy.pending}
            batch = strategy.ask_more()
            if not batch:
                break
            for proposal in batch:
                if proposal in ledger:
                    strategy.tell_one(ledger[proposal])
            new = [p for p in batch if p not in ledger and measurement_key(p) not in open_before]
            if new and shared is not None:
                new = [new[i] for i in order.permutation(len(new))]
            if new:
                return new
        return []

    def more() -> list[Proposal]:
        nonlocal n_open, queue
        recall(shared.refresh() if shared is not None else [])
        queue = [proposal for proposal in queue if proposal not in ledger] or fresh()
        queue = [] if limits.reached else limits.cut(queue, n_open)
        n_given = 1 if shared is not None else limits.safe(queue, n_open)  # others may measure the rest meanwhile
        given, queue = queue[:n_given], queue[n_given:]
        n_open += len(given)
        return given

    for evaluation, is_new in ledger.measure_steadily(more):
        n_open, n_told = n_open - 1, n_told + is_new
        if is_new:
            learn(evaluation)
    if lines:
        ledger.log(lines)


class _Limits:
    """Limits of a search, and what it has spent of them.

    Args:
        limits: limits by name; None is no limit.
    """

    def __init__(self, limits: dict[str, float | None]) -> None:
        if all(limit is None for limit in limits.values()):
            raise DiffesError(f"a search needs a limit. Set at least one of {', '.join(limits)}.")
        for name, limit in limits.items():
            if limit is not None and not limit > 0:
                raise DiffesError(f"{name} must be above 0, got {limit}")
        self._limits = limits
        self._spent: dict[str, float] = dict.fromkeys(limits, 0.0)
        self._most_expensive: dict[str, float] = {}  # highest cost so far of an evaluation on all probes

    @property
    def reached(self) -> bool:
        return any(limit is not None and self._spent[name] >= limit - ROUNDING for name, limit in self._limits.items())

    def spend(self, evaluation: Evaluation) -> None:
        prices = {
            "max_evals": evaluation.fidelity,
            "max_denoiser_calls": evaluation.denoiser_calls,
            "max_seconds": evaluation.seconds,
        }
        for name, price in prices.items():
            self._spent[name] += price
            self._most_expensive[name] = max(self._most_expensive.get(name, 0.0), price / evaluation.fidelity)

    def cut(self, proposals: Sequence[Proposal], n_open: int = 0) -> list[Proposal]:
        """Return as many proposals as `max_evals` allows beside those open; the last may exceed it by a fraction."""
        limit = self._limits["max_evals"]
        if limit is None:
            return list(proposals)
        before = itertools.accumulate((p.fidelity for p in proposals), initial=self._spent["max_evals"] + n_open)
        return [p for p, spent in zip(proposals, before, strict=False) if spent < limit - ROUNDING]

    def safe(self, proposals: Sequence[Proposal], n_open: int = 0) -> int:
        """Return how many may be measured in any order: all if no limit can end within them and those open, else 1."""
        evaluations = sum(proposal.fidelity for proposal in proposals) + n_open
        for name in ("max_denoiser_calls", "max_seconds"):
            limit = self._limits[name]
            most = self._most_expensive.get(name, math.inf)
            if limit is not None and not self._spent[name] + most * evaluations < limit:
                return 1
        return len(proposals)
