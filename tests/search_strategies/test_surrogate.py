"""Our own search: the exact optimum under a budget, a model of pairs of stages, and what it asks for next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import check_grad, minimize
from scipy.stats import rankdata, spearmanr

from diffes.errors import DiffesError
from diffes.spaces.genome import Origin
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal
from diffes.testing import SPACES as CONFORMANCE_SPACES
from diffes.testing import StrategyConformance, evaluate, separable
from search_strategies import gaussian_process, surrogate
from search_strategies.exhaustive import feasible
from search_strategies.gaussian_process import Floats
from search_strategies.random_search import RandomSearch
from search_strategies.surrogate import Surrogate

FOUR = Stages.equal(4)
SPACES = {
    "equal": SearchSpace.mean_sparsity(FOUR, 4, 0.5),
    "unequal steps": SearchSpace.mean_sparsity(FOUR, 4, 0.4, (3, 1, 2, 0)),
    "curved costs": SearchSpace.dense_fraction(FOUR, (2, 1, 1, 3), [[9.0, 8.0, 5.0, 4.5, 1.0]] * 4, 0.6),
    "no budget": SearchSpace.mean_sparsity(FOUR, 3, 0.5).without_budget(),
}
PAPER = CONFORMANCE_SPACES["paper"]
Levels = tuple[int, ...]


class TestConformance(StrategyConformance):
    name = "surrogate"
    evaluations = 60


@pytest.mark.parametrize("name", SPACES)
def test_solve_finds_what_exhaustive_search_finds(name: str) -> None:
    space = SPACES[name]
    for seed in range(20):
        table = -np.cumsum(np.random.default_rng(seed).random((4, space.max_level + 1)), axis=1)  # thinner is worse
        found = surrogate.solve(space, table)
        worth = [sum(table[s, k] for s, k in enumerate(levels) if space.steps[s]) for levels in feasible(space)]
        assert space.fits(found)
        assert sum(table[s, k] for s, k in enumerate(found) if space.steps[s]) == pytest.approx(max(worth))


def test_the_model_learns_what_pairs_of_stages_do() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 9, (200, 5)) / 8
    scores = -(levels[:, 0] ** 2) - 3 * levels[:, 1] * levels[:, 3]
    scores = (scores - scores.mean()) / scores.std()
    kernel = gaussian_process.Kernel.prior(5).fitted(levels[:80], scores[:80])
    mean, deviation = gaussian_process.Model(kernel, levels[:80], scores[:80]).predict(levels[80:])
    assert spearmanr(mean, scores[80:]).statistic > 0.95
    assert (np.abs(mean - scores[80:]) < 4 * deviation + 0.1).mean() > 0.9
    again, _ = gaussian_process.Model(kernel, levels[:80], scores[:80]).predict(levels[:80])
    assert np.abs(again - scores[:80]).max() < 0.2


def test_the_gradient_of_the_fit_is_that_of_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    losses: list[Callable[[Floats], tuple[float, Floats]]] = []

    def noting(loss: Callable[[Floats], tuple[float, Floats]], start: Floats, **rest: Any) -> Any:
        losses.append(loss)
        return minimize(loss, start, **rest)

    monkeypatch.setattr(gaussian_process, "minimize", noting)
    gaussian_process.Kernel.prior(3).fitted(rng.random((20, 3)), rng.standard_normal(20))
    at = gaussian_process.Kernel.prior(3).parameters + rng.normal(0, 0.3, 8)
    (loss,) = losses

    def value(parameters: Floats) -> float:
        return loss(parameters)[0]

    def gradient(parameters: Floats) -> Floats:
        return loss(parameters)[1]

    assert check_grad(value, gradient, at) < 1e-3 * np.linalg.norm(gradient(at))


def on_a_grid(n: int) -> tuple[gaussian_process.Kernel, Floats]:
    """A kernel over 4 features of 9 values, and n schedules."""
    rng = np.random.default_rng(n)
    kernel = gaussian_process.Kernel.prior(4, np.arange(9) / 8)
    return replace(kernel, parameters=kernel.parameters + rng.normal(0, 0.3, 10)), rng.integers(0, 9, (n, 4)) / 8


def test_covariances_that_are_looked_up_are_those_that_are_computed() -> None:
    kernel, levels = on_a_grid(30)
    anywhere = replace(kernel, grid=None)
    alone = kernel.alone(levels[:20], levels[20:])
    pairs = sum(alone[..., i] * alone[..., j] for i, j in itertools.combinations(range(4), 2))
    expected = alone.sum(-1) + kernel.pairs * pairs
    for each in (kernel, anywhere):
        np.testing.assert_allclose(each(levels[:20], levels[20:]), expected, rtol=1e-12)
    assert np.diag(kernel(levels, levels)) == pytest.approx(kernel.variance)


def test_the_fit_is_the_same_on_a_grid_and_off_it() -> None:
    kernel, levels = on_a_grid(30)
    scores = np.random.default_rng(0).standard_normal(30)
    values, gradients = zip(
        *(gaussian_process._Likelihood(levels, scores, grid)(kernel) for grid in (kernel.grid, None)), strict=True
    )
    assert values[0] == pytest.approx(values[1])
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_a_believed_score_needs_no_new_factor() -> None:
    kernel, levels = on_a_grid(30)
    scores = np.random.default_rng(0).standard_normal(21)
    believed = gaussian_process.Model(kernel, levels[:20], scores[:20]).believing(levels[20:21], float(scores[20]))
    whole = gaussian_process.Model(kernel, levels[:21], scores)
    for ours, expected in zip(believed.predict(levels[21:]), whole.predict(levels[21:]), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize("name", SPACES)
def test_neighbours_are_one_level_moved_and_repaired_where_that_is_not_feasible(name: str) -> None:
    space = SPACES[name]
    view, rng = surrogate.StageView(space), np.random.default_rng(0)
    genomes = np.array([list(levels) for levels in itertools.product(range(space.max_level + 1), repeat=4)])
    genomes = genomes[(genomes[:, [s for s in range(4) if s not in space.visited]] == 0).all(1)]
    assert view._feasible(genomes).tolist() == [space.is_feasible(genome) for genome in genomes.tolist()]
    here = tuple(space.sample(rng))
    near = view.neighbours(here, rng)
    assert near and here not in near and len(set(near)) == len(near) and all(map(space.is_feasible, near))
    moved = [
        tuple(level - (s == i) + (s == j) for s, level in enumerate(here))
        for i, j in itertools.permutations(space.visited, 2)
        if here[i] > 0 and here[j] < space.max_level
    ]
    assert {each for each in moved if space.is_feasible(each)} - {here} <= set(near)


def test_ranks_are_those_of_scipy() -> None:
    fitness = [0.5, -math.inf, 0.25, 0.5, -math.inf, 3.0]
    assert surrogate.ranks_of(fitness).tolist() == rankdata(fitness).tolist()


def test_the_model_is_fitted_again_once_there_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []

    def fitted(kernel: gaussian_process.Kernel, levels: Floats, _: Floats) -> gaussian_process.Kernel:
        fits.append(len(levels))
        return kernel

    monkeypatch.setattr(gaussian_process.Kernel, "fitted", fitted)
    monkeypatch.setattr(surrogate, "NEWS", 0.5)
    run_search(Surrogate(PAPER, seed=0), evaluate, max_evals=40)
    assert fits == [8, 12, 20, 32]


def test_believing_is_as_good_as_measuring() -> None:
    rng = np.random.default_rng(0)
    levels, scores = rng.random((12, 3)), rng.standard_normal(12)
    levels[11], scores[11] = 1.5, 1.5  # far from the others
    kernel = gaussian_process.Kernel.prior(3)
    model = gaussian_process.Model(kernel, levels[:11], scores[:11])
    before, doubt = model.predict(levels[11:])
    after, left = model.believing(levels[11:], float(scores[11])).predict(levels[11:])
    assert left[0] < doubt[0] / 2
    assert abs(after[0] - 1.5) < 0.1 < abs(before[0] - 1.5)
    whole, _ = gaussian_process.Model(kernel, levels, scores).predict(levels)
    assert whole[11] == pytest.approx(after[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"initial": 1}, "initial must be at least 2, got 1"), ({"batch": 0}, "batch must be at least 1, got 0")],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        Surrogate(PAPER, seed=0, **options)


class Belief(gaussian_process.Model):
    """A model that believes what it is told, whatever was measured: functions of sparsities (m, V)."""

    def __init__(self, n: int, mean: Callable[[Floats], Floats], deviation: Callable[[Floats], Floats]) -> None:
        super().__init__(gaussian_process.Kernel.prior(n), np.zeros((1, n)), np.zeros(1))
        self.mean, self.deviation = mean, deviation
        self.believed: list[tuple[list[float], float]] = []

    def predict(self, levels: Floats) -> tuple[Floats, Floats]:
        return self.mean(levels), self.deviation(levels)

    def believing(self, levels: Floats, score: float) -> gaussian_process.Model:
        self.believed += [(row.tolist(), score) for row in levels]
        return self


def nothing(levels: Floats) -> Floats:
    return np.zeros(len(levels))


def first_stage(levels: Floats) -> Floats:
    """The sparsity of stage 0."""
    return levels[:, 0]


SQUARE = SearchSpace.mean_sparsity(Stages.equal(4), 4, 0.5)


def promising(
    monkeypatch: pytest.MonkeyPatch,
    model: Belief,
    passed: Sequence[Levels],
    known: Sequence[Levels] = (),
    batch: int = 4,
) -> list[Levels]:
    """What is asked for in `SQUARE` where a climb passes these genomes in this order."""
    strategy = Surrogate(SQUARE, seed=0, batch=batch)
    strategy._tell([Evaluation(SQUARE.schedule(levels), 0.0) for levels in known])
    monkeypatch.setattr(strategy, "_climb", lambda *_: {levels: Origin("climb") for levels in passed})
    return [proposal.schedule.levels for proposal in strategy._promising(model, list(known))]


LADDER: list[Levels] = [(2, 0, 2, 4), (0, 2, 2, 4), (4, 0, 2, 2), (1, 1, 2, 4), (3, 0, 1, 4)]


def test_the_highest_mean_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = promising(monkeypatch, Belief(4, first_stage, nothing), LADDER)
    assert [levels[0] for levels in asked] == [4, 3, 2, 1]


def test_what_was_chosen_is_believed_for_the_rest_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Belief(4, first_stage, nothing)
    asked = promising(monkeypatch, model, LADDER)
    assert model.believed == [([level / 4 for level in levels], levels[0] / 4) for levels in asked]


def test_the_curious_ask_for_what_they_know_least_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a batch is not curious and takes the first of equals; the others take the largest deviation."""
    asked = promising(monkeypatch, Belief(4, nothing, first_stage), LADDER)
    assert [levels[0] for levels in asked] == [2, 4, 3, 1]


