"""run_search: what is paid for, when it ends, and that a run over its store is the same run."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffes.errors import DiffesError
from diffes.spaces.ledger import SearchResult
from diffes.spaces.loop import MAX_IDLE_BATCHES, run_search
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import Evaluation, Proposal, Strategy
from search_strategies.evopress import EvoPress

SPACE = SearchSpace.mean_sparsity(Stages.equal(4), 8, 0.5)
FEASIBLE = [list(levels) for levels in itertools.product(range(9), repeat=4) if sum(levels) == 16]


class Scripted(Strategy):
    """Asks for given batches, by position in FEASIBLE; repeats the last for ever if told to."""

    def __init__(self, *batches: Sequence[int], forever: bool = False, fidelity: float = 1.0) -> None:
        super().__init__(SPACE, seed=0)
        self.batches = list(batches)
        self.forever = forever
        self.fidelity = fidelity
        self.told: list[list[float]] = []

    def _ask(self) -> list[Proposal]:
        if not self.batches:
            return []
        batch = self.batches[0] if self.forever and len(self.batches) == 1 else self.batches.pop(0)
        return [self.propose(FEASIBLE[i], fidelity=self.fidelity) for i in batch]

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        self.told.append([evaluation.fitness for evaluation in evaluations])


class Rungs(Scripted):
    """The first batch at the fidelity given, the others at another one."""

    def __init__(self, *batches: Sequence[int], first: float, then: float) -> None:
        super().__init__(*batches, fidelity=first)
        self.then = then

    def _ask(self) -> list[Proposal]:
        batch = super()._ask()
        self.fidelity = self.then
        return batch


class Counting:
    """Scores a schedule by its position in FEASIBLE, 10 denoiser calls and half a second each; notes its calls.

    Of fewer probes both are as much less. What it is given together it measures in the order of `key`.
    """

    def __init__(self, scores: dict[int, float] | None = None, key: Callable[[int], int] | None = None) -> None:
        self.scores = scores or {}
        self.key = key
        self.calls: list[list[int]] = []

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        positions = [FEASIBLE.index(list(schedule.levels)) for schedule in schedules]
        self.calls.append(positions)
        return [
            Evaluation(
                SPACE.schedule(FEASIBLE[i]),
                self.scores.get(i, float(i)),
                round(10 * fidelity),
                0.5 * fidelity,
                fidelity,
            )
            for i in (positions if self.key is None else sorted(positions, key=self.key))
        ]


def positions(result: SearchResult) -> list[int]:
    return [FEASIBLE.index(list(evaluation.schedule.levels)) for evaluation in result.evaluations]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "evaluations.journal"


def open_store(journal: Path) -> EvaluationStore:
    return EvaluationStore(journal, SPACE)


def test_runs_until_exhausted_and_adds_up() -> None:
    strategy, evaluate = Scripted([3, 7, 5], [1, 2]), Counting()
    result = run_search(strategy, evaluate, max_evals=100)
    assert positions(result) == [3, 7, 5, 1, 2]
    assert evaluate.calls == [[3, 7, 5], [1, 2]]
    assert strategy.told == [[3.0, 7.0, 5.0], [1.0, 2.0]]
    assert result.best.schedule.levels == tuple(FEASIBLE[7])
    assert result.curve() == [3.0, 7.0, 7.0, 7.0, 7.0]
    assert (result.denoiser_calls, result.seconds) == (50, 2.5)


def test_a_schedule_is_paid_for_once() -> None:
    strategy, evaluate = Scripted([1, 2], [2, 3], [3, 1]), Counting()
    result = run_search(strategy, evaluate, max_evals=100)
    assert evaluate.calls == [[1, 2], [3]]
    assert strategy.told == [[1.0, 2.0], [2.0, 3.0], [3.0, 1.0]]
    assert result.denoiser_calls == 30


def test_the_batch_that_would_exceed_max_evals_is_cut() -> None:
    evaluate = Counting()
    result = run_search(Scripted([1, 2], [2, 3, 9, 4], [5]), evaluate, max_evals=3)
    assert evaluate.calls == [[1, 2], [3]]
    assert result.best.fitness == 3.0


def test_the_best_of_a_cut_batch_counts() -> None:
    assert run_search(Scripted([9, 1]), Counting(), max_evals=1).best.fitness == 9.0


def test_max_denoiser_calls_and_max_seconds_stop_within_a_batch() -> None:
    batches = [[1, 2], [3, 4], [5, 6]]
    assert positions(run_search(Scripted(*batches), Counting(), max_denoiser_calls=20)) == [1, 2]
    assert positions(run_search(Scripted(*batches), Counting(), max_denoiser_calls=21)) == [1, 2, 3]
    assert positions(run_search(Scripted(*batches), Counting(), max_seconds=1.0)) == [1, 2]
    assert positions(run_search(Scripted(*batches), Counting(), max_seconds=1.1)) == [1, 2, 3]


def backwards(position: int) -> int:
    return -position


def shuffled(position: int) -> int:
    return position * 7 % 11


LIMITS: list[dict[str, Any]] = [{"max_denoiser_calls": 30}, {"max_seconds": 1.5}]


@pytest.mark.parametrize("key", [backwards, shuffled])
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: next(iter(limits)))
def test_what_was_asked_first_is_measured_where_a_limit_cuts_the_first_batch(
    key: Callable[[int], int], limits: dict[str, Any]
) -> None:
    strategy, evaluate = Scripted([6, 2, 9, 4, 1]), Counting(key=key)
    result = run_search(strategy, evaluate, **limits)
    assert positions(result) == [6, 2, 9]
    assert strategy.told == []  # nothing was learnt from a cut batch
    assert result.best.fitness == 9.0


@pytest.mark.parametrize("key", [backwards, shuffled])
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: next(iter(limits)))
def test_what_was_asked_first_is_measured_where_a_limit_cuts_a_later_batch(
    key: Callable[[int], int], limits: dict[str, Any]
) -> None:
    many = {name: limit + 0.5 * limit for name, limit in limits.items()}  # four and a half evaluations
    strategy, evaluate = Scripted([5, 8], [8, 3, 7, 2, 9, 1]), Counting(key=key)
    assert positions(run_search(strategy, evaluate, **many)) == [5, 8, 3, 7, 2]
    assert strategy.told == [[5.0, 8.0]]


@pytest.mark.parametrize("key", [backwards, shuffled])
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: next(iter(limits)))
def test_what_was_asked_first_is_measured_also_on_fewer_probes(
    key: Callable[[int], int], limits: dict[str, Any]
) -> None:
    assert positions(run_search(Rungs([5], [8, 3, 7, 2, 9, 1], first=1.0, then=0.5), Counting(key=key), **limits)) == [
        5,
        8,
        3,
        7,
        2,
    ]
    assert positions(run_search(Rungs([5], [8, 3, 7], first=1.0, then=0.5), Counting(key=key), **limits)) == [
        5,
        8,
        3,
        7,
    ]


@pytest.mark.parametrize("key", [backwards, shuffled])
def test_the_result_is_in_the_order_asked_whatever_suits_the_evaluator(key: Callable[[int], int]) -> None:
    strategy, evaluate = Scripted([6, 2, 9, 4], [9, 1, 8, 3]), Counting(key=key)
    result = run_search(strategy, evaluate, max_evals=100)
    assert evaluate.calls == [[6, 2, 9, 4], [1, 8, 3]]  # each batch together
    assert positions(result) == [6, 2, 9, 4, 1, 8, 3]
    assert strategy.told == [[6.0, 2.0, 9.0, 4.0], [9.0, 1.0, 8.0, 3.0]]


def test_batches_that_no_limit_can_cut_are_measured_together() -> None:
    evaluate = Counting()
    run_search(Scripted([1], [2, 3, 4], [5, 6, 7]), evaluate, max_denoiser_calls=60)
    assert evaluate.calls == [[1], [2, 3, 4], [5], [6]]


def test_what_few_probes_cost_says_what_all_of_them_cost() -> None:
    """Five calls on a half of the probes are ten on all: after them the limit may end within the batch."""
    strategy = Rungs([5], [2, 3, 7, 8], first=0.5, then=1.0)
    assert positions(run_search(strategy, Counting(key=backwards), max_denoiser_calls=26)) == [5, 2, 3, 7]


def test_the_evaluation_that_reaches_the_limit_is_the_last_even_where_prices_rise() -> None:
    counting = Counting()

    def rising(schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        for evaluation in counting(schedules, fidelity):
            yield replace(evaluation, denoiser_calls=10 if evaluation.fitness == 1 else 30)

    result = run_search(Scripted([1], [2, 3, 4]), rising, max_denoiser_calls=50)
    assert counting.calls == [[1], [2, 3, 4]]  # thirty more seemed safe
    assert positions(result) == [1, 2, 3] and result.calls() == [10, 40, 70]


def test_the_first_of_equals_is_the_best_in_the_order_asked() -> None:
    evaluate = Counting({6: 1.0, 2: 1.0, 9: 1.0}, key=backwards)
    result = run_search(Scripted([6, 2, 9]), evaluate, max_evals=100)
    assert result.best.schedule.levels == tuple(FEASIBLE[6])


@pytest.mark.parametrize(
    ("fidelity", "limit", "n"), [(0.25, 3, 12), (0.4, 1, 3), (0.4, 2, 5), (0.1, 1, 10), (0.3, 3, 10)]
)
def test_max_evals_counts_fractions_and_the_last_may_exceed_it(fidelity: float, limit: int, n: int) -> None:
    strategy, evaluate = Scripted(range(20), fidelity=fidelity), Counting()
    result = run_search(strategy, evaluate, max_evals=limit)
    assert evaluate.calls == [list(range(n)), [n - 1]]  # the fittest on all probes, so that there is a result
    assert strategy.told == [] and result.best == result.evaluations[n]
    assert result.best.schedule.levels == tuple(FEASIBLE[n - 1]) and len(result.evaluations) == n + 1


def test_max_evals_goes_on_with_what_fractions_left() -> None:
    evaluate = Counting()
    result = run_search(Rungs([1, 2, 3], [1, 2, 3], first=0.5, then=1.0), evaluate, max_evals=3)
    assert evaluate.calls == [[1, 2, 3], [1, 2]]
    assert [e.fidelity for e in result.evaluations] == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert result.best.fitness == 2.0


def test_every_batch_is_a_line_of_the_logbook() -> None:
    """Worked out by hand; the second batch asks for one that is known, and the last is cut after its first."""
    strategy = Scripted([3, 7], [7, 2, 4], [2, 3], [9, 8])
    logbook = run_search(strategy, Counting(key=backwards), max_denoiser_calls=50).logbook
    assert logbook.select("generation") == [0, 1, 2, 3]
    assert logbook.select("evaluations") == [2, 4, 4, 5]
    assert logbook.select("denoiser_calls") == [20, 40, 40, 50]
    assert logbook.select("best") == [7.0, 7.0, 7.0, 9.0]
    assert logbook.select("mean") == pytest.approx([5.0, 13 / 3, 2.5, 9.0])
    assert logbook.select("spread") == pytest.approx([2.0, math.sqrt(38) / 3, 0.5, 0.0])
    pairs = [FEASIBLE[i] for i in (3, 7)], [FEASIBLE[i] for i in (7, 2, 4)], [FEASIBLE[i] for i in (2, 3)]
    assert pairs[0] == [[0, 2, 6, 8], [0, 3, 6, 7]]  # differ in two stages of four
    assert pairs[1] == [[0, 3, 6, 7], [0, 1, 8, 7], [0, 2, 7, 7]]  # in two each
    assert pairs[2] == [[0, 1, 8, 7], [0, 2, 6, 8]]  # in three
    assert logbook.select("diversity") == pytest.approx([0.5, 0.5, 0.75, 0.0])


def test_the_logbook_of_a_resumed_search_is_not_doubled(journal: Path) -> None:
    batches = [[1, 2], [3, 4, 5], [6], [7, 8]]
    first = run_search(Scripted(*batches), Counting(), store=open_store(journal), max_evals=5)
    assert open_store(journal).logbook() == list(first.logbook) and len(first.logbook) == 2
    again = run_search(Scripted(*batches), Counting(), store=open_store(journal), max_evals=5)
    assert list(again.logbook) == list(first.logbook) == open_store(journal).logbook()
    longer = run_search(Scripted(*batches), Counting(), store=open_store(journal), max_evals=8)
    assert open_store(journal).logbook() == list(longer.logbook)
    assert longer.logbook.select("generation") == [0, 1, 2, 3]


@pytest.mark.parametrize("limits", [{"max_evals": 4}, {"max_denoiser_calls": 40}], ids=["evaluations", "calls"])
def test_a_generation_that_was_cut_is_whole_in_the_logbook_of_a_resumed_search(
    journal: Path, limits: dict[str, Any]
) -> None:
    batches = [[1, 2], [3, 4, 5], [6]]
    cut = run_search(Scripted(*batches), Counting(), store=open_store(journal), **limits)
    assert open_store(journal).logbook() == list(cut.logbook)
    assert cut.logbook.select("mean") == [1.5, 3.5]
    whole = run_search(Scripted(*batches), Counting(), store=open_store(journal), max_evals=9)
    assert open_store(journal).logbook() == list(whole.logbook)
    assert whole.logbook.select("mean") == [1.5, 4.0, 6.0]


def test_an_evaluator_that_keeps_no_time_is_timed() -> None:
    def untimed(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        return [Evaluation(schedule, 1.0) for schedule in schedules]

    start = time.perf_counter()
    result = run_search(Scripted([1, 2]), untimed, max_evals=5)
    assert all(evaluation.seconds > 0 for evaluation in result.evaluations)
    assert result.seconds <= time.perf_counter() - start
    assert result.seconds == pytest.approx(sum(evaluation.seconds for evaluation in result.evaluations))


def test_stops_when_nothing_new_comes() -> None:
    strategy = Scripted([1, 2], [1, 2], [3], [2, 1], forever=True)
    result = run_search(strategy, Counting(), max_evals=100)
    assert positions(result) == [1, 2, 3]
    assert len(strategy.told) == 3 + MAX_IDLE_BATCHES


@pytest.mark.parametrize("limits", [{}, {"max_evals": 0}, {"max_denoiser_calls": -1}, {"max_seconds": math.nan}])
def test_a_limit_is_needed(limits: dict[str, Any]) -> None:
    with pytest.raises(DiffesError, match=r"needs a limit|must be above 0"):
        run_search(Scripted([1]), Counting(), **limits)


def test_replay_ends_identically_and_pays_nothing(journal: Path) -> None:
    batches = [[1, 2], [2, 3], [9, 4, 5], [6]]
    limits: dict[str, Any] = {"max_evals": 5}
    first = run_search(Scripted(*batches), Counting(), store=open_store(journal), **limits)
    evaluate, replayed = Counting(), Scripted(*batches)
    second = run_search(replayed, evaluate, store=open_store(journal), **limits)
    assert second == first
    assert evaluate.calls == []
    assert replayed.told == [[1.0, 2.0], [2.0, 3.0]]


def test_replay_counts_denoiser_calls_and_seconds_as_when_they_were_paid(journal: Path) -> None:
    batches = [[1, 2], [3, 4], [5, 6]]
    full = run_search(Scripted(*batches), Counting(), store=open_store(journal), max_evals=6)
    assert len(full.evaluations) == 6
    many: list[dict[str, Any]] = [{"max_denoiser_calls": 30}, {"max_seconds": 1.5}]
    for limits in many:
        fresh = run_search(Scripted(*batches), Counting(), **limits)
        evaluate = Counting()
        assert run_search(Scripted(*batches), evaluate, store=open_store(journal), **limits) == fresh
        assert evaluate.calls == []


def test_a_higher_limit_goes_on_where_the_store_ends(journal: Path) -> None:
    batches = [[1, 2], [3, 4, 5], [6]]
    run_search(Scripted(*batches), Counting(), store=open_store(journal), max_evals=3)
    evaluate = Counting()
    result = run_search(Scripted(*batches), evaluate, store=open_store(journal), max_evals=6)
    assert evaluate.calls == [[4, 5], [6]]
    assert result == run_search(Scripted(*batches), Counting(), max_evals=6)


def test_what_the_store_knows_from_elsewhere_is_no_result_of_this_run(journal: Path) -> None:
    store = open_store(journal)
    run_search(Scripted([100]), Counting(), store=store, max_evals=1)
    result = run_search(Scripted([1, 2]), Counting(), store=store, max_evals=9)
    assert positions(result) == [1, 2]


def test_nan_is_a_failure_with_a_warning(journal: Path) -> None:
    strategy = Scripted([1, 2])
    with pytest.warns(RuntimeWarning, match="NaN"):
        result = run_search(strategy, Counting({2: math.nan}), store=open_store(journal), max_evals=9)
    assert strategy.told == [[1.0, -math.inf]]
    assert result.best.fitness == 1.0
    assert open_store(journal).evaluations()[1].fitness == -math.inf


def test_all_failed_is_an_error_but_stored(journal: Path) -> None:
    failing = Counting({1: -math.inf, 2: -math.inf})
    with pytest.raises(DiffesError, match="all 2 evaluations failed"):
        run_search(Scripted([1], [2]), failing, store=open_store(journal), max_evals=9)
    assert len(open_store(journal)) == 2
    with pytest.raises(DiffesError, match="asked for no schedule"):
        run_search(Scripted(), Counting(), max_evals=9)


def test_an_interrupt_keeps_what_is_finished(journal: Path) -> None:
    evaluate = Counting()

    def interrupted(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        if evaluate.calls:
            raise KeyboardInterrupt
        return evaluate(schedules)

    with pytest.raises(KeyboardInterrupt):
        run_search(Scripted([1, 2], [3]), interrupted, store=open_store(journal), max_evals=9)
    assert [e.fitness for e in open_store(journal).evaluations()] == [1.0, 2.0]


def test_what_an_evaluator_yields_is_stored_before_it_goes_on(journal: Path) -> None:
    def killed(schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        first, second, _ = Counting()(schedules)
        yield second  # any order will do
        yield first
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_search(Scripted([1, 2, 3]), killed, store=open_store(journal), max_evals=9)
    assert [e.fitness for e in open_store(journal).evaluations()] == [2.0, 1.0]
    rest = Counting()
    assert positions(run_search(Scripted([1, 2, 3]), rest, store=open_store(journal), max_evals=9)) == [1, 2, 3]
    assert rest.calls == [[3]]


def test_on_evaluation_sees_stored_evaluations_once_also_replayed_ones(journal: Path) -> None:
    for _ in range(2):
        store, seen = open_store(journal), list[float]()

        def note(evaluation: Evaluation, store: EvaluationStore = store, seen: list[float] = seen) -> None:
            assert store.get(evaluation.schedule) == evaluation
            seen.append(evaluation.fitness)

        run_search(Scripted([1, 2], [2, 3]), Counting(), store=store, on_evaluation=note, max_evals=9)
        assert seen == [1.0, 2.0, 3.0]


def test_an_evaluator_that_breaks_its_contract_is_refused() -> None:
    def too_few(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        return Counting()(schedules)[:-1]

    def twice(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        return Counting()(schedules)[:1] * 2

    def foreign(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        return [replace(e, schedule=SPACE.schedule(FEASIBLE[50])) for e in Counting()(schedules)]

    for evaluate in (too_few, twice, foreign):
        with pytest.raises(DiffesError, match="one Evaluation per schedule"):
            run_search(Scripted([1, 2]), evaluate, max_evals=9)


@pytest.mark.parametrize("fidelity", [0.1, 0.2, 0.3, 1 / 3, 0.4])
def test_fractions_of_evaluations_add_up(fidelity: float) -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(6), 6, 0.5)

    def evaluate(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        return [Evaluation(s, float(s.levels[0]), 1, 1.0, fidelity) for s in schedules]

    for limit in range(10, 60):
        strategy = EvoPress(space, seed=0, fidelities=(fidelity, 1.0))
        spent = sum(e.fidelity for e in run_search(strategy, evaluate, max_evals=limit).evaluations)
        assert limit - 1e-6 < spent < limit + 1
