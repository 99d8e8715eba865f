"""run_search: what is paid for, when it ends, and that a run over its store is the same run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from diffes.errors import DiffesError
from diffes.schedule import Schedule, StagePlan
from diffes.search import MAX_IDLE_BATCHES, SearchResult, run_search
from diffes.space import SearchSpace
from diffes.store import EvaluationStore
from diffes.strategy import Evaluation, Strategy
from search_strategies.evopress import EvoPress

SPACE = SearchSpace.mean_sparsity(StagePlan.equal(4), 8, 0.5)
FEASIBLE = [list(levels) for levels in itertools.product(range(9), repeat=4) if sum(levels) == 16]


class Scripted(Strategy):
    """Asks for given batches, by position in FEASIBLE; repeats the last for ever if told to."""

    def __init__(self, *batches: Sequence[int], forever: bool = False) -> None:
        super().__init__(SPACE, seed=0)
        self.batches = list(batches)
        self.forever = forever
        self.told: list[list[float]] = []

    def _ask(self) -> list[list[int]]:
        if not self.batches:
            return []
        batch = self.batches[0] if self.forever and len(self.batches) == 1 else self.batches.pop(0)
        return [FEASIBLE[i] for i in batch]

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        self.told.append([evaluation.fitness for evaluation in evaluations])


class Counting:
    """Scores a schedule by its position in FEASIBLE, 10 denoiser calls and half a second each; notes its calls."""

    def __init__(self, scores: dict[int, float] | None = None) -> None:
        self.scores = scores or {}
        self.calls: list[list[int]] = []

    def __call__(self, schedules: Sequence[Schedule]) -> list[Evaluation]:
        positions = [FEASIBLE.index(list(schedule.levels)) for schedule in schedules]
        self.calls.append(positions)
        return [
            Evaluation(schedule, self.scores.get(i, float(i)), denoiser_calls=10, seconds=0.5)
            for schedule, i in zip(schedules, positions, strict=True)
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


def test_an_evaluator_that_keeps_no_time_is_timed() -> None:
    def untimed(schedules: Sequence[Schedule]) -> list[Evaluation]:
        return [Evaluation(schedule, 1.0) for schedule in schedules]

    result = run_search(Scripted([1, 2]), untimed, max_evals=5)
    assert all(evaluation.seconds > 0 for evaluation in result.evaluations)
    assert result.seconds == pytest.approx(sum(evaluation.seconds for evaluation in result.evaluations))


def test_stops_when_nothing_new_comes() -> None:
    strategy = Scripted([1, 2], [1, 2], [3], [2, 1], forever=True)
    result = run_search(strategy, Counting(), max_evals=100)
    assert positions(result) == [1, 2, 3]
    assert len(strategy.told) == 3 + MAX_IDLE_BATCHES


@pytest.mark.parametrize("limits", [{}, {"max_evals": 0}, {"max_denoiser_calls": -1}, {"max_seconds": math.nan}])
def test_a_limit_is_needed(limits: dict[str, int]) -> None:
    with pytest.raises(DiffesError, match=r"needs a limit|must be above 0"):
        run_search(Scripted([1]), Counting(), **limits)  # type: ignore[arg-type]


def test_replay_ends_identically_and_pays_nothing(journal: Path) -> None:
    batches, limits = [[1, 2], [2, 3], [9, 4, 5], [6]], {"max_evals": 5}
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
    for limits in ({"max_denoiser_calls": 30}, {"max_seconds": 1.5}):
        fresh = run_search(Scripted(*batches), Counting(), **limits)  # type: ignore[arg-type]
        evaluate = Counting()
        assert run_search(Scripted(*batches), evaluate, store=open_store(journal), **limits) == fresh  # type: ignore[arg-type]
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
    with pytest.raises(DiffesError, match="no schedule at all"):
        run_search(Scripted(), Counting(), max_evals=9)


def test_an_interrupt_keeps_what_is_finished(journal: Path) -> None:
    evaluate = Counting()

    def interrupted(schedules: Sequence[Schedule]) -> list[Evaluation]:
        if evaluate.calls:
            raise KeyboardInterrupt
        return evaluate(schedules)

    with pytest.raises(KeyboardInterrupt):
        run_search(Scripted([1, 2], [3]), interrupted, store=open_store(journal), max_evals=9)
    assert [e.fitness for e in open_store(journal).evaluations()] == [1.0, 2.0]


def test_what_an_evaluator_yields_is_stored_before_it_goes_on(journal: Path) -> None:
    def killed(schedules: Sequence[Schedule]) -> Iterator[Evaluation]:
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
        store, seen = open_store(journal), []

        def note(evaluation: Evaluation, store: EvaluationStore = store, seen: list[float] = seen) -> None:
            assert store.get(evaluation.schedule) == evaluation
            seen.append(evaluation.fitness)

        run_search(Scripted([1, 2], [2, 3]), Counting(), store=store, on_evaluation=note, max_evals=9)
        assert seen == [1.0, 2.0, 3.0]


def test_an_evaluator_that_breaks_its_contract_is_refused() -> None:
    def too_few(schedules: Sequence[Schedule]) -> list[Evaluation]:
        return Counting()(schedules)[:-1]

    def twice(schedules: Sequence[Schedule]) -> list[Evaluation]:
        return Counting()(schedules)[:1] * 2

    def foreign(schedules: Sequence[Schedule]) -> list[Evaluation]:
        return [replace(e, schedule=SPACE.schedule(FEASIBLE[50])) for e in Counting()(schedules)]

    for evaluate in (too_few, twice, foreign):
        with pytest.raises(DiffesError, match="one Evaluation per schedule"):
            run_search(Scripted([1, 2]), evaluate, max_evals=9)


@pytest.mark.parametrize("fidelity", [0.1, 0.2, 0.3, 1 / 3, 0.4])
def test_fractions_of_evaluations_add_up(fidelity: float) -> None:
    space = SearchSpace.mean_sparsity(StagePlan.equal(6), 6, 0.5)

    def evaluate(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        return [Evaluation(s, float(s.levels[0]), 1, 1.0, fidelity) for s in schedules]

    for limit in range(10, 60):
        strategy = EvoPress(space, seed=0, fidelities=(fidelity, 1.0))
        spent = sum(e.fidelity for e in run_search(strategy, evaluate, max_evals=limit).evaluations)
        assert limit - 1e-6 < spent < limit + 1