def test_curiosity_grows_within_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard deviations of 0, 0.5, 1 and 2 are added: what is thought worse by 0.7, 1.5 and 1.9 is asked in turn."""
    worse = {0.0: 0.0, 0.25: -0.7, 0.5: -1.5, 0.75: -1.9, 1.0: -9.0}

    def mean(levels: Floats) -> Floats:
        return np.array([worse[float(level)] for level in levels[:, 0]])

    def deviation(levels: Floats) -> Floats:
        return (levels[:, 0] > 0).astype(float)

    extra: list[Levels] = [*LADDER, (0, 4, 2, 2)]
    asked = promising(monkeypatch, Belief(4, mean, deviation), extra)
    assert [levels[0] for levels in asked] == [0, 0, 1, 2]
    assert [levels[0] for levels in promising(monkeypatch, Belief(4, mean, deviation), LADDER)] == [0, 1, 2, 3]


def test_of_equals_the_cheaper_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling begins in the last stage: what shares it with a measured schedule is measured from there on."""
    known: list[Levels] = [(2, 2, 2, 2)]
    passed: list[Levels] = [(2, 2, 1, 3), (1, 3, 2, 2), (2, 1, 3, 2), (3, 1, 2, 2)]
    asked = promising(monkeypatch, Belief(4, nothing, nothing), passed, known, batch=3)
    assert asked == [(1, 3, 2, 2), (3, 1, 2, 2), (2, 1, 3, 2)]


