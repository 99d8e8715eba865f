"""What a search measured: each schedule once, in the order asked, with the statistics of each generation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from diffes.errors import DiffesError
from diffes.spaces.genome import Origin
from diffes.spaces.ledger import LOGGED, Ledger, SearchResult, diversity
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import Evaluation, Evaluator, Proposal

STAGES = Stages.equal(3)
SPACE = SearchSpace.mean_sparsity(STAGES, 4, 0.5)
Levels = tuple[int, ...]
A: Levels = (2, 2, 2)
B: Levels = (1, 2, 3)
C: Levels = (3, 2, 1)
D: Levels = (4, 2, 0)
DEAR: Levels = (0, 0, 0)
CHEAP: Levels = (4, 4, 4)


def ask(*genomes: Sequence[int], fidelity: float = 1.0) -> list[Proposal]:
    return [Proposal(SPACE.any_schedule(levels), fidelity, Origin("test")) for levels in genomes]


class Table:
    """Scores from a table, 0 where there is none; 10 denoiser calls a whole evaluation; notes what it was given."""

    def __init__(self, scores: dict[Levels, float] | None = None, *, backwards: bool = False) -> None:
        self.scores = scores or {}
        self.backwards = backwards
        self.calls: list[tuple[list[Levels], float]] = []

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterable[Evaluation]:
        self.calls.append(([schedule.levels for schedule in schedules], fidelity))
        for schedule in reversed(schedules) if self.backwards else schedules:
            fitness = self.scores.get(schedule.levels, 0.0)
            yield Evaluation(schedule, fitness, round(10 * fidelity), 0.5, fidelity)


def filled(scores: dict[Levels, float], *batches: list[Proposal]) -> Ledger:
    """A ledger that measured and logged these batches."""
    ledger = Ledger(SPACE, Table(scores))
    for batch in batches:
        for _ in ledger.measure([proposal for proposal in batch if proposal not in ledger]):
            pass
        ledger.log(batch)
    return ledger


def asked(result: SearchResult) -> list[Levels]:
    return [evaluation.schedule.levels for evaluation in result.evaluations]


def test_what_was_measured_is_known_as_soon_as_it_is_given() -> None:
    ledger = Ledger(SPACE, Table({A: 1.0, B: 2.0}))
    a, b = ask(A, B)
    measuring = ledger.measure([a, b])
    assert a not in ledger
    assert next(measuring).fitness == 1.0
    assert a in ledger and ledger[a].fitness == 1.0 and b not in ledger
    assert [evaluation.fitness for evaluation in measuring] == [2.0]
    assert b in ledger


def test_the_same_schedule_at_another_fidelity_is_another_measurement() -> None:
    evaluate = Table()
    ledger = Ledger(SPACE, evaluate)
    batch = [*ask(A, B, fidelity=0.5), *ask(A), *ask(C, fidelity=0.5)]
    assert [e.fidelity for e in ledger.measure(batch)] == [0.5, 0.5, 1.0, 0.5]
    assert evaluate.calls == [([A, B], 0.5), ([A], 1.0), ([C], 0.5)]
    assert ask(B)[0] not in ledger and ask(B, fidelity=0.5)[0] in ledger
    assert ledger.result().denoiser_calls == 25


def test_fidelity_is_passed_only_when_it_is_below_one() -> None:
    class Whole:
        """An evaluator that knows nothing of fidelities."""

        def __call__(self, schedules: Sequence[Schedule]) -> list[Evaluation]:
            return [Evaluation(schedule, 0.0, 1, 1.0) for schedule in schedules]

    whole: Evaluator = Whole()  # type: ignore[assignment]
    assert len(list(Ledger(SPACE, whole).measure(ask(A, B)))) == 2
    with pytest.raises(TypeError):
        list(Ledger(SPACE, whole).measure(ask(A, fidelity=0.5)))


def test_arrange_puts_the_latest_into_the_order_of_the_batch() -> None:
    ledger = Ledger(SPACE, Table(backwards=True))
    list(ledger.measure(ask(A)))
    batch = ask(B, C, D)
    assert [e.schedule.levels for e in ledger.measure(batch)] == [D, C, B]
    assert asked(ledger.result()) == [A, D, C, B]
    ledger.arrange(batch)
    assert asked(ledger.result()) == [A, B, C, D]


def test_arrange_leaves_out_what_was_not_measured() -> None:
    ledger = Ledger(SPACE, Table(backwards=True))
    list(ledger.measure(ask(B, D)))
    ledger.arrange(ask(B, C, D))
    assert asked(ledger.result()) == [B, D]
    assert ask(C)[0] not in ledger


def test_the_store_is_asked_first_and_takes_what_is_new(tmp_path: Path) -> None:
    store = EvaluationStore(tmp_path / "journal", SPACE)
    list(Ledger(SPACE, Table({C: 3.0}), store).measure(ask(C)))
    evaluate, seen = Table({A: 1.0}), list[float]()
    ledger = Ledger(SPACE, evaluate, store, lambda evaluation: seen.append(evaluation.fitness))
    assert [e.schedule.levels for e in ledger.measure(ask(A, C))] == [C, A]
    assert evaluate.calls == [([A], 1.0)]
    assert seen == [3.0, 1.0]
    assert [e.fitness for e in store.evaluations()] == [3.0, 1.0]


def test_an_evaluator_that_shares_work_is_told_the_whole_batch_with_what_the_store_knows(tmp_path: Path) -> None:
    class Expecting(Table):
        def __init__(self) -> None:
            super().__init__()
            self.expected: list[tuple[list[Levels], float, dict[Levels, int]]] = []

        def expect(self, schedules: Sequence[Schedule], fidelity: float, paid: Mapping[Schedule, int]) -> None:
            calls = {schedule.levels: n for schedule, n in paid.items()}
            self.expected.append(([schedule.levels for schedule in schedules], fidelity, calls))

    store = EvaluationStore(tmp_path / "journal", SPACE)
    list(Ledger(SPACE, Table(), store).measure(ask(B, A)))
    evaluate = Expecting()
    list(Ledger(SPACE, evaluate, store).measure(ask(A, B, C)))
    assert evaluate.expected == [([A, B, C], 1.0, {B: 10, A: 10})]


def test_the_result_is_the_first_best_within_the_budget_on_all_probes() -> None:
    scores = {A: 1.0, B: 3.0, C: 3.0, D: 9.0, DEAR: 9.0, CHEAP: 2.0}
    result = filled(scores, ask(A, B), ask(C, DEAR, CHEAP), ask(D, fidelity=0.5)).result()
    assert result.best.schedule.levels == B
    assert asked(result) == [A, B, C, DEAR, CHEAP, D]
    assert result.eligible == (True, True, True, False, True, False)
    assert result.curve() == [1.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert result.calls() == [10, 20, 30, 40, 50, 55]
    assert (result.denoiser_calls, result.seconds) == (55, 3.0)


def test_the_curve_begins_below_everything() -> None:
    result = filled({DEAR: 9.0, B: -math.inf, A: -1.0}, ask(DEAR, B, A)).result()
    assert result.curve() == [-math.inf, -math.inf, -1.0]


def test_the_front_is_what_nothing_else_dominates() -> None:
    """Costs are 12 less the levels: CHEAP 0, A and B 6, (1, 1, 1) 9 for no more than B, DEAR 12."""
    middle: Levels = (1, 1, 1)
    failed: Levels = (4, 4, 3)
    scores = {CHEAP: 1.0, A: 3.0, B: 4.0, middle: 4.0, DEAR: 5.0, failed: -math.inf}
    result = filled(scores, ask(DEAR, A, middle, B, CHEAP, failed), ask(D, fidelity=0.5)).result()
    assert [e.schedule.levels for e in result.front(SPACE)] == [CHEAP, B, DEAR]
    assert [e.fitness for e in result.front(SPACE)] == [1.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("scores", "batch", "message"),
    [
        ({}, [], "asked for no schedule"),
        ({}, ask(DEAR), "none of its 1 evaluations was on all probes and within the budget"),
        ({}, ask(A, fidelity=0.5), "none of its 1 evaluations was on all probes and within the budget"),
        ({A: -math.inf, B: -math.inf}, ask(A, B, DEAR), "all 2 evaluations failed"),
    ],
)
def test_no_result_says_why(scores: dict[Levels, float], batch: list[Proposal], message: str) -> None:
    ledger = filled(scores, batch)
    with pytest.raises(DiffesError, match=message):
        ledger.result()


def test_the_logbook_has_a_line_a_generation() -> None:
    """Worked out by hand; A, B and C differ in their first and last stages, and agree in the middle."""
    scores = {A: 1.0, B: 3.0, C: 8.0, D: -math.inf, DEAR: 99.0}
    logbook = filled(scores, ask(A, B, C), ask(C, D, DEAR), ask(D), ask(B, A)).result().logbook
    assert logbook.header == list(LOGGED) and len(logbook) == 4
    assert [set(line) for line in logbook] == [set(LOGGED)] * 4
    assert logbook.select("generation") == [0, 1, 2, 3]
    assert logbook.select("evaluations") == [3, 5, 5, 5]
    assert logbook.select("denoiser_calls") == [30, 50, 50, 50]
    assert logbook.select("best") == [8.0, 8.0, 8.0, 8.0]
    assert logbook.select("mean") == [4.0, 53.5, None, 2.0]
    assert logbook.select("spread") == pytest.approx([math.sqrt(26 / 3), 45.5, None, 1.0])
    # C (3, 2, 1), D (4, 2, 0) and DEAR (0, 0, 0): 3 + 2 + 2 of 9
    assert logbook.select("diversity") == pytest.approx([2 / 3, 7 / 9, 0.0, 2 / 3])


def test_the_best_of_the_logbook_is_eligible_or_none() -> None:
    scores = {DEAR: 9.0, A: -math.inf, B: 2.0, C: 1.0}
    logbook = filled(scores, ask(DEAR), ask(A), ask(D, fidelity=0.5), ask(B), ask(C)).result().logbook
    assert logbook.select("best") == [None, None, None, 2.0, 2.0]
    assert logbook.select("denoiser_calls") == [10, 20, 25, 35, 45]


def test_the_logbook_leaves_out_what_was_cut() -> None:
    ledger = Ledger(SPACE, Table({A: 1.0, B: 3.0}))
    list(ledger.measure(ask(A, B)))
    ledger.log(ask(A, B, C))
    (line,) = ledger.result().logbook
    assert (line["evaluations"], line["mean"], line["spread"]) == (2, 2.0, 1.0)
    assert line["diversity"] == pytest.approx(2 / 3)


def test_the_logbook_is_kept_in_the_store(tmp_path: Path) -> None:
    store = EvaluationStore(tmp_path / "journal", SPACE)
    ledger = Ledger(SPACE, Table({A: 1.0, B: -math.inf}), store)
    for batch in (ask(A), ask(B)):
        list(ledger.measure(batch))
        ledger.log(batch)
    assert store.logbook() == list(ledger.result().logbook)
    assert EvaluationStore(tmp_path / "journal", SPACE).logbook() == list(ledger.result().logbook)


def test_diversity_is_the_share_of_visited_stages_in_which_two_differ() -> None:
    """By hand: of three pairs, two differ in stage 0, two in stage 1, none in stage 3; nobody visits stage 2."""
    space = SearchSpace.mean_sparsity(Stages.equal(4), 4, 0.5, (2, 1, 0, 5))
    genomes = [(1, 2, 0, 3), (1, 0, 4, 3), (0, 2, 2, 3)]
    assert diversity(genomes, space) == pytest.approx((2 + 2 + 0) / 3 / 3)
    assert diversity(genomes[:2], space) == pytest.approx(1 / 3)
    assert diversity(genomes[::2], space) == pytest.approx(1 / 3)
    assert diversity(genomes[1:], space) == pytest.approx(2 / 3)


def test_diversity_of_extremes() -> None:
    assert diversity([], SPACE) == diversity([A], SPACE) == diversity([A, A, A], SPACE) == 0.0
    assert diversity([(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)], SPACE) == 1.0


def test_an_evaluation_of_another_fidelity_is_refused() -> None:
    def elsewhere(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        return [replace(evaluation, fidelity=0.25) for evaluation in Table()(schedules, fidelity)]

    with pytest.raises(DiffesError, match=r"at the fidelity 0.5. It returned .* at the fidelity 0.25"):
        list(Ledger(SPACE, elsewhere).measure(ask(A, fidelity=0.5)))
