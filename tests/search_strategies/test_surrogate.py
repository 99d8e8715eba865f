"""The parts of our own search: the exact optimum under a budget, and a model that learns what pairs of stages do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.stats import spearmanr

from diffes.schedule import StagePlan
from diffes.space import SearchSpace
from search_strategies import surrogate
from search_strategies.exhaustive import feasible

PLAN = StagePlan.equal(4)
SPACES = {
    "equal": SearchSpace.mean_sparsity(PLAN, 4, 0.5),
    "unequal steps": SearchSpace.mean_sparsity(PLAN, 4, 0.4, (3, 1, 2, 0)),
    "curved costs": SearchSpace.dense_fraction(PLAN, (2, 1, 1, 3), [[9.0, 8.0, 5.0, 4.5, 1.0]] * 4, 0.6),
    "no budget": SearchSpace.mean_sparsity(PLAN, 3, 0.5).without_budget(),
}


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
    kernel = surrogate._Kernel.prior(5).fitted(levels[:80], scores[:80])
    mean, deviation = surrogate._Model(kernel, levels[:80], scores[:80]).predict(levels[80:])
    assert spearmanr(mean, scores[80:]).statistic > 0.95
    assert (np.abs(mean - scores[80:]) < 4 * deviation + 0.1).mean() > 0.9
    again, _ = surrogate._Model(kernel, levels[:80], scores[:80]).predict(levels[:80])
    assert np.abs(again - scores[:80]).max() < 0.2


def test_the_gradient_of_the_fit_is_that_of_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    losses = []
    minimize = surrogate.minimize
    monkeypatch.setattr(
        surrogate, "minimize", lambda loss, start, **rest: (losses.append(loss), minimize(loss, start, **rest))[1]
    )
    surrogate._Kernel.prior(3).fitted(rng.random((20, 3)), rng.standard_normal(20))
    at = surrogate._Kernel.prior(3).parameters + rng.normal(0, 0.3, 8)
    error = check_grad(lambda p: losses[0](p)[0], lambda p: losses[0](p)[1], at)
    assert error < 1e-3 * np.linalg.norm(losses[0](at)[1])