def test_thrift_is_worth_a_tenth_of_a_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dearer one costs half a run more: that is 0.05."""
    known: list[Levels] = [(2, 2, 2, 2)]
    passed: list[Levels] = [(0, 4, 2, 2), (4, 2, 1, 1)]
    for worth, expected in ((0.04, 0), (0.06, 1)):
        model = Belief(4, lambda levels, worth=worth: worth * levels[:, 0], nothing)  # type: ignore[misc]
        assert promising(monkeypatch, model, passed, known, batch=1) == [passed[expected]]


def test_what_a_schedule_costs_is_what_it_does_not_share() -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(4), 4, 0.5, (5, 1, 0, 4))
    strategy = Surrogate(space, seed=0)
    assert strategy._price([2, 2, 0, 2]) == 1.0
    strategy._tell([Evaluation(space.any_schedule([2, 2, 0, 2]), 0.0)])
    strategy._tell([Evaluation(space.any_schedule([0, 1, 0, 3]), 0.0)])
    assert strategy._price([2, 2, 0, 2]) == 0.0
    assert strategy._price([1, 2, 0, 2]) == 0.5
    assert strategy._price([2, 1, 0, 2]) == 0.6
    assert strategy._price([2, 2, 0, 1]) == 1.0
    assert strategy._price([0, 2, 0, 3]) == 0.6


def test_what_is_known_is_not_asked_and_the_batch_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = promising(monkeypatch, Belief(4, first_stage, nothing), LADDER, LADDER[:4])
    assert asked[0] == LADDER[4]
    assert len(set(asked)) == 4 and not set(asked) & set(LADDER[:4])
    assert all(map(SQUARE.is_feasible, asked))


def last_stage(levels: Floats) -> Floats:
    """The sparsity of stage 9."""
    return levels[:, -1]


@pytest.mark.parametrize(
    ("mean", "deviation", "curiosity"),
    [(last_stage, nothing, 0.0), (last_stage, nothing, 2.0), (nothing, last_stage, 2.0)],
    ids=["mean", "mean of the curious", "deviation"],
)
def test_a_climb_leads_to_what_is_believed_and_to_what_is_unknown(
    mean: Callable[[Floats], Floats],
    deviation: Callable[[Floats], Floats],
    curiosity: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From levels 0 and 2 of stage 9 to level 8, one level a move."""
    monkeypatch.setattr(surrogate, "STRANGERS", 0)
    uniform = tuple(PAPER.uniform())
    passed = Surrogate(PAPER, seed=0)._climb(Belief(10, mean, deviation), [uniform], curiosity)
    (optimum,) = [levels for levels, origin in passed.items() if origin.operator == "dynamic programming"]
    assert (uniform[-1], optimum[-1]) == (2, 0)
    assert {levels[-1] for levels in passed} == set(range(9))
    assert all(map(PAPER.is_feasible, passed))


