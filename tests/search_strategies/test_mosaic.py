"""MosaicDiff's heuristic: levels worked out by hand from profiles of the loss and the signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.genome import Origin
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import StageProfile, Strategy
from diffes.testing import PLANS, SPACES, StrategyConformance, answer
from search_strategies.mosaic import Mosaic, segments

FLAT = (0.0,) * 6
FALLING = (5.0, 4.0, 3.0, 2.0, 1.0, 0.0)  # a signal-to-noise ratio: highest in stage 0, the cleanest
STEEP_MIDDLE = (0.0, 0.0, 0.0, 2.0, 2.0, 2.0)  # gradient 0, 0, 1, 1, 0, 0


class TestConformance(StrategyConformance):
    name = "mosaic"
    plans = False
    searches = False
    random = False
    test_the_sequence_is_the_same_in_another_process = None  # type: ignore[assignment]  # a profile is no option

    def make(self, space: SearchSpace | None = None, seed: int = 0) -> Strategy:
        space = space or SPACES["small"]
        n = space.n_stages
        profile = StageProfile(tuple(1 / (i + 1) for i in range(n)), tuple(float(n - 2 * i) for i in range(n)))
        return Mosaic(space, seed=seed, profile=profile)


def levels(loss: Sequence[float], log_snr: Sequence[float], budget: float, **options: Any) -> tuple[int, ...]:
    """What it asks for in six stages of levels from 0 to 100, so that a level is a percentage."""
    space = SearchSpace.mean_sparsity(Stages.equal(6), 100, budget)
    strategy = Mosaic(space, seed=0, profile=StageProfile(tuple(loss), tuple(log_snr)), **options)
    (proposal,) = strategy.ask()
    return proposal.schedule.levels


def test_it_asks_once() -> None:
    strategy = Mosaic(SPACES["small"], seed=0, profile=StageProfile(STEEP_MIDDLE, FALLING))
    (proposal,) = batch = strategy.ask()
    assert proposal.origin == Origin("mosaic")
    strategy.tell(answer(batch))
    assert strategy.ask() == []


@pytest.mark.parametrize("sign", [1, -1])
def test_where_the_loss_changes_most_a_quarter_is_pruned_of_what_is_pruned_elsewhere(sign: int) -> None:
    """Four stages at x and two at x / 4 are 4.5 x: 75% of six stages are x = 100%, 60% are x = 80%."""
    loss = [sign * each for each in STEEP_MIDDLE]
    assert levels(loss, FLAT, 0.75) == (100, 100, 25, 25, 100, 100)
    assert levels(loss, FLAT, 0.6) == (80, 80, 20, 20, 80, 80)


def test_what_is_not_pruned_more_is_pruned_less_where_the_rest_is_pruned_whole() -> None:
    """90% of six stages are 540: four of them are full, and the other two share the rest."""
    assert levels(STEEP_MIDDLE, FLAT, 0.9) == (100, 100, 70, 70, 100, 100)


def test_without_a_slope_the_noise_decides_the_cleaner_are_pruned_less() -> None:
    """Scores are 1, 0.8, ... 0 times the weight: means 0.9, 0.5, 0.1; the middle counts as the highest, 0.9.

    Four stages at x / 4 and two at x are 3 x: half of six stages are x = 100%.
    """
    line = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)  # the same gradient everywhere
    for loss in (FLAT, line):
        assert levels(loss, FALLING, 0.5) == (25, 25, 25, 25, 100, 100)
        assert levels(loss, FALLING[::-1], 0.5) == (100, 100, 25, 25, 25, 25)
        assert levels(loss, FALLING, 0.5, weight=7.0) == (25, 25, 25, 25, 100, 100)


def test_without_anything_to_go_by_it_is_uniform() -> None:
    assert levels(FLAT, FALLING, 0.5, weight=0) == (50,) * 6
    assert levels(FLAT, FLAT, 0.5) == (50,) * 6


def test_the_noise_counts_as_much_as_its_weight() -> None:
    """Scores 0.1, 0.08, 1.06, 1.04, 0.02, 0 have means 0.09, 1.05, 0.01, so the first segment counts 0.08 / 1.04."""
    assert levels(STEEP_MIDDLE, FALLING, 0.6, weight=0) == (80, 80, 20, 20, 80, 80)
    shape = np.array([1 - 0.75 * 0.08 / 1.04] * 2 + [0.25] * 2 + [1] * 2)
    expected = 360 * shape / shape.sum()
    found = levels(STEEP_MIDDLE, FALLING, 0.6)
    assert np.abs(np.array(found) - expected).max() <= 1
    assert found == levels(STEEP_MIDDLE, FALLING, 0.6, weight=0.1)
    assert found[0] + found[1] <= found[4] + found[5] - 8
    heavy = levels(STEEP_MIDDLE, FALLING, 0.6, weight=0.5)
    assert heavy[0] + heavy[1] < found[0] + found[1]


def test_the_scale_of_a_profile_does_not_matter() -> None:
    loss, log_snr = [1000 * each + 7 for each in STEEP_MIDDLE], [each / 1000 - 3 for each in FALLING]
    assert levels(loss, log_snr, 0.6) == levels(STEEP_MIDDLE, FALLING, 0.6)


@pytest.mark.parametrize(
    ("score", "importance"),
    [
        ([0, 0, 5, 5, 5, 1], [0, 0, 1, 1, 1, 0.2]),
        ([3, 3, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]),  # the middle is the lowest, and counts as the highest
        ([0, 0, 1, 1, 4, 4], [0, 0, 1, 1, 1, 1]),
        ([2, 2, 0, 0, 2, 2], [0, 0, 0, 0, 0, 0]),  # then all three are alike
        ([0, 9, 9, 9, 9, 3], [0, 1, 1, 1, 1, 1 / 3]),
        ([1, 2, 5], [0, 1, 1]),
        ([7, 7, 7, 7], [0, 0, 0, 0]),
        ([1, 3], [0, 1]),
        ([3, 1], [1, 0]),
        ([4], [0]),
    ],
)
def test_segments(score: list[float], importance: list[float]) -> None:
    assert segments(np.array(score, dtype=float)) == pytest.approx(importance)


def test_the_edges_leave_the_least_variance_inside() -> None:
    """The means are those of the segments: (1, 2), (8, 9, 10), (4)."""
    assert segments(np.array([1.0, 2.0, 8.0, 9.0, 10.0, 4.0])) == pytest.approx([0, 0, 1, 1, 1, 2.5 / 7.5])


def test_an_unvisited_stage_stays_dense_and_the_budget_is_met() -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(6), 100, 0.6, (2, 1, 1, 0, 3, 1))
    strategy = Mosaic(space, seed=0, profile=StageProfile(STEEP_MIDDLE, FALLING))
    (proposal,) = strategy.ask()
    assert space.is_feasible(proposal.schedule.levels) and proposal.schedule.levels[3] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "mosaic needs a profile with one entry for each of the 6 stages, got None"),
        ({"profile": StageProfile((1.0,), (1.0,))}, "mosaic needs a profile with one entry for each of the 6 stages"),
        ({"profile": StageProfile(FLAT, FLAT), "weight": -1}, "weight must be at least 0, got -1"),
        ({"profile": StageProfile(FLAT, FLAT), "weight": float("nan")}, "weight must be at least 0, got nan"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        Mosaic(SPACES["small"], seed=0, **options)


def test_plans_are_refused() -> None:
    with pytest.raises(DiffesError, match="strategy 'mosaic' works on levels of stages"):
        Mosaic(PLANS["plans"], seed=0, profile=StageProfile(FLAT, FLAT))