def test_a_climb_that_is_not_curious_stays_where_it_is() -> None:
    """Nothing is believed, so no move is up: only the neighbours of the starts are passed."""
    uniform = tuple(PAPER.uniform())
    passed = Surrogate(PAPER, seed=0)._climb(Belief(10, nothing, first_stage), [uniform], 0.0)
    starts = [levels for levels, origin in passed.items() if origin.operator != "climb"]
    assert sorted({origin.operator for origin in passed.values()}) == ["climb", "dynamic programming", "random"]
    assert len(starts) == 3
    steps = {origin.parents for origin in passed.values() if origin.operator == "climb"}
    assert steps == {(levels,) for levels in [*starts, uniform]}


def test_a_step_of_a_climb_moves_one_level() -> None:
    strategy = Surrogate(SQUARE, seed=0)
    here: Levels = (0, 4, 3, 1)
    expected = set()
    for i, j in itertools.permutations(range(4), 2):
        moved = list(here)
        moved[i] -= 1
        moved[j] += 1
        if min(moved) >= 0 and max(moved) <= 4:
            expected.add(tuple(moved))
    near = strategy._view.neighbours(here, strategy._rng)
    assert set(near) == expected and len(near) == len(expected)
    uneven = Surrogate(SPACES["unequal steps"], seed=0)
    start = tuple(SPACES["unequal steps"].uniform())
    around = uneven._view.neighbours(start, uneven._rng)
    assert around and start not in around
    assert all(map(SPACES["unequal steps"].is_feasible, around))


def told(strategy: Surrogate, fitness: Callable[[int], float]) -> list[Proposal]:
    """The batch after a first population of the fitness given by position."""
    strategy.tell([Evaluation(p.schedule, fitness(i)) for i, p in enumerate(strategy.ask())])
    return strategy.ask()


@pytest.mark.parametrize("fitness", [lambda i: 1.0, lambda i: -math.inf, lambda i: 1.0 if i else -math.inf])
def test_where_nothing_can_be_learnt_it_asks_at_random(fitness: Callable[[int], float]) -> None:
    batch = told(Surrogate(PAPER, seed=0, batch=5), fitness)
    assert [proposal.origin for proposal in batch] == [Origin("random")] * 5


def test_proposals_of_the_model_say_where_a_climb_passed_them() -> None:
    batch = told(Surrogate(PAPER, seed=0), float)
    assert len(batch) == 4
    assert {proposal.origin.operator for proposal in batch if proposal.origin} <= {"climb", "dynamic programming"}
    assert all(proposal.origin is not None for proposal in batch)


@pytest.mark.slow
def test_it_needs_few_evaluations() -> None:
    """Of all that random search lacks to the optimum it lacks less than a tenth."""
    weights = np.linspace(10, 1, 10)  # those of the score
    levels = surrogate.solve(PAPER, -weights[:, None] * np.arange(9) ** 1.5)
    optimum = separable(PAPER.schedule(levels))
    for seed in range(2):
        found = run_search(Surrogate(PAPER, seed=seed), evaluate, max_evals=60).best.fitness
        by_chance = run_search(RandomSearch(PAPER, seed=seed), evaluate, max_evals=60).best.fitness
        assert by_chance < found <= optimum
        assert optimum - found < 0.1 * (optimum - by_chance)
